//! Attributes of block devices in sysfs.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::device::DeviceId;
use crate::units::{Bytes, Sectors};

/// The sysfs directory of a block device.
pub fn directory(id: DeviceId) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{id}"))
}

/// An attribute of a block device, as the bytes before its line end; `None` when the device has no such attribute.
///
/// That it has none is known only when sysfs shows the device: any failure is an error, and never the absence of something.
///
/// # Errors
/// As read(2).
pub fn bytes(id: DeviceId, name: &str) -> io::Result<Option<Vec<u8>>> {
    bytes_in(&directory(id), id, name)
}

fn bytes_in(directory: &Path, id: DeviceId, name: &str) -> io::Result<Option<Vec<u8>>> {
    match fs::read(directory.join(name)) {
        Ok(bytes) => Ok(Some(line(bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match device_in(directory)? {
            shown if shown == id => Ok(None),
            shown => Err(io::Error::other(format!("sysfs shows {shown} in the place of {id}"))),
        },
        Err(error) => Err(error),
    }
}

/// What comes before the line end that the kernel adds. A name may itself end in one.
fn line(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.pop_if(|last| *last == b'\n');
    bytes
}

/// The number of the device whose directory in sysfs this is.
fn device_in(directory: &Path) -> io::Result<DeviceId> {
    let number = fs::read_to_string(directory.join("dev"))?;
    number.trim().parse().map_err(|()| io::ErrorKind::InvalidData.into())
}

/// An attribute that is text; `None` when the device has no such attribute, or it cannot be read.
pub fn attribute(id: DeviceId, name: &str) -> Option<String> {
    bytes(id, name).ok().flatten().and_then(|bytes| String::from_utf8(bytes).ok())
}

/// An attribute that is a number; `None` as for [`attribute`].
pub fn number(id: DeviceId, name: &str) -> Option<u64> {
    attribute(id, name)?.trim().parse().ok()
}

/// The kernel's name of a device, its node's path under `/dev`.
pub fn kernel_name(id: DeviceId) -> Option<String> {
    name_in(&bytes(id, "uevent").ok().flatten()?).map(ToOwned::to_owned)
}

/// The name in a `uevent` attribute, which also has the name of a partition, in whatever bytes its partition table has it.
pub fn name_in(uevent: &[u8]) -> Option<&str> {
    let name = uevent.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"DEVNAME="))?;
    let name = str::from_utf8(name).ok()?;
    // The name becomes a path: nothing in it may climb.
    (!name.is_empty() && !name.split('/').any(|part| part.is_empty() || part == "..")).then_some(name)
}

/// The name that a device-mapper device was created with, where that is text.
pub fn dm_name(id: DeviceId) -> Option<String> {
    mapper_name(id)?.into_string().ok()
}

/// The name of a device-mapper device in `/dev/mapper`.
pub fn mapper_name(id: DeviceId) -> Option<OsString> {
    let name = OsString::from_vec(bytes(id, "dm/name").ok().flatten()?);
    // The name becomes a path: nothing in it may climb.
    let is_name = !name.is_empty() && !name.as_bytes().contains(&b'/') && name != "..";
    is_name.then_some(name)
}

/// The length of a block device, without opening it.
pub fn len(id: DeviceId) -> Option<Bytes> {
    Sectors::new(number(id, "size")?).bytes()
}

/// Where a partition begins on its disk, and which disk that is; `None` when the device is no partition.
///
/// # Errors
/// When that cannot be known: as read(2), and `InvalidData` for a text that is not the kernel's. A partition that is taken
/// for a whole device has the holes of other bytes.
pub fn partition(id: DeviceId) -> io::Result<Option<(DeviceId, Sectors)>> {
    partition_in(&directory(id), id)
}

fn partition_in(directory: &Path, id: DeviceId) -> io::Result<Option<(DeviceId, Sectors)>> {
    let number = |name: &str| match bytes_in(directory, id, name)? {
        None => Ok(None),
        Some(bytes) => match str::from_utf8(&bytes).ok().and_then(|text| text.trim().parse::<u64>().ok()) {
            None => Err(io::Error::from(io::ErrorKind::InvalidData)),
            number => Ok(number),
        },
    };
    if number("partition")?.is_none() {
        return Ok(None);
    }
    let start = number("start")?.ok_or(io::ErrorKind::InvalidData)?;
    Ok(Some((device_in(&directory.join(".."))?, Sectors::new(start))))
}

/// The devices that have this one in their table, from its load on (`Documentation/ABI/stable/sysfs-block`).
///
/// # Errors
/// As readdir(3) and read(2); `InvalidData` for a text that is not the kernel's.
pub fn holders(id: DeviceId) -> io::Result<Vec<DeviceId>> {
    linked(id, "holders")
}

/// The devices that this one has in its table or array; none where the kernel names none, as for a partition.
///
/// # Errors
/// As [`holders`].
pub fn slaves(id: DeviceId) -> io::Result<Vec<DeviceId>> {
    match linked(id, "slaves") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        slaves => slaves,
    }
}

/// The devices that a directory of a device's sysfs directory has links to.
fn linked(id: DeviceId, directory_name: &str) -> io::Result<Vec<DeviceId>> {
    let mut devices = Vec::new();
    for entry in fs::read_dir(directory(id).join(directory_name))? {
        match fs::read_to_string(entry?.path().join("dev")) {
            Ok(number) => devices.push(number.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(devices)
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

    /// The number of the attribute, which no attribute of another device has, also not of one with the same device number
    /// (`fs/kernfs/dir.c: __kernfs_new_node` counts generations).
    ///
    /// # Errors
    /// As fstat(2).
    pub fn inode(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.ino())
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
    ///
    /// # Errors
    /// As open(2).
    pub fn open(id: DeviceId) -> io::Result<Option<Self>> {
        match File::open(directory(id).join("dm/suspended")) {
            Ok(file) => Ok(Some(Self(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => match bytes(id, "dm/name")? {
                None => Ok(None),
                Some(_) => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Whether the device is suspended now. One that is gone counts as suspended: nothing is to be asked of it.
    pub fn is_suspended(&self) -> bool {
        let mut text = [0; 8];
        !matches!(self.0.read_at(&mut text, 0), Ok(count) if text[..count].trim_ascii() == b"0")
    }
}

/// The open `pid` attribute of a device of the kernel's NBD client: the proof of one connection.
///
/// `nbd_start_device` of `drivers/block/nbd.c` adds the attribute, and `nbd_config_put` removes it; only after that can the
/// device be connected anew. The attribute of the next connection is another one, even with the same number in it, and a
/// descriptor of the removed one gives ENODEV from then on.
#[derive(Debug)]
pub struct ConnectionFile(File);

impl ConnectionFile {
    /// Opens the attribute of the connection that a device has now.
    ///
    /// # Errors
    /// `NotFound` when the device is not connected.
    pub fn open(id: DeviceId) -> io::Result<Self> {
        File::open(directory(id).join("pid")).map(Self)
    }

    /// Whether that connection still exists. It may be dead, and a socket of it may have been replaced.
    pub fn exists(&self) -> bool {
        self.0.read_at(&mut [0; 16], 0).is_ok_and(|count| count > 0)
    }
}

/// What was written to a device up to some moment.
///
/// As long as it stays the same no write completes: a write is counted when it ends, or (on kernels before 6.4) when it
/// begins, and is in flight until it ends. The counters only grow. The number in flight can come back, but then another
/// write has begun and was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activity {
    counters: IoCounters,
    in_flight: u64,
}

impl Activity {
    /// The activity now of the device `id`, whose accounting is `stat`.
    ///
    /// # Errors
    /// As [`StatFile::read`] and [`writes_in_flight`].
    pub fn now(id: DeviceId, stat: &StatFile) -> io::Result<Self> {
        // In this order: a write that was counted and has not ended is in flight afterwards.
        let counters = stat.read()?;
        Ok(Self { counters, in_flight: writes_in_flight(id)? })
    }

    /// Whether it is still the same. Where no write was in flight the counters alone are enough.
    ///
    /// # Errors
    /// As [`Activity::now`].
    pub fn lasts(&self, id: DeviceId, stat: &StatFile) -> io::Result<bool> {
        Ok((self.in_flight == 0 || writes_in_flight(id)? == self.in_flight) && stat.read()? == self.counters)
    }

    /// Whether no write was under way.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0
    }
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

    /// A directory of sysfs, made of names and texts.
    fn shown(attributes: &[(&str, &[u8])]) -> tempfile::TempDir {
        let disk = tempfile::tempdir().unwrap();
        fs::create_dir(disk.path().join("part")).unwrap();
        for (name, text) in attributes {
            fs::write(disk.path().join(name), text).unwrap();
        }
        disk
    }

    #[test]
    fn a_device_is_no_partition_only_when_sysfs_shows_it_without_one() {
        let id = |minor| DeviceId { major: 8, minor };
        let whole: [(&str, &[u8]); 4] =
            [("dev", b"8:0\n"), ("part/dev", b"8:1\n"), ("part/partition", b"1\n"), ("part/start", b"2048\n")];
        let look = |disk: &tempfile::TempDir| partition_in(&disk.path().join("part"), id(1));
        assert_eq!(look(&shown(&whole)).unwrap(), Some((id(0), Sectors::new(2048))));
        assert_eq!(partition_in(shown(&whole).path(), id(0)).unwrap(), None);
        for (name, text) in [("part/partition", &b"x\n"[..]), ("part/start", b"-1\n"), ("dev", b"8\n")] {
            let mut wrong = whole;
            wrong.iter_mut().filter(|(known, _)| *known == name).for_each(|(_, known)| *known = text);
            assert!(look(&shown(&wrong)).is_err(), "{name} is {text:?}");
        }
        for missing in ["dev", "part/start"] {
            let rest: Vec<_> = whole.into_iter().filter(|(name, _)| *name != missing).collect();
            assert!(look(&shown(&rest)).is_err(), "without {missing}");
        }
        // Sysfs is not there, shows another device, or cannot be read.
        assert!(look(&shown(&[("dev", b"8:0\n")])).is_err());
        assert!(look(&shown(&[("part/dev", b"8:2\n")])).is_err());
        let disk = shown(&whole[..2]);
        fs::create_dir(disk.path().join("part/partition")).unwrap();
        assert!(look(&disk).is_err());
        assert!(partition_in(&disk.path().join("other"), id(1)).is_err());
    }

    #[test]
    fn the_name_of_a_device_is_found_beside_a_partition_name_of_any_bytes() {
        for (uevent, name) in [
            (&b"MAJOR=8\nDEVNAME=sda1\nDEVTYPE=partition\nPARTNAME=\xfc\n"[..], Some("sda1")),
            (b"PARTNAME=x\nDEVNAME=cciss/c0d0p1\n", Some("cciss/c0d0p1")),
            (b"DEVNAME=../sda\n", None),
            (b"DEVNAME=\n", None),
            (b"DEVNAME=\xff\n", None),
            (b"MAJOR=8\n", None),
        ] {
            assert_eq!(name_in(uevent), name);
        }
    }

    #[test]
    fn one_line_end_belongs_to_the_kernel() {
        for (bytes, expected) in [(&b"a\n"[..], &b"a"[..]), (b"a\n\n", b"a\n"), (b"\xff", b"\xff"), (b"", b"")] {
            assert_eq!(line(bytes.to_vec()), expected);
        }
    }

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
