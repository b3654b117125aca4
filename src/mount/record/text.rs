//! The text of a record: the process id of the daemon in the first line, and then a line `WORD VALUE` for each thing that
//! describes the mount. A record of the first versions has the first line only. Blanks, control characters and backslashes of
//! a value are written as the kernel writes them in its list of mounts, a backslash and three octal digits.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::unistd::Pid;

use crate::sys::mountinfo::unescape;

/// What is mounted where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// What is shown, as the user typed it.
    pub spec: OsString,
    /// The mountpoint.
    pub directory: PathBuf,
    /// The options that matter, between commas: `ro` or `rw`, `allow_other`, what is shown.
    pub options: OsString,
}

/// What a record contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordText {
    /// The process id of the daemon.
    pub daemon: Pid,
    /// What it serves. `None` in a record of the first versions.
    pub description: Option<Description>,
}

impl RecordText {
    /// The text.
    pub fn format(&self) -> Vec<u8> {
        let mut text = format!("{}\n", self.daemon).into_bytes();
        if let Some(Description { spec, directory, options }) = &self.description {
            for (word, value) in [("spec", &**spec), ("directory", directory.as_os_str()), ("options", options)] {
                text.extend_from_slice(word.as_bytes());
                text.push(b' ');
                escape(value, &mut text);
                text.push(b'\n');
            }
        }
        text
    }

    /// Parses a text. A line that was not written completely, and one with another word, is left out.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let daemon = process_in(text)?;
        let value = |word: &str| {
            let mut lines = text.split_inclusive(|byte| *byte == b'\n');
            let value =
                lines.find_map(|line| line.strip_suffix(b"\n")?.strip_prefix(word.as_bytes())?.strip_prefix(b" "));
            value.map(unescape)
        };
        let describe = || {
            let (spec, directory) = (value("spec")?, value("directory")?.into());
            Some(Description { spec, directory, options: value("options").unwrap_or_default() })
        };
        Some(Self { daemon, description: describe() })
    }
}

/// Parses the first line of a record.
pub fn process_in(text: &[u8]) -> Option<Pid> {
    let line = text.split(|byte| *byte == b'\n').next()?.trim_ascii_end();
    std::str::from_utf8(line).ok()?.parse().ok().filter(|pid| *pid > 0).map(Pid::from_raw)
}

/// Appends `value` to a line, so that [`unescape`] gives it back and the line stays one.
pub fn escape(value: &OsStr, line: &mut Vec<u8>) {
    for &byte in value.as_bytes() {
        if byte <= b' ' || byte == 0x7f || byte == b'\\' {
            line.extend_from_slice(format!("\\{byte:03o}").as_bytes());
        } else {
            line.push(byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(spec: &[u8], directory: &[u8]) -> RecordText {
        let [spec, directory] = [spec, directory].map(|name| OsStr::from_bytes(name).to_owned());
        let description = Description { spec, directory: directory.into(), options: "ro,allow_other".into() };
        RecordText { daemon: Pid::from_raw(1234), description: Some(description) }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let text = described(b"/dev/vg/lv", b"/mnt/a b").format();
        assert_eq!(text, b"1234\nspec /dev/vg/lv\ndirectory /mnt/a\\040b\noptions ro,allow_other\n");
        for name in [&b"x"[..], b"a\nspec /dev/null\n", b"\x1b[2J\\040\\", b"\xff\x00\x7f", b""] {
            let record = described(name, name);
            assert_eq!(RecordText::parse(&record.format()), Some(record));
        }
    }

    #[test]
    fn a_record_of_the_first_versions_names_the_process_only() {
        let old = RecordText { daemon: Pid::from_raw(77), description: None };
        assert_eq!((old.format(), RecordText::parse(b"77\n")), (b"77\n".to_vec(), Some(old)));
    }

    #[test]
    fn a_record_that_is_cut_short_has_less_and_garbage_has_nothing() {
        let text = described(b"/dev/x", b"/mnt").format();
        for end in 0..text.len() {
            let parsed = RecordText::parse(&text[..end]);
            let described = parsed.and_then(|record| record.description);
            // A number that is cut short is another one. It is never that of a process that holds the lock of the record.
            assert_eq!(described.is_some(), end >= text.len() - "options ro,allow_other\n".len(), "{end} bytes");
        }
        for text in [&b""[..], b"\n", b"x\n", b"-1\nspec a\ndirectory b\n", b"0", b"\xff\n", b"1 2\n"] {
            assert_eq!(RecordText::parse(text), None);
        }
    }
}
