//! What a daemon needs of descriptors and memory, asked for before anything is mounted: once it serves, a missing one
//! would be an error of somebody's read.

use std::fs::File;
use std::io;

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::SESSION_THREADS;
use crate::sys::memory;
use crate::units::Bytes;

/// Descriptors that must be free: one for each session thread, and those for opening one device that stands on others.
const DESCRIPTORS: usize = SESSION_THREADS + 24;

/// Memory that must be free: each thread takes a request buffer (16 MiB and a page, fixed by the FUSE library) and a stack
/// (2 MiB), few pages of which are ever touched; the rest is for maps and reads.
const MEMORY: Bytes = Bytes::new(THREADS * (16 + 2) * MIB + 32 * MIB);

/// Address space that must be free: the C library reserves a heap of 64 MiB for each thread besides.
const ADDRESS_SPACE: Bytes = Bytes::new(MEMORY.get() + THREADS * 64 * MIB + 64 * MIB);

/// The session's threads, the one that waits for them, and the one that waits for signals.
const THREADS: u64 = SESSION_THREADS as u64 + 2;

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
    for (check, size, what) in [
        (memory::can_reserve as fn(Bytes) -> io::Result<()>, ADDRESS_SPACE, "address space"),
        (memory::can_commit, MEMORY, "memory"),
    ] {
        check(size).map_err(|e| {
            system(format!("cannot use {} MiB more of {what}", size.get() / MIB))
                .because(e)
                .hint("raise the limit (ulimit -v)")
        })?;
    }
    Ok(())
}

/// Takes all the descriptors at once, and gives them back.
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
