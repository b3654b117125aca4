//! When a device changed: a file's times, which backup tools compare to skip what is unchanged.
//!
//! A block device keeps no such time. The first look at a device gives it the time of that look; after that the times
//! move when what can be seen of the device without reading it did: its I/O counters, its length, its disk sequence
//! number, and for a loop device the backing file's own times. An image has times of its own.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use super::Ino;
use crate::source::Backing;
use crate::sys::device::DeviceId;
use crate::sys::sysfs::{self, IoCounters};
use crate::units::Bytes;

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
    len: Option<Bytes>,
    sequence: Option<u64>,
    counters: Option<IoCounters>,
    backing: Option<[i64; 4]>,
    dm: Option<String>,
}

impl Trace {
    fn of(backing: &Backing, id: DeviceId) -> Self {
        let file = sysfs::attribute(id, "loop/backing_file").and_then(|path| fs::metadata(path).ok());
        Self {
            id,
            len: backing.len().ok(),
            sequence: sysfs::number(id, "diskseq").or_else(|| sysfs::number(id, "../diskseq")),
            counters: sysfs::io_counters(id).ok(),
            backing: file.map(|file| [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()]),
            dm: sysfs::attribute(id, "dm/uuid"),
        }
    }
}

impl Changes {
    /// Looks at a device and tells when it changed last. Its dirty pages must have been written back before.
    pub fn observe(&self, ino: Ino, backing: &Backing) -> Changed {
        let now = SystemTime::now();
        let Some(id) = backing.id() else {
            let unknown = Changed { mtime: now, ctime: now };
            return backing.node().map_or(unknown, |node| Changed { mtime: node.mtime, ctime: node.ctime });
        };
        let trace = Trace::of(backing, id);
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = seen.entry(ino).or_insert_with(|| Seen { trace: trace.clone(), since: now });
        if entry.trace != trace || trace.counters.is_none() {
            *entry = Seen { trace, since: now };
        }
        Changed { mtime: entry.since, ctime: entry.since }
    }
}
