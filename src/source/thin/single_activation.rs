//! Guards against a second activation of a volume. The kernel allows a volume to be active as several devices, and a
//! write to one of them does not change the I/O counters of the others.

use std::hash::{Hash as _, Hasher};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::params::{self, ThinTable};
use crate::source::Guard;
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
    is_single: bool,
}

impl SingleActivationGuard {
    /// Looks at the live tables of all devices that use the volume's pool. The volume's own table, `table` of `device`,
    /// was read after `events`.
    ///
    /// # Errors
    /// When the list of devices that use the pool cannot be read.
    pub fn new(control: Arc<Control>, events: Events, device: DeviceId, table: ThinTable) -> io::Result<Self> {
        let holders = sysfs::holders(table.pool)?;
        let is_single = holders.into_iter().all(|id| id == device || is_other_volume(&control, id, &table));
        Ok(Self { control, events, is_single })
    }

    /// Whether no other device was the same volume.
    pub fn is_single(&self) -> bool {
        self.is_single
    }
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

    /// Writes through another device leave no other evidence than the event of its activation. The counter of events
    /// covers a device that was removed before this guard was made. While there is such a device, or may be one, each
    /// trace is a new one.
    fn trace(&self, mut trace: &mut dyn Hasher) {
        static TRACES: AtomicU64 = AtomicU64::new(0);
        self.events.hash(&mut trace);
        if !self.is_single || !self.unchanged() {
            TRACES.fetch_add(1, Ordering::Relaxed).hash(&mut trace);
        }
    }
}
