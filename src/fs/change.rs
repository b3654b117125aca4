//! When a device changed: a file's times, which backup tools compare to skip what is unchanged.
//!
//! A block device keeps no such time. The first look at a device gives it the time of that look; after that the times
//! move when what can be seen of the device without reading it did: its I/O counters, how it and the devices below it are
//! built (lengths, media, tables, bindings), and the times of the files at the bottom. A device whose counters are
//! switched off, or were since the first look, may have changed at any time. An image has times of its own.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use super::Ino;
use crate::handle::Handle;
use crate::source::BlockDevice;
use crate::sys::device::DeviceId;
use crate::sys::iostats::Counting;
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
pub struct Changes(Mutex<HashMap<Ino, Seen>>);

struct Seen {
    trace: Trace,
    since: SystemTime,
}

/// What moves when a device is written.
#[derive(Clone, PartialEq, Eq)]
struct Trace {
    id: DeviceId,
    activity: Activity,
    stack: u64,
}

impl Trace {
    /// `None` when something is not known.
    fn of(device: &BlockDevice, handle: &Handle) -> Option<Self> {
        let id = device.id;
        let counting = Counting::of(id).ok()?;
        let activity = Activity::now(id, &StatFile::open(id).ok()?).ok()?;
        Some(Self { id, activity, stack: handle.trace()? }).filter(|_| counting.goes_on())
    }
}

impl Changes {
    /// Looks at an open device and tells when it changed last. It must have been asked for holes right before, which
    /// writes back its dirty pages and looks at how it is built.
    pub fn observe(&self, ino: Ino, handle: &Handle) -> Changed {
        let now = SystemTime::now();
        let unknown = Changed { mtime: now, ctime: now };
        let backing = handle.backing();
        let Some(device) = backing.device() else {
            return backing.node().map_or(unknown, |node| Changed { mtime: node.mtime, ctime: node.ctime });
        };
        let trace = Trace::of(device, handle);
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(trace) = trace else {
            seen.remove(&ino);
            return unknown;
        };
        let since = match seen.get(&ino) {
            Some(seen) if seen.trace == trace => seen.since,
            _ => now,
        };
        seen.insert(ino, Seen { trace, since });
        Changed { mtime: since, ctime: since }
    }
}
