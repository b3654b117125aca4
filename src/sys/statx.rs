//! statx(2), for what the kernel knows of a path without asking anybody.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::device::DeviceId;

/// The type of a file, and the file system that it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// `S_IFDIR` and the like.
    pub file_type: u32,
    /// The file system.
    pub device: DeviceId,
}

/// Whether a link at the end of a path is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// The link itself is meant.
    Own,
    /// What it leads to is meant.
    Follow,
}

/// What is at `path`. A directory on which a file system is mounted is the root of that: its server is not asked, so this
/// waits for none (`AT_STATX_DONT_SYNC`), and nothing is mounted for the sake of it.
///
/// # Errors
/// As statx(2).
pub fn kind(path: &Path, links: Links) -> io::Result<Kind> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let own = if links == Links::Own { libc::AT_SYMLINK_NOFOLLOW } else { 0 };
    let flags = libc::AT_NO_AUTOMOUNT | libc::AT_STATX_DONT_SYNC | own;
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path ends with a zero byte, and the kernel writes one `struct statx` through the pointer.
    if unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_TYPE, stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed memory is a valid `struct statx`, which has only integers, and the kernel filled it.
    let stat = unsafe { stat.assume_init() };
    Ok(Kind {
        file_type: u32::from(stat.stx_mode) & libc::S_IFMT,
        device: DeviceId { major: stat.stx_dev_major, minor: stat.stx_dev_minor },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn kinds_are_those_of_stat() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        symlink(directory.path(), &link).unwrap();
        let device = DeviceId::from_dev(directory.path().metadata().unwrap().dev());
        let expected = |file_type| Kind { file_type, device };
        assert_eq!(kind(&link, Links::Own).unwrap(), expected(libc::S_IFLNK));
        assert_eq!(kind(&link, Links::Follow).unwrap(), expected(libc::S_IFDIR));
        let missing = kind(&directory.path().join("none"), Links::Own).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert!(kind(Path::new("a\0b"), Links::Own).is_err());
    }
}
