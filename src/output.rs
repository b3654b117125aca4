//! The standard output and the standard error of the commands.

use std::fmt::Display;
use std::io::{self, Write};

use crate::error::{Error, Result};
use crate::sys::stdio;

/// The standard output, without a buffer. Unlike [`io::Stdout`], it does not take EBADF for success: output that is lost because
/// the descriptor was closed at the start of the program, or cannot be written, is an error.
pub struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if stdio::stdout_was_closed() {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        Ok(nix::unistd::write(io::stdout(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Prints `text` to the standard output.
///
/// # Errors
/// As [`written`].
pub fn print(text: &str) -> Result<()> {
    written(Stdout.write_all(text.as_bytes()))
}

/// Prints a line to the standard error. A failure is ignored: there is no place left that could show it.
pub fn say(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Turns a failed write to the standard output into an error. A pipe whose reader has exited, as `head` does, is no error.
///
/// # Errors
/// When what was to be printed is lost.
pub fn written(result: io::Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::failed("cannot write the output").because(error))
        }
        _ => Ok(()),
    }
}
