//! Who uses a block device or an image, for the message of an open that fails with EBUSY.
//!
//! The kernel shows devices above a device, mounted file systems, and swap. A program that holds it with `O_EXCL` is not shown. An
//! image is in use if a loop device that it is bound to is.

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::Export;
use crate::error::{Error, shown};
use crate::sys::device::{self, DeviceId};
use crate::sys::loopdev::LoopStatus;
use crate::sys::mountinfo::{self, MountEntry, unescape};
use crate::sys::sysfs;

/// The error of an open for writing that failed: with the users of a device that is in use, where the kernel shows them.
pub fn open_error(export: &dyn Export, cause: std::io::Error) -> Error {
    let is_busy = cause.raw_os_error() == Some(libc::EBUSY);
    let users = match (export.device(), export.regular_file()) {
        (Some(device), _) if is_busy => users(device.id),
        (None, Some(file)) if is_busy => {
            used_loop(file).map_or_else(Vec::new, |id| users(id).into_iter().chain([name(id)]).collect())
        }
        _ => Vec::new(),
    };
    let errno = cause.raw_os_error().or((cause.kind() == std::io::ErrorKind::PermissionDenied).then_some(libc::EACCES));
    let what = match &users[..] {
        [] => "cannot open for writing".to_owned(),
        users => format!("cannot open for writing: in use by {}", users.join(", ")),
    };
    Error::failed(what).on(export.name()).because(cause).with_errno(errno.unwrap_or(libc::EIO))
}

/// A loop device that an image is bound to and that is in use: mounted, part of another device, or held with `O_EXCL`. `None` if there
/// is none, or none that this process may open.
pub(super) fn used_loop(image: &File) -> Option<DeviceId> {
    let image = image.metadata().ok()?;
    let devices = fs::read_dir("/sys/block").ok()?.flatten().map(|entry| entry.path());
    let bound = devices.filter(|device| device.join("loop/backing_file").exists());
    let mut numbers =
        bound.filter_map(|device| fs::read_to_string(device.join("dev")).ok()?.trim().parse::<DeviceId>().ok());
    numbers.find(|&id| {
        let Ok((file, _)) = device::open_id(id, false) else { return false };
        let is_bound = LoopStatus::of(&file)
            .is_ok_and(|status| status.inode == image.ino() && status.device == DeviceId::from_dev(image.dev()));
        is_bound && device::reopen_exclusive(&file).is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
    })
}

/// The users of a device, of its partitions, and of the disk that it is a partition of: each of these claims the others too
/// (`bd_may_claim` of `block/bdev.c`).
fn users(id: DeviceId) -> Vec<String> {
    let read = |path: &str| fs::read(path).unwrap_or_default();
    let (mounts, swaps) = (mountinfo::parse(&read("/proc/self/mountinfo")), read("/proc/swaps"));
    let mut users = Vec::new();
    for id in related(id) {
        users.extend(sysfs::holders(id).unwrap_or_default().into_iter().map(name));
        let here = mounts.iter().filter(|mount| mount.device == id || source_device(mount) == Some(id));
        users.extend(here.map(|mount| format!("a file system that is mounted on {}", shown(&mount.point))));
        if swaps.split(|byte| *byte == b'\n').any(|line| swap(line).and_then(|path| device_at(&path)) == Some(id)) {
            users.push("swap".to_owned());
        }
    }
    // One use may be found more than once: a mount by its number and by its source, or several mounts of one place.
    let mut seen = std::collections::HashSet::new();
    users.retain(|user| seen.insert(user.clone()));
    users
}

/// A device, and the disk that it is on or the partitions that it has.
fn related(id: DeviceId) -> Vec<DeviceId> {
    let mut related = vec![id];
    related.extend(sysfs::partition(id).ok().flatten().map(|(disk, _)| disk));
    for entry in fs::read_dir(sysfs::directory(id)).into_iter().flatten().flatten() {
        let number = fs::read_to_string(entry.path().join("dev"));
        if entry.path().join("partition").exists() {
            related.extend(number.ok().and_then(|number| number.trim().parse::<DeviceId>().ok()));
        }
    }
    related
}

/// The name of a device for people.
fn name(id: DeviceId) -> String {
    match (sysfs::mapper_name(id), sysfs::kernel_name(id)) {
        (Some(name), _) => shown(&Path::new("/dev/mapper").join(name)).to_string(),
        (None, Some(name)) => format!("/dev/{name}"),
        (None, None) => id.to_string(),
    }
}

fn device_at(path: &Path) -> Option<DeviceId> {
    let metadata = path.is_absolute().then(|| fs::metadata(path).ok()).flatten()?;
    metadata.file_type().is_block_device().then(|| DeviceId::from_dev(metadata.rdev()))
}

/// The file systems on a device that have a device number of their own.
const NUMBERED: [&str; 2] = ["btrfs", "bcachefs"];

/// The device of a file system whose device number is not that of its device.
fn source_device(mount: &MountEntry) -> Option<DeviceId> {
    let is_numbered = NUMBERED.iter().any(|kind| mount.fs_type == *kind);
    is_numbered.then(|| device_at(Path::new(&mount.source))).flatten()
}

/// The path in a line of `/proc/swaps`; `None` for the headings.
fn swap(line: &[u8]) -> Option<PathBuf> {
    line.starts_with(b"/")
        .then(|| unescape(line.split(|byte| byte.is_ascii_whitespace()).next().unwrap_or_default()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_list_of_swap() {
        assert_eq!(swap(b"/dev/dm-1                               partition\t123\t0\t-2"), Some("/dev/dm-1".into()));
        assert_eq!(swap(b"Filename\t\t\t\tType\t\tSize"), None);
    }
}
