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
    Mapping::new(size, libc::PROT_NONE, libc::MAP_NORESERVE).map(drop)
}

/// Checks that so many pieces of memory may be written at the same time, within the limit of this process, and where the
/// system promises no more than it has (`vm.overcommit_memory`). Nothing of it is touched.
///
/// # Errors
/// ENOMEM when they may not.
pub fn can_commit(pieces: usize, size: Bytes) -> io::Result<()> {
    let pieces = (0..pieces).map(|_| Mapping::new(size, libc::PROT_READ | libc::PROT_WRITE, 0));
    pieces.collect::<io::Result<Vec<_>>>().map(drop)
}

/// Memory that nothing refers to.
struct Mapping {
    start: *mut libc::c_void,
    size: usize,
}

impl Mapping {
    fn new(size: Bytes, access: i32, flags: i32) -> io::Result<Self> {
        let size = usize::try_from(size.get()).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
        // SAFETY: a new private mapping at an address that the kernel chooses touches no memory that is in use.
        let start = unsafe { libc::mmap(ptr::null_mut(), size, access, flags, -1, 0) };
        if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { start, size }) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made, and no reference into it exists.
        unsafe { libc::munmap(self.start, self.size) };
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
