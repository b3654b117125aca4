//! The grammar of `-o`: words between commas, as mount(8) and fstab(5) write them.
//!
//! A comma inside double quotes, or after a backslash, belongs to the word. mount(8) passes quotes and backslashes on
//! unchanged.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::mount::MsFlags;

use crate::error::{Error, Result};
use crate::fs::{Limits, Ownership};
use crate::mount::words;
use crate::qcow2::{ClusterSize, LONGEST_BACKING_NAME};
use crate::source::nbd::Uri;
use crate::spec::{LONGEST_NAME, Older, SourceOptions, ViewOptions, absolute};
use crate::units::Bytes;

/// The options of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Flags of mount(2): read-only unless rw or writable is given, and nosuid, nodev and noexec unless suid, dev or exec is.
    pub flags: MsFlags,
    /// Whether users other than the mount's owner may access it.
    pub allow_other: bool,
    /// The largest read request that the kernel may send, in bytes.
    pub max_read: Option<Bytes>,
    /// The owner of every file, instead of the device node's.
    pub uid: Option<u32>,
    /// The group of every file, instead of the device node's.
    pub gid: Option<u32>,
    /// The permission bits that a file may have at most.
    pub mode: Option<u32>,
    /// The permission bits that are removed from every file.
    pub umask: Option<u32>,
    /// How much memory and how many requests the mount may use.
    pub limits: Limits,
    /// Whether a SPEC that does not exist is no failure (fstab(5)).
    pub nofail: bool,
    /// Whether reads bypass the page cache of the mount.
    pub direct_io: bool,
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
            limits: Limits::default(),
            nofail: false,
            direct_io: false,
        }
    }
}

impl MountOptions {
    /// Whether files can be opened for writing.
    pub fn is_writable(&self) -> bool {
        !self.flags.contains(MsFlags::MS_RDONLY)
    }

    /// The owner, the group and the permissions of the files.
    pub fn ownership(&self) -> Ownership {
        let mode = self.mode.unwrap_or(0o777) & !self.umask.unwrap_or(0);
        Ownership { uid: self.uid, gid: self.gid, mode, is_writable: self.is_writable() }
    }
}

/// What a list of options contains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParsedOptions {
    /// Options of the mount.
    pub mount: MountOptions,
    /// Options of what is shown.
    pub source: SourceOptions,
    /// Problems that do not prevent the mount, each on a line of its own.
    pub warnings: Vec<String>,
}

/// What happens to an unknown option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownOptions {
    /// It is an error.
    Refuse,
    /// It is a warning (`-s` of mount(8)).
    Warn,
}

/// What `rw` as the first option means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FirstRw {
    /// The user wants to write.
    #[default]
    IsWanted,
    /// Nothing: mount(8) puts it first for each mount that is not `ro`, whether the user wrote it or not.
    IsImplied,
    /// It is not known whether the user or the library of mount(8) has put it there. It means nothing, with a warning.
    IsUnclear,
}

/// Parses the options of a mount.
///
/// # Errors
/// A usage error that names the option that is unknown, refused, or has a wrong value, and for options that exclude each other.
pub fn parse(list: &OsStr, unknown: UnknownOptions, first_rw: FirstRw) -> Result<ParsedOptions> {
    let mut options = ParsedOptions::default();
    let list = split(list.as_bytes())?;
    for (position, word) in list.iter().enumerate() {
        if position == 0 && word == b"rw" && first_rw != FirstRw::IsWanted {
            continue;
        }
        match (options.apply(&Word::new(word)), unknown) {
            (Ok(()), _) => {}
            (Err(WordError::Invalid(error)), _) | (Err(WordError::Unknown(error)), UnknownOptions::Refuse) => {
                return Err(error);
            }
            (Err(WordError::Unknown(error)), UnknownOptions::Warn) => {
                options.warnings.push(format!("{error}, ignored"));
            }
        }
    }
    let has = |name: &[u8]| list.iter().any(|word| word == name);
    if has(b"writable") && !is_read_only(&list) {
        options.mount.flags.remove(MsFlags::MS_RDONLY);
    } else if first_rw == FirstRw::IsUnclear && list[0] == b"rw" && !options.mount.is_writable() {
        options.warnings.push(
            "the first option 'rw' is taken for that of mount(8): 'writable' makes a mount that can be written".into(),
        );
    }
    check_views(&options.source.views)?;
    if options.source.name.is_some() && options.source.thin_metadata.is_some() {
        return Err(Error::usage("option 'name' is for one file, and a thin pool has one for each volume"));
    }
    check_writing(&options)?;
    Ok(options)
}

/// Whether `ro` is given, and no `rw` after it. Its place among the other options says nothing: mount(8) puts it first.
fn is_read_only(list: &[Vec<u8>]) -> bool {
    list.iter().rfind(|word| matches!(&word[..], b"ro" | b"rw")).is_some_and(|word| word == b"ro")
}

/// Refuses to write to what is shown as something that does not change.
fn check_writing(options: &ParsedOptions) -> Result<()> {
    if !options.mount.is_writable() {
        return Ok(());
    }
    let excluded = [
        (options.source.is_static, "static", "it says that nobody writes"),
        (options.source.thin_metadata.is_some(), "thin_metadata", "the volumes of an offline pool are only read"),
        (options.source.views.count() > 0, "compact, since or used", "the device of a view must not change"),
    ];
    match excluded.iter().find(|(is_given, ..)| *is_given) {
        Some((_, option, why)) => Err(Error::usage(format!("rw is not possible with {option}: {why}"))),
        None => Ok(()),
    }
}

/// Refuses an option of views that no view uses.
fn check_views(views: &ViewOptions) -> Result<()> {
    let needs = |option: &str, what: &str| Err(Error::usage(format!("option '{option}' has no effect without {what}")));
    match (views.cluster_size, &views.backing) {
        (Some(_), _) if !views.compact && views.since.is_none() => needs("cluster_size", "compact or since"),
        (_, Some(_)) if views.since.is_none() => needs("backing", "since"),
        _ => Ok(()),
    }
}

/// Parses the options of a `command` that mounts nothing.
///
/// # Errors
/// A usage error as for [`parse`], and for every option of a mount.
pub fn parse_source(list: &OsStr, command: &str) -> Result<SourceOptions> {
    let mut options = ParsedOptions::default();
    for word in split(list.as_bytes())?.iter().filter(|word| !word.is_empty()) {
        let word = Word::new(word);
        let is_of_source = [words::SOURCE, words::SOURCE_PLAIN].iter().any(|list| list.contains(&&*word.name));
        if !is_of_source && words::is_known(&word.name) {
            let error = Error::usage(format!("option '{}' is for mounts, and means nothing to {command}", word.name));
            let (with_value, plain) = (words::SOURCE.join("=, ") + "=", words::SOURCE_PLAIN.join(", "));
            return Err(error.hint(format!("{command} accepts {with_value}, {plain}")));
        }
        options.apply(&word).map_err(|(WordError::Unknown(error) | WordError::Invalid(error))| error)?;
    }
    check_views(&options.source.views)?;
    Ok(options.source)
}

/// Appends the options of one more `-o` to a list.
pub fn append(list: &mut OsString, more: &OsStr) {
    if !list.is_empty() {
        list.push(",");
    }
    list.push(more);
}

/// One option: `NAME` or `NAME=VALUE`.
struct Word<'a> {
    name: Cow<'a, str>,
    value: Option<&'a [u8]>,
}

impl<'a> Word<'a> {
    /// Divides the bytes of one option at its first `=`.
    fn new(bytes: &'a [u8]) -> Self {
        let (name, value) = match bytes.iter().position(|byte| *byte == b'=') {
            Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
            None => (bytes, None),
        };
        Self { name: String::from_utf8_lossy(name), value }
    }
}

/// Why an option cannot be used.
enum WordError {
    /// There is no such option.
    Unknown(Error),
    /// Its value is wrong, or the option is not possible.
    Invalid(Error),
}

impl From<Error> for WordError {
    fn from(error: Error) -> Self {
        Self::Invalid(error)
    }
}

impl ParsedOptions {
    fn apply(&mut self, word: &Word<'_>) -> std::result::Result<(), WordError> {
        let name = &*word.name;
        match word.value {
            _ if words::is_comment(name) => Ok(()),
            None => self.apply_plain(name),
            Some(_) if words::IGNORED_WITH_VALUE.contains(&name) => Ok(()),
            Some(value) => self.apply_value(name, value),
        }
    }

    fn apply_plain(&mut self, name: &str) -> std::result::Result<(), WordError> {
        if let Some((_, set, clear)) = words::FLAGS.iter().find(|flag| flag.0 == name) {
            self.mount.flags = (self.mount.flags | *set).difference(*clear);
            return Ok(());
        }
        if let Some((_, reason)) = words::REFUSED.iter().find(|refused| refused.0 == name) {
            return Err(Error::usage(format!("option '{name}' is not possible: {reason}")).into());
        }
        match name {
            "allow_other" | "allow-other" => self.mount.allow_other = true,
            "direct_io" => self.mount.direct_io = true,
            // What it does depends on the whole list.
            "writable" => {}
            "nofail" => self.mount.nofail = true,
            "static" => self.source.is_static = true,
            "compact" => self.source.views.compact = true,
            "used" => self.source.views.used = true,
            _ if words::IGNORED.contains(&name) => {}
            _ if words::has_value(name) => {
                return Err(Error::usage(format!("option '{name}' needs a value: {name}=...")).into());
            }
            _ => return Err(WordError::Unknown(unknown_option(name))),
        }
        Ok(())
    }

    fn apply_value(&mut self, name: &str, value: &[u8]) -> std::result::Result<(), WordError> {
        let text = std::str::from_utf8(value).ok();
        let wrong = |expected: &str| {
            let value = String::from_utf8_lossy(value);
            WordError::Invalid(Error::usage(format!("option '{name}={value}': expected {expected}")))
        };
        let number = |radix, most, expected| match text.map(|text| u32::from_str_radix(text, radix)) {
            // from_str_radix accepts a sign, which no mount option has.
            Some(Ok(number)) if number <= most && value.first() != Some(&b'+') => Ok(Some(number)),
            _ => Err(wrong(expected)),
        };
        let size = |most| match text.and_then(parse_size) {
            Some(size) if size <= most => Ok(Some(size)),
            _ => Err(wrong("a size such as 65536, 64K, 16M or 1G")),
        };
        const DEPTH: &str = "a number of requests from 1 to 65535";
        match name {
            // The largest id means "no id" to the kernel.
            "uid" => self.mount.uid = number(10, u32::MAX - 1, "a user's number")?,
            "gid" => self.mount.gid = number(10, u32::MAX - 1, "a group's number")?,
            "mode" => self.mount.mode = number(8, 0o777, "octal permission bits such as 0440")?,
            "umask" => self.mount.umask = number(8, 0o777, "octal permission bits such as 0027")?,
            "max_read" => self.mount.max_read = size(Bytes::new(u64::from(u32::MAX)))?,
            "map_cache" => self.mount.limits.map_cache = size(Bytes::MAX)?,
            "read_ahead" => self.mount.limits.read_ahead = size(Bytes::MAX)?,
            "queue_depth" => {
                let depth = number(10, u32::from(u16::MAX), DEPTH)?.and_then(|depth| u16::try_from(depth).ok());
                self.mount.limits.queue_depth = Some(depth.filter(|&depth| depth > 0).ok_or_else(|| wrong(DEPTH))?);
            }
            "thin_metadata" if value.is_empty() => return Err(wrong("a device or a file")),
            "thin_metadata" => {
                self.source.thin_metadata = Some(absolute(Path::new(&OsString::from_vec(value.to_vec())))?);
            }
            "nbd" => {
                let uri = text.filter(|text| !text.is_empty()).ok_or_else(|| wrong("an NBD URI"))?;
                self.source.nbd = Some(Uri::parse(uri)?);
            }
            "since" => {
                let older = Older::parse(OsStr::from_bytes(value))?.ok_or_else(|| wrong("an older snapshot"))?;
                self.source.views.since = Some(older);
            }
            "cluster_size" => {
                let size = text.and_then(parse_size).and_then(ClusterSize::new);
                self.source.views.cluster_size = Some(size.ok_or_else(|| wrong("a power of two from 4K to 2M"))?);
            }
            "backing" if value.is_empty() || value.len() > LONGEST_BACKING_NAME => {
                return Err(wrong("the name of a file, of 1 to 1023 bytes"));
            }
            "backing" => self.source.views.backing = Some(OsString::from_vec(value.to_vec())),
            "name" if !is_file_name(value) => {
                return Err(wrong("the name of a file, of 1 to 255 bytes, without a directory"));
            }
            "name" => self.source.name = Some(OsString::from_vec(value.to_vec())),
            _ if !name.is_empty() && words::is_known(name) => {
                return Err(WordError::Unknown(Error::usage(format!("option '{name}' takes no value"))));
            }
            _ => return Err(WordError::Unknown(unknown_option(name))),
        }
        Ok(())
    }
}

/// Whether a name can be that of a file in a directory.
fn is_file_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && name.len() <= LONGEST_NAME
        && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

fn unknown_option(name: &str) -> Error {
    let error = Error::usage(format!("unknown option '{name}'"));
    match words::near(name).as_slice() {
        [] => error,
        near => error.hint(format!("did you mean {}?", near.join(" or "))),
    }
}

/// Parses a size: a decimal number of bytes, or of K, M, G or T (powers of 1024). `None` for other text, and for a size
/// that does not fit.
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

/// Splits at the commas that are neither quoted nor after a backslash, and removes the quoting.
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
