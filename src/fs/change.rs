//! The times of a file. Backup tools compare them, and skip files whose times are the same.
//!
//! A block device has no time of its last write. The first stat(2) of a device gives it the time of that call. After that
//! the times change when one of these did: its I/O counters, the lengths, media, tables and bindings of it and of the
//! devices below it, and the times of the files at the bottom. A device whose counters are switched off, or were since
//! the first call, may have changed at any time, so each call gives it a new time. An image has times of its own.
//!
//! The times are kept by device and not by name: two names of one device have the same times.

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
pub struct FileTimes {
    /// The last change of its contents.
    pub mtime: SystemTime,
    /// The last change of its contents or attributes.
    pub ctime: SystemTime,
}

/// The state of each device at the last call, and the time since which it is the same.
#[derive(Default)]
pub struct Changes(Mutex<HashMap<DeviceId, LastChange>>);

struct LastChange {
    /// `None` when some of it was not known.
    state: Option<DeviceState>,
    since: SystemTime,
}

/// Values that change when a device is written.
#[derive(Clone, PartialEq, Eq)]
struct DeviceState {
    /// The inode of its sysfs attribute: another device with the same number and as many writes has another one.
    attribute: u64,
    activity: Activity,
    stack: u64,
}

impl DeviceState {
    /// `None` when some of it is not known.
    fn of(device: &BlockDevice, handle: &Handle) -> Option<Self> {
        let id = device.id;
        let counting = CompleteAccounting::of(id).ok()?;
        let stat = StatFile::open(id).ok()?;
        let (attribute, activity) = (stat.inode().ok()?, Activity::now(id, &stat).ok()?);
        Some(Self { attribute, activity, stack: handle.trace()? }).filter(|_| counting.holds())
    }
}

impl Changes {
    /// The times of an open device. It must have been asked for holes right before: that writes back its dirty pages and
    /// resolves its stack.
    pub fn observe(&self, handle: &Handle) -> FileTimes {
        let export = handle.export();
        let Some(device) = export.device() else {
            let unknown = |_| {
                let now = increasing_now();
                FileTimes { mtime: now, ctime: now }
            };
            return export.node().map_or_else(unknown, |node| FileTimes { mtime: node.mtime, ctime: node.ctime });
        };
        let state = DeviceState::of(device, handle);
        let mut last_changes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = match last_changes.get(&device.id) {
            Some(last) if state.is_some() && last.state == state => last.since,
            // Later than the time before, also on a kernel whose clock stands still between two calls.
            _ => increasing_now(),
        };
        last_changes.insert(device.id, LastChange { state, since });
        FileTimes { mtime: since, ctime: since }
    }
}
