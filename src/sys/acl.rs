//! Whether a file has a POSIX access control list.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

/// The extended attribute that holds the list (`XATTR_NAME_POSIX_ACL_ACCESS` of `include/uapi/linux/xattr.h`).
const ACCESS: &std::ffi::CStr = c"system.posix_acl_access";

/// Whether `path` has an access control list. If so, its permission bits do not determine who has access: the bits of the
/// group then are the mask of the list. Returns `true` if it is not known.
pub fn has_acl(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return true };
    // SAFETY: both strings are NUL-terminated and live longer than the call. With a size of 0 the kernel writes nothing and
    // returns the length of the attribute.
    if unsafe { libc::getxattr(path.as_ptr(), ACCESS.as_ptr(), ptr::null_mut(), 0) } >= 0 {
        return true;
    }
    !matches!(io::Error::last_os_error().raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_files_have_none() {
        assert!(!has_acl(Path::new("/proc/self/stat")));
        assert!(!has_acl(tempfile::NamedTempFile::new().unwrap().path()));
        assert!(has_acl(Path::new("/nowhere")), "nothing is known of a path that does not exist");
    }
}
