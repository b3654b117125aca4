//! The descriptors and the memory that a daemon needs. They are checked before the mount, because a daemon that runs out of
//! them fails the reads of its users.

use std::fs::File;
use std::io;

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::SESSION_THREADS;
use crate::sys::memory;
use crate::units::Bytes;

/// Descriptors that must be free: one for each session thread, and some for opening a device with its lower devices.
const DESCRIPTORS: usize = SESSION_THREADS + 24;

/// Memory that each thread may use: a request buffer (16 MiB and a page, fixed by the FUSE library), a stack (2 MiB), and
/// maps and reads. Few pages of it are ever touched.
const MEMORY: Bytes = Bytes::new(20 * MIB);

/// Address space that must be free. The C library also reserves a heap of 64 MiB for each thread, for which it takes 128 MiB
/// for a moment.
const ADDRESS_SPACE: Bytes = Bytes::new(THREADS as u64 * (MEMORY.get() + 64 * MIB) + 64 * MIB);

/// The threads of the session, one that waits for them, and one that waits for signals.
const THREADS: usize = SESSION_THREADS + 2;

const MIB: u64 = 1 << 20;

/// Checks that the limits leave room for a session.
///
/// # Errors
/// A system error that says which limit is too low.
pub fn check() -> Result<()> {
    let system = |what: String| Error::new(ErrorKind::System, what);
    free_descriptors().map_err(|e| {
        system(format!("cannot open {DESCRIPTORS} more files")).because(e).hint("raise the limit (ulimit -n)")
    })?;
    memory::can_reserve(ADDRESS_SPACE).map_err(|e| {
        let needed = ADDRESS_SPACE.get() / MIB;
        system(format!("cannot use {needed} MiB more of address space")).because(e).hint("raise the limit (ulimit -v)")
    })?;
    memory::can_commit(THREADS, MEMORY).map_err(|e| {
        system(format!("cannot use {} MiB more of memory", THREADS as u64 * MEMORY.get() / MIB)).because(e)
    })
}

/// Checks for free descriptors by opening [`DESCRIPTORS`] of them at once.
fn free_descriptors() -> io::Result<()> {
    let first = File::open("/dev/null")?;
    let others: Vec<_> = (1..DESCRIPTORS).map(|_| first.try_clone()).collect::<io::Result<_>>()?;
    drop(others);
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_machine_has_enough() {
        super::check().unwrap();
    }
}
