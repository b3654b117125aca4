//! The grammar of `-o`: words between commas, as mount(8) and fstab(5) write them.
//!
//! A comma inside double quotes, or after a backslash, belongs to the word; mount(8) hands both on unchanged.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use nix::mount::MsFlags;

use crate::error::{Error, Result};
use crate::mount::words;
use crate::units::Bytes;

/// What `-o` asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Flags of mount(2): always read-only; nosuid, nodev and noexec unless asked otherwise.
    pub flags: MsFlags,
    /// Whether users other than the mount's owner may look inside.
    pub allow_other: bool,
    /// The largest read request that the kernel may send.
    pub max_read: Option<Bytes>,
    /// The owner of every file, instead of the device node's.
    pub uid: Option<u32>,
    /// The group of every file, instead of the device node's.
    pub gid: Option<u32>,
    /// Permission bits that a file keeps at most.
    pub mode: Option<u32>,
    /// Permission bits that a file loses.
    pub umask: Option<u32>,
    /// The memory that maps of devices which are not open may use.
    pub map_cache: Option<Bytes>,
    /// The metadata device or file to read thin mappings from.
    pub thin_metadata: Option<PathBuf>,
    /// The NBD server's URI.
    pub nbd: Option<String>,
    /// Whether a SPEC that does not exist is no failure (fstab(5)).
    pub nofail: bool,
    /// Whether reads bypass the page cache of the mount.
    pub direct_io: bool,
    /// What the user should know although the mount goes on, each a line.
    pub warnings: Vec<String>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            flags: MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            allow_other: false,
            max_read: None,
            uid: None,
            gid: None,
            mode: None,
            umask: None,
            map_cache: None,
            thin_metadata: None,
            nbd: None,
            nofail: false,
            direct_io: false,
            warnings: Vec::new(),
        }
    }
}

/// What an unknown word does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// It is an error.
    Refused,
    /// It is a warning, mount(8)'s `-s`.
    Tolerated,
}

/// Parses the list of words after `-o`.
///
/// # Errors
/// A usage error names the word that is unknown, refused, or has a wrong value.
pub fn parse(list: &OsStr, unknown: Unknown) -> Result<MountOptions> {
    let mut options = MountOptions::default();
    for (position, word) in split(list.as_bytes())?.iter().enumerate() {
        if let Err(error) = options.apply(position, word) {
            match (error, unknown) {
                (Fault::Wrong(error), _) | (Fault::Unknown(error), Unknown::Refused) => return Err(error),
                (Fault::Unknown(error), Unknown::Tolerated) => options.warnings.push(format!("{error}, ignored")),
            }
        }
    }
    Ok(options)
}

/// Why a word cannot be used.
enum Fault {
    Unknown(Error),
    Wrong(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Wrong(error)
    }
}

impl MountOptions {
    fn apply(&mut self, position: usize, word: &[u8]) -> std::result::Result<(), Fault> {
        let (name, value) = match word.iter().position(|byte| *byte == b'=') {
            Some(at) => (&word[..at], Some(&word[at + 1..])),
            None => (word, None),
        };
        let name = String::from_utf8_lossy(name);
        let name = name.as_ref();
        if name.starts_with("x-") || name.starts_with("X-") {
            return Ok(());
        }
        match value {
            None => self.apply_plain(position, name),
            Some(_) if words::IGNORED_WITH_VALUE.contains(&name) => Ok(()),
            Some(value) => self.apply_value(name, value),
        }
    }

    fn apply_plain(&mut self, position: usize, name: &str) -> std::result::Result<(), Fault> {
        if let Some((_, set, clear)) = words::FLAGS.iter().find(|flag| flag.0 == name) {
            self.flags = (self.flags | *set).difference(*clear);
            // mount(8) puts rw first on its own when nobody asked for ro.
            if name == "rw" && position != 0 {
                self.warnings.push("the file system is read-only, rw is ignored".to_owned());
            }
            return Ok(());
        }
        if let Some((_, reason)) = words::REFUSED.iter().find(|refused| refused.0 == name) {
            return Err(Fault::Wrong(Error::usage(format!("option '{name}' is not possible: {reason}"))));
        }
        match name {
            "allow_other" | "allow-other" => self.allow_other = true,
            "direct_io" => self.direct_io = true,
            "nofail" => self.nofail = true,
            _ if words::IGNORED.contains(&name) => {}
            _ if words::WITH_VALUE.contains(&name) => {
                return Err(Fault::Wrong(Error::usage(format!("option '{name}' needs a value: {name}=..."))));
            }
            _ => return Err(Fault::Unknown(unknown_word(name))),
        }
        Ok(())
    }

    fn apply_value(&mut self, name: &str, value: &[u8]) -> std::result::Result<(), Fault> {
        let text = std::str::from_utf8(value).ok();
        let wrong = |expected: &str| {
            let value = String::from_utf8_lossy(value);
            Fault::Wrong(Error::usage(format!("option '{name}={value}': expected {expected}")))
        };
        let number = |radix, most, expected| match text.map(|text| u32::from_str_radix(text, radix)) {
            // from_str_radix takes a sign, which no mount option has.
            Some(Ok(number)) if number <= most && value.first() != Some(&b'+') => Ok(Some(number)),
            _ => Err(wrong(expected)),
        };
        let size = |most| match text.and_then(parse_size) {
            Some(size) if size <= most => Ok(Some(size)),
            _ => Err(wrong("a size such as 65536, 64K, 16M or 1G")),
        };
        let not_empty = |expected| if value.is_empty() { Err(wrong(expected)) } else { Ok(()) };
        match name {
            // The largest id means "no id" to the kernel.
            "uid" => self.uid = number(10, u32::MAX - 1, "a user's number")?,
            "gid" => self.gid = number(10, u32::MAX - 1, "a group's number")?,
            "mode" => self.mode = number(8, 0o777, "octal permission bits such as 0440")?,
            "umask" => self.umask = number(8, 0o777, "octal permission bits such as 0027")?,
            "max_read" => self.max_read = size(Bytes::new(u64::from(u32::MAX)))?,
            "map_cache" => self.map_cache = size(Bytes::MAX)?,
            "thin_metadata" => {
                not_empty("a device or a file")?;
                self.thin_metadata = Some(OsString::from_vec(value.to_vec()).into());
            }
            "nbd" => {
                not_empty("an NBD URI")?;
                self.nbd = Some(text.ok_or_else(|| wrong("an NBD URI"))?.to_owned());
            }
            _ => return Err(Fault::Unknown(unknown_word(name))),
        }
        Ok(())
    }
}

fn unknown_word(name: &str) -> Error {
    let error = Error::usage(format!("unknown option '{name}'"));
    match words::near(name).as_slice() {
        [] => error,
        near => error.hint(format!("did you mean {}?", near.join(" or "))),
    }
}

/// Parses a size: a decimal number with at most one suffix K, M, G or T, which are powers of 1024. `None` when it is
/// something else or does not fit.
pub fn parse_size(text: &str) -> Option<Bytes> {
    let shift = match text.as_bytes().last()? {
        b'k' | b'K' => 10,
        b'm' | b'M' => 20,
        b'g' | b'G' => 30,
        b't' | b'T' => 40,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift).map(Bytes::new)
}

/// Splits at the commas that are neither quoted nor after a backslash, and takes the quoting away.
fn split(list: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut words = Vec::new();
    let mut word = Vec::new();
    let mut quoted = false;
    let mut bytes = list.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => match bytes.next_if(|next| matches!(next, b',' | b'"' | b'\\')) {
                Some(escaped) => word.push(escaped),
                None => word.push(byte),
            },
            b'"' => quoted = !quoted,
            b',' if !quoted => words.push(std::mem::take(&mut word)),
            _ => word.push(byte),
        }
    }
    if quoted {
        return Err(Error::usage("a quote in the options is not closed"));
    }
    words.push(word);
    Ok(words)
}

#[cfg(test)]
mod tests;
