//! Writes to the devices below one, which its own I/O counters need not count.
//!
//! A write to a disk does not move the counters of its partitions (since Linux 5.11), and a write to a device does not move
//! those of a device-mapper or loop device on it. The disk of a virtual machine is written in this way while `kpartx` or
//! `losetup -P` shows its partitions.

use std::fs;
use std::io;

use crate::source::{Guard, Trace};
use crate::sys::device::DeviceId;
use crate::sys::iostats::{self, CompleteAccounting};
use crate::sys::sysfs::{self, Activity, IoCounters, StatFile};

/// How often the counters of a disk and its partitions are read until they are of one time.
const ATTEMPTS: u32 = 50;

/// Whether a device is one of LVM. Only LVM writes to the devices below it.
pub fn is_of_lvm(id: DeviceId) -> bool {
    sysfs::attribute(id, "dm/uuid").is_some_and(|uuid| uuid.starts_with("LVM-"))
}

/// The write counters of a device, and its writes in flight.
///
/// # Errors
/// As read(2), and when the device does not count all of its writes.
pub fn activity(id: DeviceId) -> io::Result<Activity> {
    let counting = CompleteAccounting::of(id)?;
    let stat = StatFile::open(id)?;
    let activity = Activity::now(id, &stat)?;
    if iostats::counts(id, &stat) && counting.holds() {
        return Ok(activity);
    }
    Err(io::Error::other("the device does not count all writes"))
}

/// The guard of a partition: traces the writes to its disk that go through no partition. Those through other partitions, of
/// which a disk in use has many, are not among them.
pub struct PastPartitions {
    /// The disk.
    pub disk: DeviceId,
}

impl Guard for PastPartitions {
    /// Writes end no map: the sources of the disk are asked live, or have guards of their own.
    fn unchanged(&self) -> bool {
        true
    }

    fn trace(&self, trace: &mut Trace) {
        trace.add_or_nothing(past_partitions(self.disk));
    }
}

/// The counters of a disk without those of its partitions. What is subtracted is missing after a partition was removed: then the
/// result grows too.
///
/// # Errors
/// As readdir(3) and read(2), and `ResourceBusy` when partitions are written to all the time.
fn past_partitions(disk: DeviceId) -> io::Result<IoCounters> {
    let mut before = of_partitions(disk)?;
    for _ in 0..ATTEMPTS {
        let whole = StatFile::open(disk)?.read()?;
        let after = of_partitions(disk)?;
        if before == after {
            return Ok(whole.without(&before));
        }
        before = after;
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

/// The sum of the counters of all partitions of a disk.
fn of_partitions(disk: DeviceId) -> io::Result<IoCounters> {
    let mut sum = IoCounters::default();
    for entry in fs::read_dir(sysfs::directory(disk))? {
        let directory = entry?.path();
        if directory.join("partition").exists() {
            sum = sum.with(&StatFile::open_in(&directory)?.read()?);
        }
    }
    Ok(sum)
}
