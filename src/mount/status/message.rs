//! The answer of a daemon: lines of a word and values between blanks.
//!
//! ```text
//! blkholefs status
//! open-files 2
//! map-memory 4096
//! map-limit 268435456
//! read-ahead 0
//! names 3
//! file 2 4096 loop0
//! dense 1 1700000000 /dev/loop0 it\040is\040suspended
//! end
//! ```
//!
//! `file` has the number of opens, the memory of the extents and the name. `dense` belongs to the file before it, and has 1 for
//! a degraded answer and 0 for a layer that is data by design, the time in seconds since 1970 or `-`, the layer and the reason.
//! Later versions may add words, which are skipped, and values at the end of a line.

use std::ffi::OsString;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::fs::{FileStatus, Status};
use crate::handle::DenseLayer;
use crate::mount::record::escape;
use crate::sys::mountinfo::unescape;
use crate::units::Bytes;

/// The longest answer. Files that do not fit are left out.
pub const LONGEST: usize = 1 << 20;

/// The longest name or reason. The rest of a longer one is cut off.
const LONGEST_TEXT: usize = 4096;

const FIRST_LINE: &[u8] = b"blkholefs status";
const LAST_LINE: &[u8] = b"end";

/// Latest time that is written, in the year 9999: later ones have no usual form.
const LATEST: u64 = 253_402_300_799;

/// The answer of a daemon in the state `status`.
pub fn format(status: &Status) -> Vec<u8> {
    let Status { open_files, map_memory, map_limit, read_ahead, names, files } = status;
    let mut text = FIRST_LINE.to_vec();
    let numbers = format!(
        "\nopen-files {open_files}\nmap-memory {map_memory}\nmap-limit {map_limit}\nread-ahead {read_ahead}\nnames {names}\n"
    );
    text.extend_from_slice(numbers.as_bytes());
    for file in files {
        let lines = format_file(file);
        if text.len() + lines.len() + LAST_LINE.len() < LONGEST {
            text.extend_from_slice(&lines);
        }
    }
    text.extend_from_slice(LAST_LINE);
    text.push(b'\n');
    text
}

fn format_file(file: &FileStatus) -> Vec<u8> {
    let mut lines = format!("file {} {} ", file.opens, file.map_memory).into_bytes();
    put(&file.name, &mut lines);
    for dense in &file.dense {
        let since = dense.since.and_then(|since| since.duration_since(UNIX_EPOCH).ok());
        let since = since.map_or("-".to_owned(), |since| since.as_secs().min(LATEST).to_string());
        lines.extend_from_slice(format!("\ndense {} {since} ", u8::from(dense.is_degraded)).as_bytes());
        put(dense.layer.as_ref(), &mut lines);
        lines.push(b' ');
        put(dense.reason.as_ref(), &mut lines);
    }
    lines.push(b'\n');
    lines
}

fn put(value: &std::ffi::OsStr, line: &mut Vec<u8>) {
    let bytes = value.as_encoded_bytes();
    let shown = std::os::unix::ffi::OsStrExt::from_bytes(&bytes[..bytes.len().min(LONGEST_TEXT)]);
    escape(shown, line);
}

/// Parses an answer. `None` unless it is complete and has the form of one.
pub fn parse(answer: &[u8]) -> Option<Status> {
    if answer.len() > LONGEST {
        return None;
    }
    let mut lines = answer.strip_suffix(b"\n")?.split(|byte| *byte == b'\n');
    let is_whole = lines.next() == Some(FIRST_LINE) && lines.next_back() == Some(LAST_LINE);
    let mut status = is_whole.then(Status::default)?;
    for line in lines {
        let mut values = line.split(|byte| *byte == b' ');
        let word = values.next()?;
        let count = match word {
            b"open-files" => &mut status.open_files,
            b"names" => &mut status.names,
            b"map-memory" | b"map-limit" | b"read-ahead" => {
                let bytes = Bytes::new(number(values.next()?)?);
                match word {
                    b"map-memory" => status.map_memory = bytes,
                    b"map-limit" => status.map_limit = bytes,
                    _ => status.read_ahead = bytes,
                }
                continue;
            }
            b"file" => {
                status.files.push(parse_file(&mut values)?);
                continue;
            }
            b"dense" => {
                status.files.last_mut()?.dense.push(parse_dense(&mut values)?);
                continue;
            }
            _ => continue,
        };
        *count = number(values.next()?)?;
    }
    Some(status)
}

fn parse_file<'a>(values: &mut impl Iterator<Item = &'a [u8]>) -> Option<FileStatus> {
    let (opens, map_memory) = (number(values.next()?)?, Bytes::new(number(values.next()?)?));
    Some(FileStatus { opens, map_memory, name: unescape(values.next()?), dense: Vec::new() })
}

fn parse_dense<'a>(values: &mut impl Iterator<Item = &'a [u8]>) -> Option<DenseLayer> {
    let is_degraded = number(values.next()?)? != 0;
    let since = match values.next()? {
        b"-" => None,
        seconds => Some(time(number(seconds)?)?),
    };
    let mut text = || Some(lossy(unescape(values.next()?)));
    Some(DenseLayer { layer: text()?, reason: text()?, since, is_degraded })
}

fn time(seconds: u64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_secs(Some(seconds).filter(|seconds| *seconds <= LATEST)?))
}

fn lossy(text: OsString) -> String {
    text.into_string().unwrap_or_else(|bytes| bytes.to_string_lossy().into_owned())
}

fn number(digits: &[u8]) -> Option<u64> {
    let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok().filter(|_| is_number)?.parse().ok()
}
