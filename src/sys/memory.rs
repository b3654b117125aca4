//! Memory of this process.
#![allow(unsafe_code)]

use std::io;
use std::ptr;

use crate::units::Bytes;

/// Checks that so much more address space may be used, within the limit of this process (RLIMIT_AS).
///
/// # Errors
/// ENOMEM when it may not.
pub fn can_reserve(size: Bytes) -> io::Result<()> {
    map_and_unmap(size, libc::PROT_NONE, libc::MAP_NORESERVE)
}

/// Checks that so much more memory may be written, within the limit of this process and where the system promises no more
/// than it has (`vm.overcommit_memory`). Nothing of it is touched.
///
/// # Errors
/// ENOMEM when it may not.
pub fn can_commit(size: Bytes) -> io::Result<()> {
    map_and_unmap(size, libc::PROT_READ | libc::PROT_WRITE, 0)
}

fn map_and_unmap(size: Bytes, access: i32, flags: i32) -> io::Result<()> {
    let size = usize::try_from(size.get()).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
    // SAFETY: a new private mapping at an address that the kernel chooses touches no memory that is in use.
    let start = unsafe { libc::mmap(ptr::null_mut(), size, access, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: this is the mapping that was made above, and nothing refers to it.
    match unsafe { libc::munmap(start, size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the memory that the allocator holds and nobody uses back to the kernel. For after large things were dropped:
/// it looks at all of the heap.
pub fn give_back() {
    // Other C libraries have no such call, and keep less.
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
