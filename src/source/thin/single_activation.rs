//! Guards against a second activation of a volume. The kernel allows a volume to be active as several devices, and a
//! write to one of them does not change the I/O counters of the others.

use std::io;
use std::sync::Arc;

use super::params::{self, ThinTable};
use crate::source::{Guard, Reach, Trace};
use crate::sys::device::DeviceId;
use crate::sys::dm::{Control, Events};
use crate::sys::sysfs;

/// Guards that a volume is active as one device only.
///
/// To look at the other devices of the pool again later would prove nothing: a second device of the volume may have
/// been activated, written and removed since. But a volume is written through a live table only, and a table becomes
/// live with an event of device-mapper. The same event reports a new table of the volume's own device or of its pool,
/// which may have other metadata. An event does not name its device, so each event counts as a change, although most
/// are for other devices.
pub struct SingleActivationGuard {
    control: Arc<Control>,
    /// The event counter before the volume's own table was read.
    events: Events,
    device: DeviceId,
    table: ThinTable,
    is_single: bool,
}

impl SingleActivationGuard {
    /// Looks at the live tables of all devices that use the volume's pool. The volume's own table, `table` of `device`,
    /// was read after `events`.
    ///
    /// # Errors
    /// When the list of devices that use the pool cannot be read.
    pub fn new(control: Arc<Control>, events: Events, device: DeviceId, table: ThinTable) -> io::Result<Self> {
        let is_single = is_single(&control, device, &table)?;
        Ok(Self { control, events, device, table, is_single })
    }

    /// Whether no other device is the same volume now.
    fn is_single_now(&self) -> bool {
        is_single(&self.control, self.device, &self.table).unwrap_or(false)
    }

    /// Whether no other device was the same volume.
    pub fn is_single(&self) -> bool {
        self.is_single
    }
}

/// Whether no other device that uses the pool is the volume `table`, which `device` is.
fn is_single(control: &Control, device: DeviceId, table: &ThinTable) -> io::Result<bool> {
    let holders = sysfs::holders(table.pool)?;
    Ok(holders.into_iter().all(|id| id == device || is_other_volume(control, id, table)))
}

/// Whether the live table of a device that uses the pool proves that it is not this volume. `false` when the table
/// cannot be read. A loaded table that is not live yet is ignored.
fn is_other_volume(control: &Control, id: DeviceId, volume: &ThinTable) -> bool {
    let is_volume = |params: &str| match params::thin_table(params) {
        Some(table) => (table.pool, table.id) == (volume.pool, volume.id),
        None => true,
    };
    let table = control.table(id);
    table.is_ok_and(|table| !table.targets.iter().any(|target| target.kind == "thin" && is_volume(&target.params)))
}

impl Guard for SingleActivationGuard {
    fn unchanged(&self) -> bool {
        self.control.events().is_ok_and(|now| now == self.events)
    }

    /// A second activation means writes that this device's I/O counters do not count.
    fn is_of_content(&self) -> bool {
        true
    }

    /// Writes through another device leave no other evidence than the event of its activation, which the guard of the table
    /// adds where it must. While there is another device, or may be one, nothing is proven.
    fn trace(&self, trace: &mut Trace) {
        if !self.is_single || !self.unchanged() && !self.is_single_now() {
            trace.limit(Reach::Nothing);
        }
    }
}
