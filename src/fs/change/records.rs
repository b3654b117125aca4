//! The text of the file in which mounts share the times of devices.
//!
//! The first line names the format and the boot. After that, each line is one device: its number, its state in hexadecimal
//! digits or `-`, the modification time and the change time in nanoseconds since 1970. Those that were written last come last.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use super::FileTimes;
use crate::sys::boot::BootId;
use crate::sys::device::DeviceId;

/// How many devices are kept. Beyond that, those that were written longest ago are dropped.
pub const MOST_DEVICES: usize = 4096;

/// The longest text that is read, in bytes: more than [`MOST_DEVICES`] lines have.
pub const LONGEST_TEXT: usize = 1 << 20;

/// The begin of the first line.
const FORMAT: &str = "blkholefs times 1";

/// What is known of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its state. `None` if it was one that other processes cannot compare; the times are then only the last ones shown.
    pub state: Option<u128>,
    /// The times that it was given in that state.
    pub times: FileTimes,
}

impl Record {
    /// What is kept of two records of a device: the later one, and the later times of one state.
    #[must_use]
    pub fn merged(self, other: Self) -> Self {
        let (first, second) = (self.times, other.times);
        if self.state.is_some() && self.state == other.state {
            let times = FileTimes { mtime: first.mtime.max(second.mtime), ctime: first.ctime.max(second.ctime) };
            return Self { times, ..self };
        }
        if second.ctime > first.ctime { other } else { self }
    }
}

/// The records of one boot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// Each with a number that is higher for one that was written later.
    devices: HashMap<DeviceId, (u64, Record)>,
    written: u64,
}

impl Records {
    /// Parses a text. A text of another boot, or with anything that is not understood, has no records.
    pub fn parse(text: &str, boot: BootId) -> Self {
        Self::try_parse(text, boot).unwrap_or_default()
    }

    fn try_parse(text: &str, boot: BootId) -> Option<Self> {
        let (first, rest) = text.split_once('\n')?;
        if text.len() > LONGEST_TEXT || first != header(boot) || !(rest.is_empty() || rest.ends_with('\n')) {
            return None;
        }
        let mut records = Self::default();
        for line in rest.lines() {
            let (device, record) = parse_line(line)?;
            if records.get(device).is_some() || records.devices.len() >= MOST_DEVICES {
                return None;
            }
            records.put(device, record);
        }
        Some(records)
    }

    /// The record of a device.
    pub fn get(&self, device: DeviceId) -> Option<Record> {
        self.devices.get(&device).map(|(_, record)| *record)
    }

    /// Adds a record, or replaces that of the same device.
    pub fn put(&mut self, device: DeviceId, record: Record) {
        self.written += 1;
        self.devices.insert(device, (self.written, record));
    }

    /// The text of the records, at most [`MOST_DEVICES`] of them.
    pub fn text(&self, boot: BootId) -> String {
        let mut devices: Vec<_> = self.devices.iter().collect();
        devices.sort_unstable_by_key(|(_, (written, _))| *written);
        let mut text = header(boot) + "\n";
        for (device, (_, record)) in &devices[devices.len().saturating_sub(MOST_DEVICES)..] {
            let (Some(mtime), Some(ctime)) = (nanoseconds(record.times.mtime), nanoseconds(record.times.ctime)) else {
                continue;
            };
            let state = record.state.map_or_else(|| "-".to_owned(), |state| format!("{state:032x}"));
            // Writing to a string does not fail.
            let _ = writeln!(text, "{device} {state} {mtime} {ctime}");
        }
        text
    }
}

fn header(boot: BootId) -> String {
    format!("{FORMAT} {:032x}", boot.get())
}

fn parse_line(line: &str) -> Option<(DeviceId, Record)> {
    let mut words = line.split(' ');
    let device = words.next()?.parse().ok()?;
    let state = match words.next()? {
        "-" => None,
        digits => Some(hexadecimal(digits)?),
    };
    let (mtime, ctime) = (time(words.next()?)?, time(words.next()?)?);
    words.next().is_none().then_some((device, Record { state, times: FileTimes { mtime, ctime } }))
}

/// Parses 32 digits. `from_str_radix` alone would accept a sign.
fn hexadecimal(digits: &str) -> Option<u128> {
    let is_number = digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_number.then(|| u128::from_str_radix(digits, 16).ok())?
}

fn time(word: &str) -> Option<SystemTime> {
    let is_number = word.bytes().all(|byte| byte.is_ascii_digit());
    let time: u64 = is_number.then(|| word.parse().ok())??;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(time))
}

/// The nanoseconds since 1970; `None` for a time before that or after the year 2554, which is not kept.
fn nanoseconds(time: SystemTime) -> Option<u64> {
    time.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_nanos().try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: &str = "0b1c2d3e-0000-4000-8000-0123456789ab";

    fn boot() -> BootId {
        BootId::parse(BOOT).unwrap()
    }

    fn id(minor: u32) -> DeviceId {
        DeviceId { major: 7, minor }
    }

    fn record(state: Option<u128>, mtime: u64, ctime: u64) -> Record {
        let [mtime, ctime] = [mtime, ctime].map(|time| SystemTime::UNIX_EPOCH + Duration::from_nanos(time));
        Record { state, times: FileTimes { mtime, ctime } }
    }

    #[test]
    fn a_text_is_parsed_back() {
        let mut records = Records::default();
        assert_eq!(Records::parse(&records.text(boot()), boot()), records);
        records.put(id(1), record(Some(5), 1, 2));
        records.put(id(0), record(None, 3, u64::MAX));
        records.put(id(1), record(Some(u128::MAX), 7, 8));
        let parsed = Records::parse(&records.text(boot()), boot());
        assert_eq!(parsed.get(id(0)), Some(record(None, 3, u64::MAX)));
        assert_eq!(parsed.get(id(1)), Some(record(Some(u128::MAX), 7, 8)));
        assert_eq!(parsed.get(id(2)), None);
        assert_eq!(parsed.text(boot()), records.text(boot()));
    }

    #[test]
    fn another_boot_and_garbage_have_no_records() {
        let mut records = Records::default();
        records.put(id(1), record(Some(5), 1, 2));
        let text = records.text(boot());
        let other = BootId::parse(&BOOT.replace('b', "c")).unwrap();
        assert_eq!(Records::parse(&text, other), Records::default());
        for (from, to) in
            [("times 1", "times 2"), ("7:1 ", "7:x "), (" 1 ", " -1 "), (" 2\n", " 2 3\n"), (" 2\n", " 2")]
        {
            let garbage = text.replace(from, to);
            assert_ne!(garbage, text, "{from}");
            assert_eq!(Records::parse(&garbage, boot()), Records::default(), "{garbage}");
        }
        let last = text.lines().last().unwrap();
        assert_eq!(Records::parse(&format!("{text}{last}\n"), boot()), Records::default(), "a device has one line");
        for end in 0..text.len() {
            let cut = Records::parse(&text[..end], boot());
            assert_eq!(cut, Records::default(), "{end}");
        }
    }

    #[test]
    fn the_devices_that_were_written_longest_ago_are_dropped() {
        let mut records = Records::default();
        let most = u32::try_from(MOST_DEVICES).unwrap();
        (0..most + 2).for_each(|minor| records.put(id(minor), record(Some(u128::MAX), u64::MAX, u64::MAX)));
        records.put(id(0), record(None, 1, 1));
        let text = records.text(boot());
        assert!(text.len() <= LONGEST_TEXT);
        let kept = Records::parse(&text, boot());
        let is_kept = [0, 1, 2, 3, most + 1].map(|minor| kept.get(id(minor)).is_some());
        assert_eq!(is_kept, [true, false, false, true, true]);
    }

    #[test]
    fn of_two_records_the_later_one_is_kept() {
        let (old, new) = (record(Some(1), 9, 10), record(Some(2), 5, 11));
        assert_eq!((old.merged(new), new.merged(old)), (new, new));
        assert_eq!(record(Some(1), 12, 10).merged(record(Some(1), 11, 13)), record(Some(1), 12, 13));
        assert_eq!(record(None, 1, 1).merged(record(None, 2, 2)), record(None, 2, 2));
    }
}
