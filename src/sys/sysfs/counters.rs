//! The I/O counters of block devices in sysfs.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::super::device::DeviceId;
use super::directory;
use crate::units::Sectors;

/// Those I/O counters of a block device that change with writes (`Documentation/block/stat.rst`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct IoCounters {
    /// Completed writes. Bio-based devices count a write at its start before Linux 6.4.
    pub writes: u64,
    /// Sectors of these writes.
    pub write_sectors: u64,
    /// Completed discards.
    pub discards: u64,
    /// Sectors of these discards.
    pub discard_sectors: u64,
}

impl IoCounters {
    /// The completed discards, and their sectors.
    pub fn of_discards(&self) -> (u64, u64) {
        (self.discards, self.discard_sectors)
    }

    /// The sums with other counters. They wrap, as the counters of the kernel do.
    #[must_use]
    pub fn with(&self, other: &Self) -> Self {
        self.combined(other, u64::wrapping_add)
    }

    /// The differences from other counters. They wrap: the counters need not be of one time.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        self.combined(other, u64::wrapping_sub)
    }

    fn combined(&self, other: &Self, combine: fn(u64, u64) -> u64) -> Self {
        Self {
            writes: combine(self.writes, other.writes),
            write_sectors: combine(self.write_sectors, other.write_sectors),
            discards: combine(self.discards, other.discards),
            discard_sectors: combine(self.discard_sectors, other.discard_sectors),
        }
    }
}

/// The open attribute `stat` of a block device. Each read of the counters costs one system call.
#[derive(Debug)]
pub struct StatFile(File);

impl StatFile {
    /// Opens the attribute of the device `id`.
    ///
    /// # Errors
    /// As open(2).
    pub fn open(id: DeviceId) -> io::Result<Self> {
        Self::open_in(&directory(id))
    }

    /// Opens the attribute of the device with that directory in sysfs.
    ///
    /// # Errors
    /// As open(2).
    pub fn open_in(directory: &Path) -> io::Result<Self> {
        File::open(directory.join("stat")).map(Self)
    }

    /// The inode number of the attribute. It differs from that of every other device, including a later device with the same
    /// device number (`fs/kernfs/dir.c: __kernfs_new_node` assigns a new generation each time).
    ///
    /// # Errors
    /// As fstat(2).
    pub fn inode(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.ino())
    }

    /// The current counters.
    ///
    /// # Errors
    /// As pread(2), with `ENODEV` for a device that was removed, and `InvalidData` for a value of an unknown format.
    pub fn read(&self) -> io::Result<IoCounters> {
        self.fields().and_then(|(_, counters)| counters.ok_or_else(|| io::ErrorKind::InvalidData.into()))
    }

    /// Sectors that were read from the device so far. The number stays 0 on a device without accounting.
    ///
    /// # Errors
    /// As [`StatFile::read`].
    pub fn sectors_read(&self) -> io::Result<Sectors> {
        self.fields().map(|(read, _)| read)
    }

    /// Whether any read, write or discard was counted so far.
    ///
    /// # Errors
    /// As [`StatFile::read`].
    pub fn is_moved(&self) -> io::Result<bool> {
        let (read, counters) = self.fields()?;
        Ok(read > Sectors::new(0) || counters.is_some_and(|counters| counters != IoCounters::default()))
    }

    fn fields(&self) -> io::Result<(Sectors, Option<IoCounters>)> {
        let mut text = [0; 512];
        let count = self.0.read_at(&mut text, 0)?;
        let text = std::str::from_utf8(&text[..count]).map_err(|_| io::ErrorKind::InvalidData)?;
        parse_stat(text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// The write counters of a device, and the number of its writes in flight, at some time.
///
/// While both stay the same, no write completes. A write is counted at its end, or at its start before Linux 6.4, and it is
/// in flight until its end. The counters never decrease. The number of writes in flight can return to the same value after
/// a write has ended, but only if another write was started. Then the counters have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Activity {
    counters: IoCounters,
    in_flight: u64,
}

impl Activity {
    /// The current activity of the device `id`, whose attribute `stat` is open.
    ///
    /// # Errors
    /// As [`StatFile::read`] and [`writes_in_flight`].
    pub fn now(id: DeviceId, stat: &StatFile) -> io::Result<Self> {
        // The counters are read first: a write that is counted at its start and has not ended is then in flight.
        let counters = stat.read()?;
        Ok(Self { counters, in_flight: writes_in_flight(id)? })
    }

    /// Whether the current activity is the same. If no write was in flight it is enough to compare the counters.
    ///
    /// # Errors
    /// As [`Activity::now`].
    pub fn lasts(&self, id: DeviceId, stat: &StatFile) -> io::Result<bool> {
        Ok((self.in_flight == 0 || writes_in_flight(id)? == self.in_flight) && stat.read()? == self.counters)
    }

    /// The counters, which were read before the number of writes in flight.
    pub fn counters(&self) -> IoCounters {
        self.counters
    }

    /// Whether no write was in flight.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0
    }
}

/// The number of writes in flight on a device, including discards.
///
/// # Errors
/// As read(2), and `InvalidData` for a value of an unknown format.
pub fn writes_in_flight(id: DeviceId) -> io::Result<u64> {
    let text = fs::read_to_string(directory(id).join("inflight"))?;
    let writes = text.split_ascii_whitespace().nth(1).and_then(|field| field.parse().ok());
    writes.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Parses the value of the attribute `stat`: the sectors read, and the counters of writes and discards. Linux before 4.18
/// has no counters of discards.
pub fn parse_stat(text: &str) -> Option<(Sectors, Option<IoCounters>)> {
    let mut fields = [0; 17];
    let mut count = 0;
    for (field, word) in fields.iter_mut().zip(text.split_ascii_whitespace()) {
        *field = word.parse().ok()?;
        count += 1;
    }
    let counters = (count >= 11).then(|| IoCounters {
        writes: fields[4],
        write_sectors: fields[6],
        discards: fields[11],
        discard_sectors: fields[13],
    });
    (count > 2).then_some((Sectors::new(fields[2]), counters))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_are_parsed_by_position() {
        let line = " 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n";
        let counters = IoCounters { writes: 5, write_sectors: 7, discards: 12, discard_sectors: 14 };
        assert_eq!(parse_stat(line), Some((Sectors::new(3), Some(counters))));
        let old = "1 2 3 4 5 6 7 8 9 10 11";
        let counters = IoCounters { writes: 5, write_sectors: 7, discards: 0, discard_sectors: 0 };
        assert_eq!(parse_stat(old), Some((Sectors::new(3), Some(counters))));
        assert_eq!(parse_stat("1 2 3"), Some((Sectors::new(3), None)));
        for text in ["", "x", "1 2", "1 -2", "1 99999999999999999999999"] {
            assert_eq!(parse_stat(text), None, "{text:?}");
        }
    }

    #[test]
    fn sums_and_differences_wrap() {
        let one = IoCounters { writes: 1, write_sectors: 2, discards: 3, discard_sectors: 4 };
        let none = IoCounters::default();
        assert_eq!(one.with(&one).without(&one), one);
        assert_eq!(none.without(&one).with(&one), none);
    }
}
