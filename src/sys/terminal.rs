//! The size of a terminal.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

mod requests {
    nix::ioctl_read_bad!(tiocgwinsz, libc::TIOCGWINSZ, libc::winsize);
}

/// The width of a terminal in characters. `None` for a descriptor that is no terminal, and for a terminal without a size,
/// such as a serial line.
pub fn columns(terminal: &impl AsFd) -> Option<u16> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor stays open during the call, and the kernel writes one `struct winsize` through the pointer.
    unsafe { requests::tiocgwinsz(terminal.as_fd().as_raw_fd(), &raw mut size) }.ok()?;
    Some(size.ws_col).filter(|columns| *columns > 0)
}
