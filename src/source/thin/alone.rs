//! Tells whether a volume is active as one device only. The kernel lets it be active as several, and what is written
//! through one of them moves no counter of the others.

use std::hash::{Hash as _, Hasher};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::params::{self, ThinTable};
use crate::source::Guard;
use crate::sys::device::DeviceId;
use crate::sys::dm::{Control, Events};
use crate::sys::sysfs;

/// A volume, and the one device that it is to be active as.
///
/// Looking at the other devices again would prove nothing: one of them may have been written to and be gone. But a volume
/// is written through a live table only, and a table becomes live with an event of device-mapper. The same event reports a
/// new table of the volume's own device or of its pool, which may come with other metadata. Most events are for other
/// devices. An event does not say which device it is for, so each one counts as a change.
pub struct AloneGuard {
    control: Arc<Control>,
    /// The events up to the time that the volume's own table was read.
    events: Events,
    alone: bool,
}

impl AloneGuard {
    /// Looks at the other devices of the volume's pool. The volume's own table was read after `events`.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn new(control: Arc<Control>, events: Events, device: DeviceId, table: ThinTable) -> io::Result<Self> {
        let holders = sysfs::holders(table.pool)?;
        let alone = holders.into_iter().all(|id| id == device || is_other(&control, id, &table));
        Ok(Self { control, events, alone })
    }

    /// Whether no other device was the same volume.
    pub fn alone(&self) -> bool {
        self.alone
    }
}

/// Whether a device that uses the pool is something else than this volume, by its live table. A table that waits to be
/// the live one shows nothing yet.
fn is_other(control: &Control, id: DeviceId, volume: &ThinTable) -> bool {
    let is_volume = |params: &str| match params::thin_table(params) {
        Some(table) => (table.pool, table.id) == (volume.pool, volume.id),
        None => true,
    };
    let table = control.table(id);
    table.is_ok_and(|table| !table.targets.iter().any(|target| target.kind == "thin" && is_volume(&target.params)))
}

impl Guard for AloneGuard {
    fn unchanged(&self) -> bool {
        self.control.events().is_ok_and(|now| now == self.events)
    }

    /// It stands for writes that no counter tells of.
    fn is_of_content(&self) -> bool {
        true
    }

    /// What is written through another device leaves no trace here: each look is another one.
    fn trace(&self, mut trace: &mut dyn Hasher) {
        static LOOKS: AtomicU64 = AtomicU64::new(0);
        if !self.alone || !self.unchanged() {
            LOOKS.fetch_add(1, Ordering::Relaxed).hash(&mut trace);
        }
    }
}
