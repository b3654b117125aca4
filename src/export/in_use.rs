//! Who uses a block device, for the message of an open that fails with EBUSY.
//!
//! The kernel shows devices above it, mounted file systems, and swap. A program that holds the device with `O_EXCL` is not shown.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::Export;
use crate::error::{Error, shown};
use crate::sys::device::DeviceId;
use crate::sys::sysfs;

/// The error of an open for writing that failed: with the users of a device that is in use, where the kernel shows them.
pub fn open_error(export: &dyn Export, cause: std::io::Error) -> Error {
    let users = match (cause.raw_os_error(), export.device()) {
        (Some(libc::EBUSY), Some(device)) => users(device.id),
        _ => Vec::new(),
    };
    let errno = cause.raw_os_error().or((cause.kind() == std::io::ErrorKind::PermissionDenied).then_some(libc::EACCES));
    let what = match &users[..] {
        [] => "cannot open for writing".to_owned(),
        users => format!("cannot open for writing: in use by {}", users.join(", ")),
    };
    Error::failed(what).on(export.name()).because(cause).with_errno(errno.unwrap_or(libc::EIO))
}

/// The users of a device, of its partitions, and of the disk that it is a partition of: each of these claims the others too
/// (`bd_may_claim` of `block/bdev.c`).
fn users(id: DeviceId) -> Vec<String> {
    let read = |path: &str| fs::read(path).unwrap_or_default();
    let (mounts, swaps) = (read("/proc/self/mountinfo"), read("/proc/swaps"));
    let mut users = Vec::new();
    for id in related(id) {
        users.extend(sysfs::holders(id).unwrap_or_default().into_iter().map(name));
        let mounted = mounts.split(|byte| *byte == b'\n').filter_map(mount);
        let here = mounted.filter(|mount| mount.device == id || device_at(&mount.source) == Some(id));
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

/// A line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    device: DeviceId,
    point: PathBuf,
    /// Btrfs has a device number of its own: there only this names the device.
    source: PathBuf,
}

fn mount(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|byte| *byte == b' ');
    let device = str::from_utf8(words.nth(2)?).ok()?.parse().ok()?;
    let point = unescaped(words.nth(1)?);
    let source = unescaped(words.skip_while(|word| *word != b"-").nth(2)?);
    Some(Mount { device, point, source })
}

/// The path in a line of `/proc/swaps`; `None` for the headings.
fn swap(line: &[u8]) -> Option<PathBuf> {
    line.starts_with(b"/").then(|| unescaped(line.split(|byte| byte.is_ascii_whitespace()).next().unwrap_or_default()))
}

/// A path without the escapes of the kernel, such as `\040` for a space (`mangle_path` of `fs/seq_file.c`).
fn unescaped(word: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = word;
    while let Some((&first, others)) = rest.split_first() {
        let octal = (first == b'\\').then(|| others.get(..3)).flatten();
        let value = octal.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(value.unwrap_or(first));
        rest = if value.is_some() { &others[3..] } else { others };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc() {
        let line = b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root\\134x rw,errors=continue";
        let found = mount(line).unwrap();
        assert_eq!(found.device, DeviceId { major: 98, minor: 0 });
        assert_eq!((found.point, found.source), ("/mnt 2".into(), "/dev/root\\x".into()));
        for line in
            [&b""[..], b"36", b"36 35 x /a /b - ext3 /dev/root rw", b"36 35 98:0 /a /b rw - ext3", b"1 1 1:1 / / rw"]
        {
            assert_eq!(mount(line), None);
        }
        assert_eq!(swap(b"/dev/dm-1                               partition\t123\t0\t-2"), Some("/dev/dm-1".into()));
        assert_eq!(swap(b"Filename\t\t\t\tType\t\tSize"), None);
        assert_eq!(unescaped(b"\\"), PathBuf::from("\\"));
        assert_eq!(unescaped(b"\\999a"), PathBuf::from("\\999a"));
    }
}
