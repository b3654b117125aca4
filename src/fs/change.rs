//! When a device changed: a file's times, which backup tools compare to skip what is unchanged.
//!
//! A block device keeps no such time. The first look at a device gives it the time of that look; after that the times
//! move when what can be seen of the device without reading it did: its I/O counters, how it and the devices below it are
//! built (lengths, media, tables, bindings), and the times of the files at the bottom. A device whose counters are
//! switched off, or were since the first look, may have changed at any time. An image has times of its own.
//!
//! The times belong to the device, not to a name that leads to it: they outlive the name, and there are no more of them
//! than there were devices.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use crate::handle::Handle;
use crate::source::BlockDevice;
use crate::sys::device::DeviceId;
use crate::sys::iostats::CompleteAccounting;
use crate::sys::stamp::increasing_now;
use crate::sys::sysfs::{Activity, StatFile};

/// The times of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Of its contents.
    pub mtime: SystemTime,
    /// Of anything.
    pub ctime: SystemTime,
}

/// What was seen of each device at the last look.
#[derive(Default)]
pub struct Changes(Mutex<HashMap<DeviceId, Seen>>);

struct Seen {
    /// `None` when something was not known.
    trace: Option<Trace>,
    since: SystemTime,
}

/// What moves when a device is written.
#[derive(Clone, PartialEq, Eq)]
struct Trace {
    /// Which device it is: another one may have got its number, and have as many writes.
    attribute: u64,
    activity: Activity,
    stack: u64,
}

impl Trace {
    /// `None` when something is not known.
    fn of(device: &BlockDevice, handle: &Handle) -> Option<Self> {
        let id = device.id;
        let counting = CompleteAccounting::of(id).ok()?;
        let stat = StatFile::open(id).ok()?;
        let (attribute, activity) = (stat.inode().ok()?, Activity::now(id, &stat).ok()?);
        Some(Self { attribute, activity, stack: handle.trace()? }).filter(|_| counting.holds())
    }
}

impl Changes {
    /// Looks at an open device and tells when it changed last. It must have been asked for holes right before, which
    /// writes back its dirty pages and looks at how it is built.
    pub fn observe(&self, handle: &Handle) -> Changed {
        let backing = handle.backing();
        let Some(device) = backing.device() else {
            let unknown = |_| {
                let now = increasing_now();
                Changed { mtime: now, ctime: now }
            };
            return backing.node().map_or_else(unknown, |node| Changed { mtime: node.mtime, ctime: node.ctime });
        };
        let trace = Trace::of(device, handle);
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = match seen.get(&device.id) {
            Some(seen) if trace.is_some() && seen.trace == trace => seen.since,
            // Later than what was shown before, also on a kernel whose clock stands still between two looks.
            _ => increasing_now(),
        };
        seen.insert(device.id, Seen { trace, since });
        Changed { mtime: since, ctime: since }
    }
}
