//! Which of the descriptors 0 to 2 were open when this process started.
//!
//! The runtime of Rust opens /dev/null on those that are closed, before `main`. That prevents that a device gets such a number, and
//! hides that output goes nowhere: a user who closed the standard output (`>&-`) would get exit code 0. So they are examined
//! before the runtime starts. What they are open on says nothing: service managers open /dev/null for reading and writing too.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the descriptor 1 was closed.
static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

/// Called by the C library before `main`.
// SAFETY: the section `.init_array` holds pointers to functions that take no arguments which they must read, and return nothing.
// This is one. It may run before the runtime of Rust is ready: it uses none of it.
#[used]
#[unsafe(link_section = ".init_array")]
static EXAMINE: extern "C" fn() = {
    extern "C" fn examine() {
        // SAFETY: F_GETFD takes no third argument, and changes nothing. It fails only for a descriptor that is not open.
        let is_closed = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) } == -1;
        STDOUT_WAS_CLOSED.store(is_closed, Ordering::Relaxed);
    }
    examine
};

/// Whether the standard output was closed when the process started. What is written to it since then is lost.
pub fn stdout_was_closed() -> bool {
    STDOUT_WAS_CLOSED.load(Ordering::Relaxed)
}
