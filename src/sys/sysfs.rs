//! Attributes of block devices in sysfs.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::device::DeviceId;
use crate::units::{Bytes, Sectors};

/// The sysfs directory of a block device.
pub fn directory(id: DeviceId) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{id}"))
}

/// An attribute of a block device without its line end; `None` when the device has no such attribute.
pub fn attribute(id: DeviceId, name: &str) -> Option<String> {
    fs::read_to_string(directory(id).join(name)).ok().map(|text| text.trim_end_matches('\n').to_owned())
}

/// An attribute that is a number.
pub fn number(id: DeviceId, name: &str) -> Option<u64> {
    attribute(id, name)?.trim().parse().ok()
}

/// The kernel's name of a device, its node's path under `/dev`.
pub fn kernel_name(id: DeviceId) -> Option<String> {
    name_in(&attribute(id, "uevent")?).map(ToOwned::to_owned)
}

/// The name in the text of a `uevent` attribute.
pub fn name_in(uevent: &str) -> Option<&str> {
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    // The name becomes a path: nothing in it may climb.
    (!name.is_empty() && !name.split('/').any(|part| part.is_empty() || part == "..")).then_some(name)
}

/// The name that a device-mapper device was created with.
pub fn dm_name(id: DeviceId) -> Option<String> {
    attribute(id, "dm/name").filter(|name| !name.is_empty() && !name.contains('/') && name != "..")
}

/// The length of a block device, without opening it.
pub fn len(id: DeviceId) -> Option<Bytes> {
    Sectors::new(number(id, "size")?).bytes()
}

/// Where a partition begins on its disk, and which disk that is; `None` when the device is no partition.
pub fn partition(id: DeviceId) -> Option<(DeviceId, Sectors)> {
    number(id, "partition")?;
    let start = Sectors::new(number(id, "start")?);
    let disk = fs::read_to_string(directory(id).join("../dev")).ok()?;
    Some((disk.trim().parse().ok()?, start))
}

/// The devices that have this one in their table, from its load on (`Documentation/ABI/stable/sysfs-block`).
///
/// # Errors
/// As readdir(3) and read(2); `InvalidData` for a text that is not the kernel's.
pub fn holders(id: DeviceId) -> io::Result<Vec<DeviceId>> {
    let mut holders = Vec::new();
    for entry in fs::read_dir(directory(id).join("holders"))? {
        match fs::read_to_string(entry?.path().join("dev")) {
            Ok(number) => holders.push(number.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(holders)
}

/// A block device's I/O accounting (`Documentation/block/stat.rst`): only what writing changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoCounters {
    /// Writes completed (on kernels before 6.4 or so: begun).
    pub writes: u64,
    /// Sectors that they wrote.
    pub write_sectors: u64,
    /// Discards completed.
    pub discards: u64,
    /// Sectors that they discarded.
    pub discard_sectors: u64,
}

/// An open `stat` file: read again and again at the cost of one system call.
#[derive(Debug)]
pub struct StatFile(File);

impl StatFile {
    /// Opens the accounting of a device.
    ///
    /// # Errors
    /// As open(2).
    pub fn open(id: DeviceId) -> io::Result<Self> {
        File::open(directory(id).join("stat")).map(Self)
    }

    /// The counters now.
    ///
    /// # Errors
    /// As pread(2), `ENODEV` when the device is gone; `InvalidData` for a text that is not the kernel's.
    pub fn read(&self) -> io::Result<IoCounters> {
        self.fields().and_then(|(_, counters)| counters.ok_or_else(|| io::ErrorKind::InvalidData.into()))
    }

    /// Sectors read so far, which also tells whether a device counts at all.
    ///
    /// # Errors
    /// As [`StatFile::read`].
    pub fn sectors_read(&self) -> io::Result<Sectors> {
        self.fields().map(|(read, _)| read)
    }

    fn fields(&self) -> io::Result<(Sectors, Option<IoCounters>)> {
        let mut text = [0; 512];
        let count = self.0.read_at(&mut text, 0)?;
        let text = std::str::from_utf8(&text[..count]).map_err(|_| io::ErrorKind::InvalidData)?;
        parse_stat(text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// The open `dm/suspended` attribute of a device-mapper device.
#[derive(Debug)]
pub struct SuspendFile(File);

impl SuspendFile {
    /// Opens the attribute; `None` for a device that is not device-mapper's.
    pub fn open(id: DeviceId) -> Option<Self> {
        File::open(directory(id).join("dm/suspended")).ok().map(Self)
    }

    /// Whether the device is suspended now. One that is gone counts as suspended: nothing is to be asked of it.
    pub fn is_suspended(&self) -> bool {
        let mut text = [0; 8];
        !matches!(self.0.read_at(&mut text, 0), Ok(count) if text[..count].trim_ascii() == b"0")
    }
}

/// The counters of a device now.
///
/// # Errors
/// As [`StatFile::read`].
pub fn io_counters(id: DeviceId) -> io::Result<IoCounters> {
    StatFile::open(id)?.read()
}

/// Writes that are under way on a device now, discards included.
///
/// # Errors
/// As read(2); `InvalidData` for a text that is not the kernel's.
pub fn writes_in_flight(id: DeviceId) -> io::Result<u64> {
    let text = fs::read_to_string(directory(id).join("inflight"))?;
    let writes = text.split_ascii_whitespace().nth(1).and_then(|field| field.parse().ok());
    writes.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Reads the `stat` line: sectors read, and the counters of writes and discards (the latter since 4.18).
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
    fn the_stat_line_is_read_by_position() {
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
}
