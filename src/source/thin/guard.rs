//! Tells whether a thin device was written to since its map was read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::source::{BlockDevice, Guard};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::device::{self, DeviceId};
use crate::sys::file::read_full;
use crate::sys::sysfs::{self, IoCounters, StatFile};
use crate::units::Bytes;

/// Whether this kernel's device-mapper counts whatever `queue/iostats` says. Known once it was seen to.
static ALWAYS_COUNTS: AtomicBool = AtomicBool::new(false);

/// Writes and discards of a device: as long as none completes, no block of it is mapped or unmapped.
pub struct WriteGuard {
    id: DeviceId,
    stat: StatFile,
    counters: IoCounters,
    /// Writes that were under way. Kernels before 6.4 or so count a write when it begins: the end of these would change
    /// nothing but this number.
    in_flight: u64,
    /// The switch that the counters obey, where they obey one.
    switch: Option<File>,
    again: Arc<AtomicBool>,
}

impl WriteGuard {
    /// Remembers what was written to a device so far. While `again` is set it is as if it was written to all the time.
    ///
    /// # Errors
    /// When the device has no counters, or they stand still.
    pub fn new(device: &BlockDevice, again: Arc<AtomicBool>) -> io::Result<Self> {
        let id = device.id;
        let stat = StatFile::open(id)?;
        let switch = switch(device, &stat)?;
        // In this order, see `pool::Still`.
        let counters = stat.read()?;
        let in_flight = sysfs::writes_in_flight(id)?;
        Ok(Self { id, stat, counters, in_flight, switch, again })
    }
}

impl Guard for WriteGuard {
    fn unchanged(&self) -> bool {
        !self.again.load(Relaxed)
            && self.stat.read().is_ok_and(|now| now == self.counters)
            && (self.in_flight == 0 || sysfs::writes_in_flight(self.id).is_ok_and(|now| now == self.in_flight))
            && self.switch.as_ref().is_none_or(is_on)
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
