//! The evidence of this host that a device was written, or replaced.

use std::io;

use crate::source::BlockDevice;
use crate::sys::block;
use crate::sys::iostats::CompleteAccounting;
use crate::sys::sysfs::{IoCounters, StatFile};

/// The I/O counters and the medium of a device. They cost no query to the device.
pub(in crate::source) struct WriteEvidence {
    counters: Box<dyn Fn() -> Option<IoCounters> + Send + Sync>,
    medium: Option<u64>,
    /// The observation that the counters count everything, or why it is impossible. `None` where it is not needed.
    counting: Option<io::Result<CompleteAccounting>>,
}

impl WriteEvidence {
    /// For something that this host has no counters of.
    pub(in crate::source) fn none() -> Self {
        Self::of(|| Some(IoCounters::default()))
    }

    /// Counters that may be incomplete: enough to drop data that is remembered.
    pub(in crate::source) fn counters(device: &BlockDevice) -> Self {
        let stat = StatFile::open(device.id).ok();
        let medium = block::disk_sequence(&device.file).ok().flatten();
        Self { medium, ..Self::of(move || stat.as_ref()?.read().ok()) }
    }

    /// Counters that are observed to be complete.
    pub(in crate::source) fn complete(device: &BlockDevice) -> Self {
        Self { counting: Some(CompleteAccounting::of(device.id)), ..Self::counters(device) }
    }

    /// The result of a function as counters.
    pub(in crate::source) fn of(counters: impl Fn() -> Option<IoCounters> + Send + Sync + 'static) -> Self {
        Self { counters: Box::new(counters), medium: None, counting: None }
    }

    /// The counters now; `None` when they cannot be read.
    pub(in crate::source) fn read(&self) -> Option<IoCounters> {
        (self.counters)()
    }

    /// The disk sequence number, which another medium does not have. `None` on Linux before 5.15.
    pub(in crate::source) fn medium(&self) -> Option<u64> {
        self.medium
    }

    /// Why the counters may not have counted everything until now, if so.
    pub(in crate::source) fn unobserved(&self) -> Option<String> {
        match self.counting.as_ref()? {
            Ok(counting) if counting.holds() => None,
            Ok(_) => Some("its I/O counters were switched off (queue/iostats)".to_owned()),
            Err(error) => Some(format!("its I/O counters cannot be used: {}", crate::error::plain(error))),
        }
    }
}
