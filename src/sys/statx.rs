//! statx(2) without requests to the server of a network file system.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::device::DeviceId;

/// The type of the file at a path, and its file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathInfo {
    /// `S_IFDIR` or another of the `S_IF` constants of inode(7).
    pub file_type: u32,
    /// The device number of the file system.
    pub device: DeviceId,
}

/// Whether a symbolic link at the end of a path is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// The information is about the link.
    Own,
    /// The information is about the target of the link.
    Follow,
}

/// Information about the file at `path`. For a mount point it is about the root of the mounted file system. The call does not
/// wait for a file server (`AT_STATX_DONT_SYNC`), and does not trigger automounts.
///
/// # Errors
/// As statx(2).
pub fn path_info(path: &Path, links: Links) -> io::Result<PathInfo> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let own = if links == Links::Own { libc::AT_SYMLINK_NOFOLLOW } else { 0 };
    let flags = libc::AT_NO_AUTOMOUNT | libc::AT_STATX_DONT_SYNC | own;
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is NUL-terminated, and the kernel writes one `struct statx` through the pointer.
    if unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_TYPE, stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the memory was zeroed, and a `struct statx` of zeros is valid, as it has only integers.
    let stat = unsafe { stat.assume_init() };
    Ok(PathInfo {
        file_type: u32::from(stat.stx_mode) & libc::S_IFMT,
        device: DeviceId { major: stat.stx_dev_major, minor: stat.stx_dev_minor },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn the_information_is_that_of_stat() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        symlink(directory.path(), &link).unwrap();
        let device = DeviceId::from_dev(directory.path().metadata().unwrap().dev());
        let expected = |file_type| PathInfo { file_type, device };
        assert_eq!(path_info(&link, Links::Own).unwrap(), expected(libc::S_IFLNK));
        assert_eq!(path_info(&link, Links::Follow).unwrap(), expected(libc::S_IFDIR));
        let missing = path_info(&directory.path().join("none"), Links::Own).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert!(path_info(Path::new("a\0b"), Links::Own).is_err());
    }
}
