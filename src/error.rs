//! The error type of the whole program: what was tried, on which device or file, and why it failed.
//!
//! A message is one line, `PATH: cannot DO: REASON`. A hint, if there is one, is printed on a second line. An error also
//! determines the errno of a FUSE reply ([`Error::errno`]), the level of its line in the log ([`Error::level`]) and the
//! exit code that mount(8) passes on ([`Error::exit_code`]).

use std::error::Error as StdError;
use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use log::Level;

/// The category of a failure, which determines the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// An invalid command line, or a missing permission of the caller.
    Usage,
    /// The system refused something that should work: fork, memory, /dev/fuse.
    System,
    /// A bug of this program.
    Internal,
    /// A signal ended the work.
    Interrupted,
    /// A device, image or mount point could not be mounted, opened or read.
    Failed,
}

/// A result whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// The boxed cause of an [`Error`].
type Cause = Box<dyn StdError + Send + Sync>;

/// A failure with the text `PATH: MESSAGE: CAUSE` and an optional hint.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    path: Option<PathBuf>,
    message: String,
    cause: Option<Cause>,
    hint: Option<String>,
    reply: Option<i32>,
}

impl Error {
    /// An error described by `message`, such as `cannot open`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, path: None, message: message.into(), cause: None, hint: None, reply: None }
    }

    /// An error of the kind [`ErrorKind::Failed`].
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    /// An error of the kind [`ErrorKind::Usage`].
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// The refusal of a request with `errno`. Its message is the text that the system has for `errno`.
    pub fn from_errno(errno: i32) -> Self {
        Self::failed(plain(&io::Error::from_raw_os_error(errno))).with_errno(errno)
    }

    /// Adds the device or file on which the operation was tried.
    #[must_use]
    pub fn on(mut self, path: impl AsRef<Path>) -> Self {
        self.path = Some(path.as_ref().to_owned());
        self
    }

    /// Adds the cause. [`Error::errno`] returns the errno of a cause that is an [`io::Error`], a [`nix::errno::Errno`] or
    /// an [`Error`].
    #[must_use]
    pub fn because(mut self, cause: impl Into<Cause>) -> Self {
        // The text of `Errno` begins with the constant's name. Users see the text of `io::Error`, without the name.
        self.cause = Some(match cause.into().downcast::<nix::errno::Errno>() {
            Ok(errno) => io::Error::from(*errno).into(),
            Err(other) => other,
        });
        self
    }

    /// Adds advice for the user, which is printed on a line of its own.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Sets the errno of the FUSE reply, which then replaces that of the cause.
    #[must_use]
    pub fn with_errno(mut self, errno: i32) -> Self {
        self.reply = Some(errno);
        self
    }

    /// The category of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The advice that [`Error::hint`] added.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The errno of the FUSE reply: the one that [`Error::with_errno`] set, else that of the cause, else EIO.
    ///
    /// It is never zero, ENXIO or ENOSYS. The FUSE client takes ENXIO of an lseek for "no data from here on", and after
    /// ENOSYS the kernel sends no more requests of that type. Either would make a copy skip data.
    pub fn errno(&self) -> i32 {
        match self.reply.or_else(|| self.cause.as_deref().and_then(errno_of)) {
            Some(0 | libc::ENXIO | libc::ENOSYS) | None => libc::EIO,
            Some(errno) => errno,
        }
    }

    /// The level at which a failed request is logged: debug for the refusals that occur in normal use (a name that does not
    /// exist or is to be looked up again, opening for writing, opening a directory as a file, a kind of fallocate(2) that does not
    /// exist), warn for all others.
    pub fn level(&self) -> Level {
        match self.errno() {
            libc::ENOENT | libc::EROFS | libc::EISDIR | libc::ESTALE | libc::EOPNOTSUPP => Level::Debug,
            _ => Level::Warn,
        }
    }

    /// The exit code, from the list in mount(8).
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            ErrorKind::Usage => 1,
            ErrorKind::System => 2,
            ErrorKind::Internal => 4,
            ErrorKind::Interrupted => 8,
            ErrorKind::Failed => 32,
        }
    }
}

/// The errno that a cause carries.
fn errno_of(cause: &(dyn StdError + Send + Sync + 'static)) -> Option<i32> {
    match cause.downcast_ref::<io::Error>() {
        Some(error) => error.raw_os_error(),
        None => cause.downcast_ref::<Error>().map(Error::errno),
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", shown(path))?;
        }
        f.write_str(&self.message)?;
        let Some(cause) = &self.cause else { return Ok(()) };
        match cause.downcast_ref::<io::Error>() {
            Some(error) => write!(f, ": {}", plain(error)),
            None => write!(f, ": {cause}"),
        }
    }
}

impl StdError for Error {
    /// The source of the cause. The cause itself is part of this error's own text, so that a report which prints an error
    /// and its sources names it once.
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause.as_ref().and_then(|cause| cause.source())
    }
}

/// Formats a path or name for a message, as one line of text whatever bytes it has: control characters and bytes that are
/// not UTF-8 are written as escapes.
pub fn shown(name: &(impl AsRef<OsStr> + ?Sized)) -> Shown<'_> {
    Shown(name.as_ref())
}

/// The return type of [`shown`].
pub struct Shown<'a>(&'a OsStr);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.as_bytes().utf8_chunks() {
            for character in chunk.valid().chars() {
                match character.is_control() {
                    true => write!(f, "{}", character.escape_default())?,
                    false => f.write_char(character)?,
                }
            }
            chunk.invalid().iter().try_for_each(|byte| write!(f, "\\x{byte:02x}"))?;
        }
        Ok(())
    }
}

/// The text of an I/O error without the suffix ` (os error N)`, which other programs do not print.
pub fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_what_on_what_and_why() {
        let error = Error::failed("cannot open").on("/dev/vg/lv").because(io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(error.to_string(), "/dev/vg/lv: cannot open: Permission denied");
        assert_eq!(error.exit_code(), 32);
        assert_eq!(error.errno(), libc::EACCES);
    }

    #[test]
    fn a_name_of_any_bytes_is_one_line_of_text() {
        for (name, text) in [
            (&b"/dev/vg/lv"[..], "/dev/vg/lv"),
            (b"a b\\c", "a b\\c"),
            ("\u{fc}".as_bytes(), "\u{fc}"),
            (b"\xfc!", "\\xfc!"),
            (b"a\n\x1b[0m", "a\\n\\u{1b}[0m"),
        ] {
            assert_eq!(shown(OsStr::from_bytes(name)).to_string(), text);
            let error = Error::failed("cannot open").on(OsStr::from_bytes(name));
            assert_eq!(error.to_string(), format!("{text}: cannot open"));
        }
    }

    #[test]
    fn errors_never_look_like_the_end_of_the_data() {
        for errno in [0, libc::ENXIO, libc::ENOSYS] {
            let error = Error::failed("x").because(io::Error::from_raw_os_error(errno));
            assert_eq!(error.errno(), libc::EIO);
            assert_eq!(Error::from_errno(errno).errno(), libc::EIO);
            assert_eq!(Error::failed("y").because(error).errno(), libc::EIO);
        }
        assert_eq!(Error::failed("x").errno(), libc::EIO);
        assert_eq!(Error::failed("x").because("a text").errno(), libc::EIO);
    }

    #[test]
    fn the_errno_of_every_type_of_cause_is_found() {
        let denied = || io::Error::from_raw_os_error(libc::EACCES);
        for error in [
            Error::failed("x").because(denied()),
            Error::failed("x").because(nix::errno::Errno::EACCES),
            Error::failed("x").because(Error::from_errno(libc::EACCES)),
            Error::from_errno(libc::EACCES).on("x"),
        ] {
            assert_eq!(error.errno(), libc::EACCES);
            assert_eq!(error.to_string(), "x: Permission denied");
        }
        let nested = Error::failed("cannot mount").because(Error::failed("cannot open").on("/dev/x").because(denied()));
        assert_eq!(nested.errno(), libc::EACCES);
        assert_eq!(nested.to_string(), "cannot mount: /dev/x: cannot open: Permission denied");
        assert!(nested.source().is_none(), "every cause is in the text already");
        assert_eq!(Error::failed("x").because(denied()).with_errno(libc::ENODEV).errno(), libc::ENODEV);
    }

    #[test]
    fn refusals_of_normal_use_are_logged_for_debugging_only() {
        for errno in [libc::ENOENT, libc::EROFS, libc::EISDIR, libc::ESTALE, libc::EOPNOTSUPP] {
            assert_eq!(Error::from_errno(errno).level(), Level::Debug);
        }
        for errno in [libc::EIO, libc::EBADF, libc::EACCES, libc::ENXIO] {
            assert_eq!(Error::from_errno(errno).level(), Level::Warn);
        }
    }
}
