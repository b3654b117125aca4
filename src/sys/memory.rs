//! The memory of this process.
#![allow(unsafe_code)]

use std::io;
use std::ptr;

use crate::units::Bytes;

/// Checks that `size` more bytes of address space can be used, within the limit of this process (RLIMIT_AS).
///
/// # Errors
/// ENOMEM if they cannot.
pub fn can_reserve(size: Bytes) -> io::Result<()> {
    Mapping::new(size, libc::PROT_NONE, libc::MAP_NORESERVE).map(drop)
}

/// Checks that `pieces` writable mappings of `size` bytes can exist at the same time, within the limit of this process, and
/// within that of the system if it does not overcommit memory (`vm.overcommit_memory`). No page of them is allocated.
///
/// # Errors
/// ENOMEM if they cannot.
pub fn can_commit(pieces: usize, size: Bytes) -> io::Result<()> {
    let pieces = (0..pieces).map(|_| Mapping::new(size, libc::PROT_READ | libc::PROT_WRITE, 0));
    pieces.collect::<io::Result<Vec<_>>>().map(drop)
}

/// An anonymous mapping that is never accessed. It is unmapped when this value is dropped.
struct Mapping {
    start: *mut libc::c_void,
    size: usize,
}

impl Mapping {
    fn new(size: Bytes, access: i32, flags: i32) -> io::Result<Self> {
        let size = usize::try_from(size.get()).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
        // SAFETY: the kernel chooses an unused address for the new private mapping, so that no memory in use is changed.
        let start = unsafe { libc::mmap(ptr::null_mut(), size, access, flags, -1, 0) };
        if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { start, size }) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` made a mapping with this address and length, and there are no references into it.
        unsafe { libc::munmap(self.start, self.size) };
    }
}

/// Returns the unused memory of the allocator to the kernel. It scans the whole heap, so it is worth its time only after
/// large values were dropped.
pub fn give_back() {
    // Other C libraries have no such call, and keep less unused memory.
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) is thread-safe and has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}
