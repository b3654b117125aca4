//! Guards the mapping of a thin device against writes.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::map::WrittenRanges;
use crate::source::own_writes::{Baseline, OwnWrites};
use crate::source::{BlockDevice, Guard};
use crate::sys::device::DeviceId;
use crate::sys::iostats::{self, CompleteAccounting};
use crate::sys::sysfs::{Activity, StatFile};
use crate::units::Bytes;

/// How long a question waits for own writes that are under way. It does not wait for one that hangs.
const LONGEST_WAIT: Duration = Duration::from_millis(50);

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
    /// The writes of this process, if the extents follow them.
    followed: Option<Followed>,
}

/// What proves that there were no writes but those of this process.
struct Followed {
    own: Arc<OwnWrites>,
    /// When the guard was made.
    baseline: Baseline,
    /// The ranges of all own writes since.
    ranges: Arc<WrittenRanges>,
}

impl WriteGuard {
    /// Guards the counters as they are now.
    ///
    /// # Errors
    /// When the device has no I/O counters, or it is not certain that they are enabled.
    pub fn new(device: &BlockDevice) -> io::Result<Self> {
        let stat = StatFile::open(device.id)?;
        let counting = CompleteAccounting::of(device.id)?;
        Ok(Self { id: device.id, seen: Activity::now(device.id, &stat)?, stat, counting, followed: None })
    }

    /// Lets the extents follow the writes of this process: the result gets the range of each one, in blocks of `block` bytes.
    /// `None` where the counters do not distinguish them from others. To be called before the extents are read.
    pub fn follow_own_writes(&mut self, len: Bytes, block: Bytes) -> Option<Arc<WrittenRanges>> {
        if !iostats::counts_each_sector() {
            return None;
        }
        let own = OwnWrites::of(self.id, &self.stat).ok()?;
        let baseline = own.baseline(self.seen.counters(), self.seen.is_idle())?;
        let ranges = own.follow(len, block);
        self.followed = Some(Followed { own, baseline, ranges: ranges.clone() });
        Some(ranges)
    }

    fn only_own(&self, followed: &Followed) -> bool {
        let read = || self.stat.read();
        let only_own = followed.own.only_own_since(&followed.baseline, LONGEST_WAIT, read);
        only_own.unwrap_or(false) && followed.ranges.is_complete() && self.counting.holds()
    }
}

impl Guard for WriteGuard {
    fn unchanged(&self) -> bool {
        // The counters are read first: they are valid if counting was enabled until after that.
        self.seen.lasts(self.id, &self.stat).unwrap_or(false) && self.counting.holds()
    }

    fn unchanged_but_followed(&self) -> bool {
        self.unchanged() || self.followed.as_ref().is_some_and(|followed| self.only_own(followed))
    }

    fn is_of_content(&self) -> bool {
        true
    }
}
