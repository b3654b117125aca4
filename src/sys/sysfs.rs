//! Attributes of block devices in sysfs.

mod counters;

pub use counters::{Activity, IoCounters, StatFile, parse_stat, writes_in_flight};

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::device::DeviceId;
use crate::units::{Bytes, Sectors};

/// The sysfs directory of a block device.
pub fn directory(id: DeviceId) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{id}"))
}

/// The contents of an attribute of a block device, without the newline at the end. `None` if the device has no such attribute.
///
/// `None` is returned only if sysfs has a directory of this very device, without the attribute in it.
///
/// # Errors
/// As read(2), and if sysfs has no directory of the device, or one of another device.
pub fn bytes(id: DeviceId, name: &str) -> io::Result<Option<Vec<u8>>> {
    bytes_in(&directory(id), id, name)
}

fn bytes_in(directory: &Path, id: DeviceId, name: &str) -> io::Result<Option<Vec<u8>>> {
    match fs::read(directory.join(name)) {
        Ok(bytes) => Ok(Some(line(bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match device_in(directory)? {
            shown if shown == id => Ok(None),
            shown => Err(io::Error::other(format!("sysfs has {shown} in the directory of {id}"))),
        },
        Err(error) => Err(error),
    }
}

/// Removes the newline that the kernel appends to a value. The value itself can end with another one.
fn line(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.pop_if(|last| *last == b'\n');
    bytes
}

/// The number of the device that has this directory in sysfs.
fn device_in(directory: &Path) -> io::Result<DeviceId> {
    let number = fs::read_to_string(directory.join("dev"))?;
    number.trim().parse().map_err(|()| io::ErrorKind::InvalidData.into())
}

/// The value of an attribute as text. `None` if the device has no such attribute, or if it cannot be read.
pub fn attribute(id: DeviceId, name: &str) -> Option<String> {
    bytes(id, name).ok().flatten().and_then(|bytes| String::from_utf8(bytes).ok())
}

/// The value of an attribute as a decimal number. `None` as for [`attribute`], and if it is not a number.
pub fn number(id: DeviceId, name: &str) -> Option<u64> {
    attribute(id, name)?.trim().parse().ok()
}

/// The kernel's name of a device, which is the path of its node in `/dev`.
pub fn kernel_name(id: DeviceId) -> Option<String> {
    name_in(&bytes(id, "uevent").ok().flatten()?).map(ToOwned::to_owned)
}

/// The device name in a `uevent` attribute. The attribute need not be UTF-8: it can include the name of a partition, with any
/// bytes.
pub fn name_in(uevent: &[u8]) -> Option<&str> {
    let name = uevent.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"DEVNAME="))?;
    let name = str::from_utf8(name).ok()?;
    // The name is used as a path, which must not lead out of `/dev`.
    (!name.is_empty() && !name.split('/').any(|part| part.is_empty() || part == "..")).then_some(name)
}

/// The name of a device-mapper device. `None` for other devices, and if the name is not UTF-8.
pub fn dm_name(id: DeviceId) -> Option<String> {
    mapper_name(id)?.into_string().ok()
}

/// The name of a device-mapper device, which is the name of its node in `/dev/mapper`. `None` for other devices.
pub fn mapper_name(id: DeviceId) -> Option<OsString> {
    let name = OsString::from_vec(bytes(id, "dm/name").ok().flatten()?);
    // The name is used as a path, which must not lead out of `/dev/mapper`.
    let is_name = !name.is_empty() && !name.as_bytes().contains(&b'/') && name != "..";
    is_name.then_some(name)
}

/// The length of a block device, which need not be open.
pub fn len(id: DeviceId) -> Option<Bytes> {
    Sectors::new(number(id, "size")?).bytes()
}

/// The disk of a partition, and the start of the partition on it. `None` if the device is not a partition.
///
/// # Errors
/// As read(2), and `InvalidData` for a value of an unknown format. In doubt the result is an error and not `None`: if a
/// partition were treated as a whole disk, holes would be reported at wrong positions.
pub fn partition(id: DeviceId) -> io::Result<Option<(DeviceId, Sectors)>> {
    partition_in(&directory(id), id)
}

/// The disk and the start of the partition `id`, whose directory in sysfs is `directory`. `None` for a device that is no
/// partition.
///
/// # Errors
/// As read(2), and when an attribute is no number or belongs to another device.
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

/// The devices that use this one, from the load of their table on (`Documentation/ABI/stable/sysfs-block`).
///
/// # Errors
/// As readdir(3) and read(2), and `InvalidData` for a value of an unknown format.
pub fn holders(id: DeviceId) -> io::Result<Vec<DeviceId>> {
    linked(id, "holders")
}

/// The devices that this one uses in its table or array. Empty for a device without a directory `slaves`, such as a partition.
///
/// # Errors
/// As [`holders`].
pub fn slaves(id: DeviceId) -> io::Result<Vec<DeviceId>> {
    match linked(id, "slaves") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        slaves => slaves,
    }
}

/// What is known of a device by more than its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation {
    /// The inode number of the attribute `stat`, which no other device has: also none that gets its number later (see
    /// [`StatFile::inode`]).
    pub inode: u64,
    /// The disk sequence number of a device below. `None` for the device itself, partitions, and before Linux 5.15.
    pub disk_sequence: Option<u64>,
}

/// A device and all devices below it. Those below a loop device or a partition are not in the list.
///
/// # Errors
/// As stat(2) and [`slaves`], and `OutOfMemory` for more than 4096 devices.
pub fn incarnations(device: DeviceId) -> io::Result<BTreeMap<DeviceId, Incarnation>> {
    const MOST: usize = 4096;
    let (mut found, mut next) = (BTreeMap::new(), vec![device]);
    while let Some(id) = next.pop() {
        if let Entry::Vacant(entry) = found.entry(id) {
            let inode = StatFile::open(id)?.inode()?;
            let disk_sequence = if id == device { None } else { number(id, "diskseq") };
            entry.insert(Incarnation { inode, disk_sequence });
            next.extend(slaves(id)?);
        }
        if found.len() > MOST {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
    }
    Ok(found)
}

/// The devices to which there are links in a subdirectory of a device's sysfs directory.
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

/// The open attribute `dm/suspended` of a device-mapper device.
#[derive(Debug)]
pub struct SuspendFile(File);

impl SuspendFile {
    /// Opens the attribute. `None` if the device is not a device-mapper device.
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

    /// Whether the device is suspended now. A device that was removed counts as suspended, so that it is not queried.
    pub fn is_suspended(&self) -> bool {
        let mut text = [0; 8];
        !matches!(self.0.read_at(&mut text, 0), Ok(count) if text[..count].trim_ascii() == b"0")
    }
}

/// The open attribute `pid` of an NBD device. While it can be read, the device has the same connection.
///
/// `nbd_start_device` of `drivers/block/nbd.c` adds the attribute, and `nbd_config_put` removes it. The device cannot be
/// connected again before that. The next connection has a new attribute, even if its value is the same, and a read from a
/// descriptor of the removed attribute fails with ENODEV.
#[derive(Debug)]
pub struct ConnectionFile(File);

impl ConnectionFile {
    /// Opens the attribute of the current connection of a device.
    ///
    /// # Errors
    /// As open(2), with `NotFound` if the device is not connected.
    pub fn open(id: DeviceId) -> io::Result<Self> {
        File::open(directory(id).join("pid")).map(Self)
    }

    /// Whether the device still has the same connection. The server may be unreachable, and a socket of the connection may
    /// have been replaced.
    pub fn exists(&self) -> bool {
        self.0.read_at(&mut [0; 16], 0).is_ok_and(|count| count > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory like one of sysfs, with the given names and contents.
    fn sysfs_with(attributes: &[(&str, &[u8])]) -> tempfile::TempDir {
        let disk = tempfile::tempdir().unwrap();
        fs::create_dir(disk.path().join("part")).unwrap();
        for (name, text) in attributes {
            fs::write(disk.path().join(name), text).unwrap();
        }
        disk
    }

    #[test]
    fn a_device_is_no_partition_only_if_its_directory_has_no_such_attribute() {
        let id = |minor| DeviceId { major: 8, minor };
        let whole: [(&str, &[u8]); 4] =
            [("dev", b"8:0\n"), ("part/dev", b"8:1\n"), ("part/partition", b"1\n"), ("part/start", b"2048\n")];
        let partition = |disk: &tempfile::TempDir| partition_in(&disk.path().join("part"), id(1));
        assert_eq!(partition(&sysfs_with(&whole)).unwrap(), Some((id(0), Sectors::new(2048))));
        assert_eq!(partition_in(sysfs_with(&whole).path(), id(0)).unwrap(), None);
        for (name, text) in [("part/partition", &b"x\n"[..]), ("part/start", b"-1\n"), ("dev", b"8\n")] {
            let mut wrong = whole;
            wrong.iter_mut().filter(|(known, _)| *known == name).for_each(|(_, known)| *known = text);
            assert!(partition(&sysfs_with(&wrong)).is_err(), "{name} is {text:?}");
        }
        for missing in ["dev", "part/start"] {
            let rest: Vec<_> = whole.into_iter().filter(|(name, _)| *name != missing).collect();
            assert!(partition(&sysfs_with(&rest)).is_err(), "without {missing}");
        }
        // The directory of the device is missing, is of another device, or has an attribute that cannot be read.
        assert!(partition(&sysfs_with(&[("dev", b"8:0\n")])).is_err());
        assert!(partition(&sysfs_with(&[("part/dev", b"8:2\n")])).is_err());
        let disk = sysfs_with(&whole[..2]);
        fs::create_dir(disk.path().join("part/partition")).unwrap();
        assert!(partition(&disk).is_err());
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
    fn only_the_newline_of_the_kernel_is_removed() {
        for (bytes, expected) in [(&b"a\n"[..], &b"a"[..]), (b"a\n\n", b"a\n"), (b"\xff", b"\xff"), (b"", b"")] {
            assert_eq!(line(bytes.to_vec()), expected);
        }
    }
}
