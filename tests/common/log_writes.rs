//! A device that logs what is written to it, and what may be on the disk after a loss of power at any moment.
//!
//! The target `log-writes` of device-mapper writes a log of all writes, discards, flushes and marks. A write that has completed is
//! in the log before the next flush that began after it (`log_writes_map` and `normal_end_io` of `drivers/md/dm-log-writes.c`).
//! After a loss of power a disk has everything that is before the last flush, and any of the writes after it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::dm::{Dm, sectors};
use super::image::Image;
use super::loop_device::Loop;
use super::random::Random;
use super::{GIB, run};

/// `WRITE_LOG_MAGIC` of `drivers/md/dm-log-writes.c`.
const MAGIC: u64 = 0x006a_7366_7773_6872;
const SECTOR: usize = 512;
/// What a discarded range has after a loss of power, in the worst case: anything.
pub const DISCARDED: u8 = 0xdd;

/// A device with a log of its writes.
pub struct LoggedDevice {
    dm: Dm,
    log: Loop,
    _log_image: Image,
    disk: Loop,
}

/// An entry of the log.
pub enum Entry {
    /// Bytes were written at an offset. With `is_forced` (FUA) they are on the disk when the write has completed.
    Write {
        offset: usize,
        bytes: Vec<u8>,
        is_forced: bool,
    },
    Discard {
        offset: usize,
        length: usize,
    },
    Flush,
    Mark(String),
}

impl LoggedDevice {
    /// A device over an image.
    pub fn new(image: &Image) -> Self {
        let log_image = Image::new(GIB);
        let (disk, log) = (Loop::new(image.path()), Loop::new(log_image.path()));
        let (size, path) = (sectors(disk.path()), disk.path().display());
        let dm = Dm::new(&format!("0 {size} log-writes {path} {}", log.path().display()));
        Self { dm, log, _log_image: log_image, disk }
    }

    /// The device.
    pub fn path(&self) -> &Path {
        self.dm.path()
    }

    /// Adds a mark to the log. All flushes that have completed are before it.
    pub fn mark(&self, text: &str) {
        self.dm.message(&format!("mark {text}"));
    }

    /// Removes the device, and returns its log.
    pub fn into_log(self) -> Vec<Entry> {
        let Self { dm, log, disk, .. } = self;
        // The last writes are logged at the removal.
        drop(dm);
        drop(disk);
        run("blockdev", ["--flushbufs".as_ref(), log.path().as_os_str()]);
        read_log(&File::open(log.path()).expect("the log opens"))
    }
}

fn read_log(log: &File) -> Vec<Entry> {
    let read = |offset: u64, length: usize| {
        let mut bytes = vec![0; length];
        log.read_exact_at(&mut bytes, offset).expect("the log is complete");
        bytes
    };
    let words = |bytes: &[u8]| -> Vec<u64> {
        bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect()
    };
    let start = words(&read(0, 32));
    assert_eq!((start[0], start[1], start[3]), (MAGIC, 1, SECTOR as u64), "magic, version and sector size");
    let mut at = SECTOR as u64;
    let mut entries = Vec::new();
    for _ in 0..start[2] {
        let header = read(at, SECTOR);
        let number = |index: usize| usize::try_from(words(&header[..32])[index]).expect("small");
        let (offset, length, flags) = (number(0) * SECTOR, number(1) * SECTOR, number(2));
        at += SECTOR as u64;
        let [is_flush, is_forced, is_discard, is_mark] = [1, 2, 4, 8].map(|bit| flags & bit != 0);
        if is_mark {
            let text = &header[32..32 + number(3)];
            entries.push(Entry::Mark(String::from_utf8_lossy(text).trim_end_matches('\0').to_owned()));
        } else if is_discard {
            entries.push(Entry::Discard { offset, length });
        } else {
            if is_flush {
                entries.push(Entry::Flush);
            }
            if length > 0 {
                entries.push(Entry::Write { offset, bytes: read(at, length), is_forced });
                at += length as u64;
            }
        }
    }
    entries
}

impl Entry {
    /// Applies a write or a discard to the bytes of a disk.
    pub fn apply(&self, disk: &mut [u8]) {
        match self {
            Self::Write { offset, bytes, .. } => disk[*offset..offset + bytes.len()].copy_from_slice(bytes),
            Self::Discard { offset, length } => disk[*offset..offset + length].fill(DISCARDED),
            Self::Flush | Self::Mark(_) => {}
        }
    }

    /// Applies any of the sectors of a write, or a discard or nothing of it.
    fn apply_in_part(&self, disk: &mut [u8], random: &mut Random) {
        let Self::Write { offset, bytes, .. } = self else { return self.apply(disk) };
        for (sector, bytes) in bytes.chunks_exact(SECTOR).enumerate() {
            if random.one_in(2) {
                disk[offset + sector * SECTOR..][..SECTOR].copy_from_slice(bytes);
            }
        }
    }
}

/// Applies any part of the writes that were in the cache of a disk at a loss of power: `entries` are those between two flushes.
///
/// The forced ones are in their order, and a disk has all of them that are before the loss of power. A write that is not forced
/// may have begun after a forced one that is before it in the log. So where the loss is before a forced write, no other writes
/// are applied.
pub fn apply_some(entries: &[Entry], disk: &mut [u8], random: &mut Random) {
    let is_forced = |entry: &&Entry| matches!(entry, Entry::Write { is_forced: true, .. });
    let forced: Vec<_> = entries.iter().filter(is_forced).collect();
    let done = usize::try_from(random.within(0..forced.len() as u64 + 1)).expect("small");
    let keep_one_in = random.within(1..4);
    for entry in entries {
        let is_done = forced[..done].iter().any(|forced| std::ptr::eq(*forced, entry));
        if is_done {
            entry.apply(disk);
        } else if done == forced.len() && random.one_in(keep_one_in) {
            if random.one_in(2) { entry.apply(disk) } else { entry.apply_in_part(disk, random) }
        }
    }
}
