//! One error for the whole program: what was tried, on what, and why it failed.
//!
//! A message is one line, `PATH: cannot DO: REASON`, with an optional hint on a second line. The two decisions that
//! depend on an error, the errno that a FUSE client sees and the exit code that mount(8) passes on, are one `match` each.

use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What sort of failure it is; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Wrong words on the command line, or a permission that the caller lacks.
    Usage,
    /// The system refused something that should work: fork, memory, /dev/fuse.
    System,
    /// A fault of this program.
    Internal,
    /// A signal ended the work.
    Interrupted,
    /// The thing asked for could not be mounted, opened or read.
    Failed,
}

/// The result of what can fail with an [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// A failure: `path: message: source`, and perhaps a hint.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    path: Option<PathBuf>,
    message: String,
    source: Option<io::Error>,
    hint: Option<String>,
    reply: Option<i32>,
}

impl Error {
    /// A failure described by `message`, such as `cannot open`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, path: None, message: message.into(), source: None, hint: None, reply: None }
    }

    /// A failure of the thing asked for.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    /// Wrong words on the command line.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// Names the device or file that it was tried on.
    #[must_use]
    pub fn on(mut self, path: impl AsRef<Path>) -> Self {
        self.path = Some(path.as_ref().to_owned());
        self
    }

    /// Gives the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<io::Error>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Adds what the user can do, printed on a line of its own.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Has a FUSE client see this errno, and not the cause's own.
    #[must_use]
    pub fn seen_as(mut self, errno: i32) -> Self {
        self.reply = Some(errno);
        self
    }

    /// The sort of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What the user can do, if anything is known.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The errno for a FUSE reply: that of [`Error::seen_as`], else the cause's own where the kernel gave one, else EIO. Never zero, and never ENXIO or
    /// ENOSYS, which mean "no more data" and "no lseek at all" to a client (semantics: an error must not end a copy).
    pub fn errno(&self) -> i32 {
        match self.reply.or_else(|| self.source.as_ref().and_then(io::Error::raw_os_error)) {
            Some(0 | libc::ENXIO | libc::ENOSYS) | None => libc::EIO,
            Some(errno) => errno,
        }
    }

    /// The exit code, as mount(8) lists them.
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

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", shown(path))?;
        }
        f.write_str(&self.message)?;
        match &self.source {
            Some(source) => write!(f, ": {}", plain(source)),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}

/// A path or name in a message: one line of text whatever bytes it has. Those that are not text, and control characters,
/// are written as escapes.
pub fn shown(name: &(impl AsRef<OsStr> + ?Sized)) -> Shown<'_> {
    Shown(name.as_ref())
}

/// See [`shown`].
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

/// The text of an I/O error without the ` (os error N)` that users of mount(8) never see.
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
        }
        assert_eq!(Error::failed("x").errno(), libc::EIO);
    }
}
