//! Tells whether a thin device was written to since its map was read.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::source::{BlockDevice, Guard};
use crate::sys::device::DeviceId;
use crate::sys::iostats::CompleteAccounting;
use crate::sys::sysfs::{Activity, StatFile};

/// Writes and discards of a device. As long as none completes, no block of it is mapped.
///
/// Most writes overwrite blocks that are mapped already, and leave the map as it is. Nothing distinguishes them from others:
/// as many mapped blocks as before may be other blocks, since a discard unmaps some. Whether a device takes discards at
/// all is in none of its queue's limits for certain.
pub struct WriteGuard {
    id: DeviceId,
    stat: StatFile,
    seen: Activity,
    counting: CompleteAccounting,
    again: Arc<AtomicBool>,
}

impl WriteGuard {
    /// Remembers what was written to a device so far. `again` is set when its map could not be read: the next question is
    /// to read it again.
    ///
    /// # Errors
    /// When the device has no counters, or they may stand still.
    pub fn new(device: &BlockDevice, again: Arc<AtomicBool>) -> io::Result<Self> {
        let stat = StatFile::open(device.id)?;
        let counting = CompleteAccounting::of(device.id)?;
        Ok(Self { id: device.id, seen: Activity::now(device.id, &stat)?, stat, counting, again })
    }
}

impl Guard for WriteGuard {
    fn unchanged(&self) -> bool {
        // The counters before the switch: they are valid if it was on up to then.
        !self.again.load(Relaxed) && self.seen.lasts(self.id, &self.stat).unwrap_or(false) && self.counting.holds()
    }

    fn is_of_content(&self) -> bool {
        true
    }
}
