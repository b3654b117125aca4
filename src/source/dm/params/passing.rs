//! Arguments and status lines of targets that pass reads on to one device.

use super::{Place, Words};
use crate::sys::device::DeviceId;
use crate::units::Sectors;

/// Parses the arguments of `delay`, `<device> <start> <delay>` for reads and, optionally, the same for writes and for
/// flushes. Returns the place for reads.
pub fn delay(params: &str) -> Option<Place> {
    let mut words = Words::new(params);
    let mut class = || {
        let place = words.place()?;
        words.number::<u64>().map(|_| place)
    };
    let read = class()?;
    let more = [class(), class()];
    // Each class of requests is complete or absent, so a class after one that is incomplete is not valid.
    if more[0].is_none() && more[1].is_some() {
        return None;
    }
    let classes = 1 + more.iter().flatten().count();
    (params.split_ascii_whitespace().count() == 3 * classes).then_some(read)
}

/// Parses the arguments of `flakey`, `<device> <start> <up> <down> <number of features> ...`. Returns the place that it
/// maps to, if it is up all the time and has no features.
///
/// Linux 6.12 and 7.3 print the features `error_reads error_writes` for a table without features, because these are its
/// defaults while it is down. All features take effect only while it is down (`flakey_map` and `flakey_end_io` of
/// `drivers/md/dm-flakey.c` in 5.10, 6.1, 6.12 and 7.3), so a device that is never down passes all reads on.
pub fn flakey_without_faults(params: &str) -> Option<Place> {
    let mut words = Words::new(params);
    let place = words.place()?;
    let (_up, down): (u64, u64) = (words.number()?, words.number()?);
    let features = words.counted()?;
    let none = matches!(features[..], [] | ["error_reads", "error_writes"]);
    words.end(place).filter(|_| down == 0 && none)
}

/// The arguments of `unstriped`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unstriped {
    /// The number of stripes of the device below.
    pub stripes: u32,
    /// The length of one chunk.
    pub chunk: Sectors,
    /// The number of the stripe that the target consists of.
    pub index: u32,
    /// The start of the stripes.
    pub place: Place,
}

/// Parses the arguments of `unstriped`, `<number of stripes> <chunk> <stripe> <device> <start>`.
pub fn unstriped(params: &str) -> Option<Unstriped> {
    let mut words = Words::new(params);
    let unstriped =
        Unstriped { stripes: words.number()?, chunk: words.sectors()?, index: words.number()?, place: words.place()? };
    words.end(unstriped).filter(|unstriped| unstriped.index < unstriped.stripes && unstriped.chunk.get() > 0)
}

/// Parses the argument of `snapshot-origin`. Returns the origin.
pub fn snapshot_origin(params: &str) -> Option<DeviceId> {
    let mut words = Words::new(params);
    let origin = words.device()?;
    words.end(origin)
}

/// Parses the arguments of `era`, `<metadata device> <origin device> <block size>`. Returns the origin.
pub fn era_origin(params: &str) -> Option<DeviceId> {
    let mut words = Words::new(params);
    let (_metadata, origin) = (words.device()?, words.device()?);
    words.number::<u32>()?;
    words.end(origin)
}

/// The status of one path of `multipath`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathStatus {
    /// The path's device.
    pub device: DeviceId,
    /// Whether it can be used.
    pub state: PathState,
}

/// The state of a path, the best one first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PathState {
    /// It works, and its group is in use.
    InUse,
    /// It works.
    Active,
    /// It failed, or its group is disabled.
    Unusable,
}

/// Parses the status of `multipath` (`multipath_status` of `drivers/md/dm-mpath.c`). Returns its paths.
pub fn multipath_paths(status: &str) -> Option<Vec<PathStatus>> {
    let mut words = Words::new(status);
    let (_features, _handler) = (words.counted()?, words.counted()?);
    let (groups, _current): (usize, usize) = (words.number()?, words.number()?);
    let mut paths = Vec::new();
    for _ in 0..groups {
        let best = match words.word()? {
            "A" => PathState::InUse,
            "E" => PathState::Active,
            "D" => PathState::Unusable,
            _ => return None,
        };
        words.counted()?;
        let (count, arguments): (usize, usize) = (words.number()?, words.number()?);
        for _ in 0..count {
            let device = words.device()?;
            let state = match words.word()? {
                "A" => best,
                "F" => PathState::Unusable,
                _ => return None,
            };
            words.number::<u32>()?;
            for _ in 0..arguments {
                words.word()?;
            }
            paths.push(PathStatus { device, state });
        }
    }
    words.end(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(minor: u32) -> DeviceId {
        DeviceId { major: 7, minor }
    }

    fn place(minor: u32, start: u64) -> Place {
        Place { device: id(minor), start: Sectors::new(start) }
    }

    #[test]
    fn a_delay_reads_from_its_first_place() {
        for text in ["7:1 8 500", "7:1 8 0 7:2 16 100", "7:1 8 0 7:2 16 100 7:3 0 5"] {
            assert_eq!(delay(text), Some(place(1, 8)), "{text:?}");
        }
        for text in
            ["", "7:1 8", "7:1 8 500 7:2", "7:1 8 500 7:2 16", "7:1 8 5007:2 16 100", "7:1 8 0 7:2 16 1 7:3 0 5 6"]
        {
            assert_eq!(delay(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_flakey_device_with_faults_is_refused() {
        for text in ["7:1 8 60 0 0", "7:1 8 1 0 0 ", "7:1 8 60 0 2 error_reads error_writes"] {
            assert_eq!(flakey_without_faults(text), Some(place(1, 8)), "{text:?}");
        }
        for text in [
            "7:1 8 60 1 0",
            "7:1 8 60 0 1 drop_writes",
            "7:1 8 60 0 5 corrupt_bio_byte 32 r 1 0",
            "7:1 8 60 0",
            "7:1 8 60 0 0 1",
            "7:1 8 60 1 2 error_reads error_writes",
            "7:1 8 60 0 1 error_reads",
            "7:1 8 60 0 1 error_writes",
            "7:1 8 60 0 2 error_writes error_reads",
            "7:1 8 60 0 2 random_read_corrupt 1",
            "7:1 8 60 0 2 error_reads error_writes error_writes",
        ] {
            assert_eq!(flakey_without_faults(text), None, "{text:?}");
        }
    }

    #[test]
    fn unstriped_names_a_stripe_that_exists() {
        let read = unstriped("3 128 2 7:1 8").unwrap();
        assert_eq!(read, Unstriped { stripes: 3, chunk: Sectors::new(128), index: 2, place: place(1, 8) });
        for text in ["3 128 3 7:1 8", "0 128 0 7:1 8", "3 0 2 7:1 8", "3 128 2 7:1", "3 128 2 7:1 8 9"] {
            assert_eq!(unstriped(text), None, "{text:?}");
        }
    }

    #[test]
    fn origins() {
        assert_eq!(snapshot_origin("7:1"), Some(id(1)));
        assert_eq!(snapshot_origin("7:1 0"), None);
        assert_eq!(era_origin("7:0 7:1 128"), Some(id(1)));
        for text in ["7:0 7:1", "7:0 7:1 x", "7:0 7:1 128 1"] {
            assert_eq!(era_origin(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_status_of_multipath_lists_its_paths() {
        let path = |minor, state| PathStatus { device: id(minor), state };
        let text = "2 0 0 0 2 1 A 0 2 2 7:1 F 3 0 1 7:2 A 0 0 1 E 0 1 0 7:3 A 0 ";
        let paths = [path(1, PathState::Unusable), path(2, PathState::InUse), path(3, PathState::Active)];
        assert_eq!(multipath_paths(text).unwrap(), paths);
        let disabled = multipath_paths("0 0 1 1 D 0 1 0 7:1 A 0").unwrap();
        assert_eq!(disabled, [path(1, PathState::Unusable)]);
        for end in 0..text.trim_end().len() {
            assert_eq!(multipath_paths(&text[..end]), None, "{:?}", &text[..end]);
        }
        for text in ["99999999999 0", "0 0 1 1 X 0 0 0", "0 0 1 1 A 0 1 0 7:1 Z 0"] {
            assert_eq!(multipath_paths(text), None, "{text:?}");
        }
    }
}
