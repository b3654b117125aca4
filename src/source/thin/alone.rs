//! Tells whether a volume is active as one device only. The kernel lets it be active as several, and what is written
//! through one of them moves no counter of the others.

use std::fs::File;
use std::hash::{Hash as _, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::params::{self, ThinTable};
use crate::source::Guard;
use crate::sys::device::DeviceId;
use crate::sys::dm::Control;
use crate::sys::sysfs;

/// A volume, and the one device that it is to be active as.
///
/// Whether it still is cannot be told by looking again: the other device may have been written to and be gone. So all
/// that happens before there can be another one counts as a change, though nearly always it is something else.
pub struct AloneGuard {
    control: Arc<Control>,
    pool: DeviceId,
    uevents: File,
    /// What it was before the other devices were looked at.
    seen: Seen,
    alone: bool,
}

/// What changes before a volume can be written to through another device.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Seen {
    /// How often the pool is open: each device that shows a volume has it open, from the load of its table on.
    opens: u32,
    /// `/sys/kernel/uevent_seqnum`: devices come, go and are resumed with a uevent.
    uevent: [u8; 24],
}

impl AloneGuard {
    /// Looks at the other devices of the volume's pool.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn new(control: Arc<Control>, device: DeviceId, table: ThinTable) -> io::Result<Self> {
        let uevents = File::open("/sys/kernel/uevent_seqnum")?;
        let seen = see(&control, &uevents, table.pool)?;
        let holders = sysfs::holders(table.pool)?;
        let alone = holders.into_iter().all(|id| id == device || is_other(&control, id, &table));
        Ok(Self { control, pool: table.pool, uevents, seen, alone })
    }

    /// Whether no other device was the same volume.
    pub fn alone(&self) -> bool {
        self.alone
    }
}

/// Whether a device that uses the pool is something else than this volume, and stays so: one that is just being made has
/// no table yet, or another one that waits.
fn is_other(control: &Control, id: DeviceId, volume: &ThinTable) -> bool {
    // A table that is about to be the live one waits until its device is suspended, and is the live one then.
    let waits = control.usage(id).map_or(true, |usage| usage.table_waits);
    let targets = match control.table(id) {
        Ok(table) if !table.suspended => table.targets,
        _ => Vec::new(),
    };
    let is_volume = |params| match params::thin_table(params) {
        Some(table) => (table.pool, table.id) == (volume.pool, volume.id),
        None => true,
    };
    !waits && !targets.is_empty() && !targets.iter().any(|target| target.kind == "thin" && is_volume(&target.params))
}

fn see(control: &Control, uevents: &File, pool: DeviceId) -> io::Result<Seen> {
    let mut uevent = [0; 24];
    uevents.read_at(&mut uevent, 0)?;
    Ok(Seen { opens: control.usage(pool)?.opens, uevent })
}

impl Guard for AloneGuard {
    fn unchanged(&self) -> bool {
        see(&self.control, &self.uevents, self.pool).is_ok_and(|now| now == self.seen)
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
