//! POSIX access control lists, as far as it matters here: whether there is one.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

/// Where the kernel keeps the list (`XATTR_NAME_POSIX_ACL_ACCESS` of `include/uapi/linux/xattr.h`).
const ACCESS: &std::ffi::CStr = c"system.posix_acl_access";

/// Whether `path` has an access control list. Its permission bits then do not tell who has access: those of the group
/// are the most that anybody in the list has. Any doubt is `true`.
pub fn has_acl(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return true };
    // SAFETY: both names end with a NUL and outlive the call; without a buffer the kernel tells only the length.
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
        assert!(has_acl(Path::new("/nowhere")), "not known");
    }
}
