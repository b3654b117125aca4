//! Memory of this process.
#![allow(unsafe_code)]

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
