//! Parsers of the arguments and status lines of targets, as the kernel prints them
//! (`Documentation/admin-guide/device-mapper/`). A line that does not have exactly the expected form is `None`.

mod copies;
mod passing;
mod snapshot;

pub use copies::{
    CloneStatus, Cloning, Legs, clone_status, cloning, mirror, mirror_is_in_sync, raid_is_in_sync, raid1,
};
pub use passing::{
    PathState, PathStatus, Unstriped, delay, era_origin, flakey_without_faults, multipath_paths, snapshot_origin,
    unstriped,
};
pub use snapshot::{SnapshotParams, Store, allocated, snapshot};

use std::str::{FromStr, SplitAsciiWhitespace};

use crate::sys::device::DeviceId;
use crate::units::Sectors;

/// A position on a lower device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The device.
    pub device: DeviceId,
    /// The distance from the start of the device.
    pub start: Sectors,
}

impl Place {
    /// The start of a device.
    pub fn start_of(device: DeviceId) -> Self {
        Self { device, start: Sectors::new(0) }
    }
}

/// The arguments of `striped`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Striped {
    /// The length of one chunk.
    pub chunk: Sectors,
    /// The start of each leg, in order.
    pub legs: Vec<Place>,
}

/// Parses the arguments of `linear`, `<device> <start>`.
pub fn linear(params: &str) -> Option<Place> {
    let mut words = Words::new(params);
    let place = words.place()?;
    words.end(place)
}

/// Parses the arguments of `striped`, `<number of stripes> <chunk> (<device> <start>)...`.
pub fn striped(params: &str) -> Option<Striped> {
    let mut words = Words::new(params);
    let count: usize = words.number()?;
    let chunk = words.sectors()?;
    let legs = words.places(count)?;
    words.end(Striped { chunk, legs }).filter(|striped| count > 0 && striped.chunk.get() > 0)
}

/// The words of a line, read from the front.
struct Words<'a>(SplitAsciiWhitespace<'a>);

impl<'a> Words<'a> {
    fn new(line: &'a str) -> Self {
        Self(line.split_ascii_whitespace())
    }

    fn word(&mut self) -> Option<&'a str> {
        self.0.next()
    }

    fn number<T: FromStr>(&mut self) -> Option<T> {
        unsigned(self.word()?)
    }

    fn sectors(&mut self) -> Option<Sectors> {
        self.number().map(Sectors::new)
    }

    fn device(&mut self) -> Option<DeviceId> {
        self.word()?.parse().ok()
    }

    fn place(&mut self) -> Option<Place> {
        Some(Place { device: self.device()?, start: self.sectors()? })
    }

    fn places(&mut self, count: usize) -> Option<Vec<Place>> {
        let mut places = Vec::new();
        for _ in 0..count {
            places.push(self.place()?);
        }
        Some(places)
    }

    /// Takes a number, and then that number of words.
    fn counted(&mut self) -> Option<Vec<&'a str>> {
        let count: usize = self.number()?;
        let mut words = Vec::new();
        for _ in 0..count {
            words.push(self.word()?);
        }
        Some(words)
    }

    /// `value`, if no words are left.
    fn end<T>(mut self, value: T) -> Option<T> {
        self.0.next().is_none().then_some(value)
    }
}

/// Parses `<done>/<all>`.
fn fraction(word: &str) -> Option<(u64, u64)> {
    let (done, all) = word.split_once('/')?;
    Some((unsigned(done)?, unsigned(all)?))
}

/// Parses a number as the kernel prints it: `FromStr` alone would accept a sign.
fn unsigned<T: FromStr>(word: &str) -> Option<T> {
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(major: u32, minor: u32, start: u64) -> Place {
        Place { device: DeviceId { major, minor }, start: Sectors::new(start) }
    }

    #[test]
    fn linear_has_a_device_and_a_start() {
        assert_eq!(linear("7:0 2048"), Some(place(7, 0, 2048)));
        for text in ["", "7:0", "7:0 x", "7:0 -1", "7:0 1 2", "/dev/sda 0", "7:0 18446744073709551616", "7:0 +1"] {
            assert_eq!(linear(text), None, "{text:?}");
        }
    }

    #[test]
    fn striped_has_the_stated_number_of_legs() {
        let striped_two = striped("2 128 7:0 0 254:300 8").unwrap();
        assert_eq!(striped_two.chunk, Sectors::new(128));
        assert_eq!(striped_two.legs, [place(7, 0, 0), place(254, 300, 8)]);
        for text in ["", "2 128 7:0 0", "1 128 7:0 0 7:1 0", "0 128", "1 0 7:0 0", "99999999999 128 7:0 0"] {
            assert_eq!(striped(text), None, "{text:?}");
        }
    }

    /// Runs every parser, and checks that no result is longer than the text.
    fn read_all(text: &str) {
        let words = text.split_ascii_whitespace().count();
        let legs = [mirror(text), raid1(text), striped(text).map(|striped| striped.legs)];
        for legs in legs.into_iter().flatten() {
            assert!(!legs.is_empty() && legs.len() <= words / 2);
            let _ = (mirror_is_in_sync(text, legs.len()), raid_is_in_sync(text, legs.len()));
        }
        assert!(multipath_paths(text).is_none_or(|paths| paths.len() <= words / 3));
        let _ = (linear(text), delay(text), flakey_without_faults(text), unstriped(text), snapshot_origin(text));
        let _ = (era_origin(text), cloning(text), clone_status(text), snapshot(text), allocated(text));
    }

    #[test]
    fn no_line_makes_a_parser_panic() {
        use proptest::prelude::*;
        let lines = [
            "2 128 7:0 0 254:300 8",
            "core 2 1024 nosync 2 7:0 0 7:1 8 1 handle_errors",
            "2 7:0 7:1 16/16 1 AA 1 core",
            "raid1 3 0 region_size 1024 2 7:0 7:1 7:2 7:3",
            "raid1 2 AA 2048/2048 idle 0 0 -",
            "2 0 0 0 2 1 A 0 2 2 7:1 F 3 0 1 7:2 A 0 0 1 E 0 1 0 7:3 A 0",
            "8 16/1024 8 512/512 0 1 no_hydration 4 hydration_threshold 1 hydration_batch_size 1 rw",
            "3 128 2 7:1 8",
            "7:0 7:1 P 8",
        ];
        let mutations = proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..6);
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        runner
            .run(&(0..lines.len(), mutations, "[0-9A: /-]{0,60}"), |(line, mutations, random)| {
                let mut bytes = lines[line].as_bytes().to_vec();
                for (at, value) in mutations {
                    let at = at.index(bytes.len());
                    bytes[at] = value;
                }
                read_all(&String::from_utf8_lossy(&bytes));
                read_all(&random);
                Ok(())
            })
            .unwrap();
    }
}
