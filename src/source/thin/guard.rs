//! Tells whether a thin device was written to since its map was read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::params::{self, Mapped};
use crate::error::plain;
use crate::source::{BlockDevice, Guard};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::device::{self, DeviceId};
use crate::sys::dm::{Commit, Control};
use crate::sys::file::read_full;
use crate::sys::sysfs::{self, IoCounters, StatFile};
use crate::units::{Bytes, Sectors};

/// Whether this kernel's device-mapper counts whatever `queue/iostats` says. Known once it was seen to.
static ALWAYS_COUNTS: AtomicBool = AtomicBool::new(false);

/// The status line of a thin device.
pub struct Status {
    /// The control device.
    pub control: Arc<Control>,
    /// The device.
    pub id: DeviceId,
    /// Where its target starts.
    pub start: Sectors,
}

impl Status {
    /// How much of the device is mapped now, committed or not.
    ///
    /// # Errors
    /// What its status is instead.
    pub fn mapped(&self) -> Result<Mapped, String> {
        let table = self.control.status(self.id, Commit::No);
        let table = table.map_err(|error| format!("cannot read its status: {}", plain(&error)))?;
        let line = table.targets.iter().find(|line| line.start == self.start);
        let line = line.map(|line| line.params.as_str()).unwrap_or_default();
        params::thin_status(line).ok_or_else(|| format!("its status is: {line}"))
    }
}

/// What a volume tells its guard.
#[derive(Default)]
pub struct Told {
    /// Its map could not be read now: the next question is to read it again.
    pub again: AtomicBool,
    /// Sectors in mapped blocks, those past the end included, where its map was read.
    pub mapped: OnceLock<Sectors>,
}

/// Writes and discards of a device. As long as none completes, no block of it is mapped or unmapped.
///
/// Most writes overwrite blocks that are mapped already, and leave the map as it is. On a device that takes no discards
/// blocks are only ever added: as long as there are as many as in the map, they are the same. Where it takes them equal
/// numbers prove nothing: since Linux 5.18 or so a discard that has unmapped its blocks is neither counted nor in
/// flight until it completes (`accounts_remapped_io` of `struct dm_target`), and a write may have taken its place.
pub struct WriteGuard {
    status: Status,
    stat: StatFile,
    seen: Mutex<Seen>,
    /// Whether no discard can have been under way when this was made.
    never_discarded: bool,
    /// The switch that the counters obey, where they obey one.
    switch: Option<File>,
    told: Arc<Told>,
}

/// A device's counters at some time.
#[derive(Clone, Copy)]
struct Seen {
    counters: IoCounters,
    /// Writes that were under way. Kernels before 6.4 or so count a write when it begins: the end of these would change
    /// nothing but this number.
    in_flight: u64,
}

impl Seen {
    fn now(id: DeviceId, stat: &StatFile) -> io::Result<Self> {
        // In this order, see `pool::Still`.
        let counters = stat.read()?;
        Ok(Self { counters, in_flight: sysfs::writes_in_flight(id)? })
    }
}

impl WriteGuard {
    /// Remembers what was written to a device so far.
    ///
    /// # Errors
    /// When the device has no counters, or they stand still.
    pub fn new(device: &BlockDevice, status: Status, told: Arc<Told>) -> io::Result<Self> {
        let stat = StatFile::open(device.id)?;
        let switch = switch(device, &stat)?;
        let never_discarded = takes_no_discards(device.id);
        let seen = Mutex::new(Seen::now(device.id, &stat)?);
        Ok(Self { status, stat, seen, never_discarded, switch, told })
    }

    fn nothing_written(&self, seen: &Seen) -> io::Result<bool> {
        Ok(self.stat.read()? == seen.counters
            && (seen.in_flight == 0 || sysfs::writes_in_flight(self.status.id)? == seen.in_flight))
    }

    /// Whether all that was written so far went to blocks that the map has: the counters to go on with.
    fn only_overwritten(&self) -> Option<Seen> {
        let mapped = self.told.mapped.get().filter(|_| self.never_discarded && takes_no_discards(self.status.id))?;
        // Before the status: what is written from here on is seen the next time.
        let now = Seen::now(self.status.id, &self.stat).ok()?;
        (self.status.mapped().ok()?.sectors == *mapped).then_some(now)
    }
}

/// Whether the device's table lets no discard through, as in a pool with `ignore_discard`; only another table changes
/// that.
fn takes_no_discards(id: DeviceId) -> bool {
    sysfs::number(id, "queue/discard_max_hw_bytes") == Some(0)
}

impl Guard for WriteGuard {
    fn unchanged(&self) -> bool {
        if self.told.again.load(Relaxed) || !self.switch.as_ref().is_none_or(is_on) {
            return false;
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if self.nothing_written(&seen).unwrap_or(false) {
            return true;
        }
        match self.only_overwritten() {
            Some(now) => *seen = now,
            None => return false,
        }
        true
    }

    fn is_of_content(&self) -> bool {
        true
    }
}

/// Whether the I/O counters of a device move when it is written to.
pub fn counts(device: &BlockDevice) -> bool {
    if sysfs::dm_name(device.id).is_some() {
        return StatFile::open(device.id).and_then(|stat| switch(device, &stat)).is_ok();
    }
    // A partition has no queue of its own.
    ["queue/iostats", "../queue/iostats"].iter().find_map(|name| sysfs::number(device.id, name)) == Some(1)
}

/// The switch of the device's counters. Up to Linux 6.1 or so it is off for device-mapper, and not heeded: then a read
/// of ours moves the counters all the same.
fn switch(device: &BlockDevice, stat: &StatFile) -> io::Result<Option<File>> {
    if ALWAYS_COUNTS.load(Relaxed) {
        return Ok(None);
    }
    let switch = File::open(sysfs::directory(device.id).join("queue/iostats"))?;
    if is_on(&switch) {
        return Ok(Some(switch));
    }
    let before = stat.sectors_read()?;
    read_full(&device::reopen_direct(&device.file)?, AlignedBuffer::new().resize(4096), Bytes::ZERO)?;
    if is_on(&switch) || stat.sectors_read()? <= before {
        return Err(io::Error::other("they are switched off (queue/iostats)"));
    }
    ALWAYS_COUNTS.store(true, Relaxed);
    Ok(None)
}

fn is_on(switch: &File) -> bool {
    let mut text = [0; 8];
    matches!(switch.read_at(&mut text, 0), Ok(count) if text[..count].trim_ascii() == b"1")
}
