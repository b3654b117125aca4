//! Device numbers, and opening devices and files.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::sysfs;

/// The number of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId {
    /// The number of the driver.
    pub major: u32,
    /// The number of the device among those of its driver.
    pub minor: u32,
}

impl DeviceId {
    /// Decodes a `dev_t` of the C library, such as `st_rdev` of stat(2).
    pub fn from_dev(dev: libc::dev_t) -> Self {
        Self { major: libc::major(dev), minor: libc::minor(dev) }
    }

    /// Decodes a number that the kernel encoded with `huge_encode_dev` (`include/linux/kdev_t.h`), as in the ioctls of loop
    /// devices and device-mapper.
    pub fn from_huge(dev: u64) -> Self {
        let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or_default();
        Self { major: low((dev >> 8) & 0xfff), minor: low((dev & 0xff) | ((dev >> 12) & 0xf_ff00)) }
    }

    /// Encodes this number like the kernel's `huge_encode_dev`.
    pub fn to_huge(self) -> u64 {
        let (major, minor) = (u64::from(self.major), u64::from(self.minor));
        (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DeviceId {
    type Err = ();

    /// Parses `MAJOR:MINOR`, the format of sysfs and of device-mapper tables.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.split_once(':').ok_or(())?;
        let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
            true => text.parse().map_err(|_| ()),
            false => Err(()),
        };
        Ok(Self { major: number(major)?, minor: number(minor)? })
    }
}

/// Opens a file or device for reading, with `O_DIRECT` if `direct` is set.
///
/// # Errors
/// As open(2).
pub fn open(path: &Path, direct: bool) -> io::Result<File> {
    let direct = if direct { libc::O_DIRECT } else { 0 };
    // O_NONBLOCK, so that the open does not block if there is no medium in a drive, or a FIFO at the path of a device.
    OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY | direct).open(path)
}

/// Opens the file or device of an open descriptor again. The new descriptor has its own file position.
///
/// # Errors
/// As open(2).
pub fn reopen(file: &File) -> io::Result<File> {
    open(&own_path(file), false)
}

/// Opens the file or device of an open descriptor again, with `O_DIRECT`.
///
/// # Errors
/// As open(2): `EINVAL` if the file system does not support direct I/O.
pub fn reopen_direct(file: &File) -> io::Result<File> {
    open(&own_path(file), true)
}

/// Opens the file or device of an open descriptor again, for reading and writing through the page cache.
///
/// # Errors
/// As open(2).
pub fn reopen_writable(file: &File) -> io::Result<File> {
    writable(file, 0)
}

/// Opens the block device of an open descriptor again, for reading and writing, with `O_DIRECT` and exclusively (`O_EXCL` without
/// `O_CREAT`, open(2)).
///
/// # Errors
/// As open(2): `EBUSY` if the device is mounted, or claimed by another user of it.
pub fn reopen_writable_exclusive(file: &File) -> io::Result<File> {
    writable(file, libc::O_DIRECT | libc::O_EXCL)
}

fn writable(file: &File, flags: libc::c_int) -> io::Result<File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY | flags;
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(own_path(file))
}

/// Opens the block device of an open descriptor again, exclusively (`O_EXCL` without `O_CREAT`, open(2)).
///
/// # Errors
/// As open(2): `EBUSY` if the device is mounted, or claimed by another user of it.
pub fn reopen_exclusive(file: &File) -> io::Result<File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_EXCL;
    OpenOptions::new().read(true).custom_flags(flags).open(own_path(file))
}

/// A path of an open file, for this process, that is valid as long as `file` is open. It stays valid if the file is
/// renamed or removed.
pub fn own_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Opens the block device `id` for reading by its node in `/dev`, and checks that the node is of that device. Returns the
/// path of the node too.
///
/// # Errors
/// As open(2), and `NotFound` if no node in `/dev` is of that device.
pub fn open_id(id: DeviceId, direct: bool) -> io::Result<(File, PathBuf)> {
    let mut refused = None;
    for path in nodes(id) {
        match open(&path, direct) {
            Ok(file) if is_device(&file, id)? => return Ok((file, path)),
            Ok(_) => {}
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no node in /dev for {id}"))))
}

/// The paths at which the node of a device can be: the kernel's name of it, then its name in `/dev/mapper`.
fn nodes(id: DeviceId) -> impl Iterator<Item = PathBuf> {
    let kernel = sysfs::kernel_name(id).map(|name| Path::new("/dev").join(name));
    let mapper = sysfs::mapper_name(id).map(|name| Path::new("/dev/mapper").join(name));
    kernel.into_iter().chain(mapper)
}

/// The path in `/dev/mapper` of a device-mapper device, by which mount(8) calls it. `None` for other paths, and if that node is not
/// there.
pub fn mapper_path(device: &Path) -> Option<PathBuf> {
    let id = |path: &Path| {
        let metadata = path.metadata().ok().filter(|metadata| metadata.file_type().is_block_device())?;
        Some(DeviceId::from_dev(metadata.rdev()))
    };
    let device = id(device)?;
    let path = Path::new("/dev/mapper").join(sysfs::mapper_name(device)?);
    (id(&path) == Some(device)).then_some(path)
}

/// Whether an open file is the block device `id`.
fn is_device(file: &File, id: DeviceId) -> io::Result<bool> {
    let metadata = file.metadata()?;
    Ok(metadata.file_type().is_block_device() && DeviceId::from_dev(metadata.rdev()) == id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_whole_or_not_at_all() {
        assert_eq!("254:0".parse(), Ok(DeviceId { major: 254, minor: 0 }));
        assert_eq!("7:1048575".parse(), Ok(DeviceId { major: 7, minor: 1_048_575 }));
        for text in ["", ":", "1", "1:", ":1", "+1:2", "1:-2", "1:2:3", "1:2 ", "99999999999:0"] {
            assert_eq!(text.parse::<DeviceId>(), Err(()), "{text:?}");
        }
    }

    #[test]
    fn huge_numbers_go_there_and_back() {
        assert_eq!(DeviceId::from_huge(0xfe00), DeviceId { major: 254, minor: 0 });
        for (major, minor) in [(0, 0), (7, 255), (7, 256), (253, 1_048_575), (4095, 70_000)] {
            let id = DeviceId { major, minor };
            assert_eq!(DeviceId::from_huge(id.to_huge()), id);
        }
    }
}
