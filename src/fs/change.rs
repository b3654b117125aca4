//! When a device changed: a file's times, which backup tools compare to skip what is unchanged.
//!
//! A block device keeps no such time. The first look at a device gives it the time of that look; after that the times
//! move when what can be seen of the device without reading it did: its I/O counters, its length, its disk sequence
//! number, its device-mapper table, and for a loop device the backing file's own times. A device whose counters are
//! switched off may have changed at any time. An image has times of its own.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use super::Ino;
use crate::source::thin::guard::counts;
use crate::source::{Backing, BlockDevice, Context};
use crate::sys::device::DeviceId;
use crate::sys::dm::Table;
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
    table: Option<Table>,
}

impl Trace {
    fn of(backing: &Backing, device: &BlockDevice, context: &Context) -> Self {
        let id = device.id;
        let is_dm = sysfs::dm_name(id).is_some();
        let file = sysfs::attribute(id, "loop/backing_file").and_then(|path| fs::metadata(path).ok());
        Self {
            id,
            len: backing.len().ok(),
            sequence: sysfs::number(id, "diskseq").or_else(|| sysfs::number(id, "../diskseq")),
            counters: counts(device).then(|| sysfs::io_counters(id).ok()).flatten(),
            backing: file.map(|file| [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()]),
            table: context.dm.control().filter(|_| is_dm).and_then(|control| control.table(id).ok()),
        }
    }
}

impl Changes {
    /// Looks at a device and tells when it changed last. Its dirty pages must have been written back before.
    pub fn observe(&self, ino: Ino, backing: &Backing, context: &Context) -> Changed {
        let now = SystemTime::now();
        let Some(device) = backing.device() else {
            let unknown = Changed { mtime: now, ctime: now };
            return backing.node().map_or(unknown, |node| Changed { mtime: node.mtime, ctime: node.ctime });
        };
        let trace = Trace::of(backing, device, context);
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = seen.entry(ino).or_insert_with(|| Seen { trace: trace.clone(), since: now });
        if entry.trace != trace || trace.counters.is_none() {
            *entry = Seen { trace, since: now };
        }
        Changed { mtime: entry.since, ctime: entry.since }
    }
}
