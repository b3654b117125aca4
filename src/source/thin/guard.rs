//! Guards the mapping of a thin device against writes.

use std::io;

use crate::source::{BlockDevice, Guard};
use crate::sys::device::DeviceId;
use crate::sys::iostats::CompleteAccounting;
use crate::sys::sysfs::{Activity, StatFile};

/// Guards the counters of writes and discards of a thin device. As long as no write and no discard completes, no block
/// of the device is provisioned or unmapped.
///
/// Most writes go to blocks that are mapped already and do not change the mapping, but nothing identifies them: the
/// number of mapped blocks can be the same while the blocks are others, because a discard unmaps some. Whether a device
/// accepts discards at all cannot be derived from the limits of its queue.
pub struct WriteGuard {
    id: DeviceId,
    stat: StatFile,
    seen: Activity,
    counting: CompleteAccounting,
}

impl WriteGuard {
    /// Guards the counters as they are now.
    ///
    /// # Errors
    /// When the device has no I/O counters, or it is not certain that they are enabled.
    pub fn new(device: &BlockDevice) -> io::Result<Self> {
        let stat = StatFile::open(device.id)?;
        let counting = CompleteAccounting::of(device.id)?;
        Ok(Self { id: device.id, seen: Activity::now(device.id, &stat)?, stat, counting })
    }
}

impl Guard for WriteGuard {
    fn unchanged(&self) -> bool {
        // The counters are read first: they are valid if counting was enabled until after that.
        self.seen.lasts(self.id, &self.stat).unwrap_or(false) && self.counting.holds()
    }

    fn is_of_content(&self) -> bool {
        true
    }
}
