//! Arguments and status lines of targets that keep the same bytes in several places.

use super::{Place, Words, fraction};
use crate::sys::device::DeviceId;
use crate::units::Sectors;

/// The legs of a mirror. Each holds all bytes of the mirror.
pub type Legs = Vec<Place>;

/// Parses the arguments of `mirror`, `<log type> <n> ... <number of legs> (<device> <start>)... [<n> ...]`.
pub fn mirror(params: &str) -> Option<Legs> {
    let mut words = Words::new(params);
    // Logs of other types are kept by a daemon in user space, possibly for several hosts that write.
    if !matches!(words.word()?, "core" | "disk") {
        return None;
    }
    words.counted()?;
    let count = words.number()?;
    let legs = words.places(count)?;
    // Features select how write errors are handled. Without features the kernel prints nothing or a zero.
    if words.0.clone().next().is_some() {
        words.counted()?;
    }
    words.end(legs).filter(|legs| !legs.is_empty())
}

/// Parses the status of `mirror`, `<number of legs> <device>... <in sync>/<regions> 1 <health> ...`. Returns whether
/// all regions are in sync and all legs alive.
pub fn mirror_is_in_sync(status: &str, legs: usize) -> bool {
    let read = || {
        let mut words = Words::new(status);
        let devices = words.counted()?;
        let (done, all) = fraction(words.word()?)?;
        let health = words.counted()?;
        let alive = health.first().is_some_and(|health| health.len() == legs && health.bytes().all(|leg| leg == b'A'));
        (devices.len() == legs && done == all && alive).then_some(())
    };
    read().is_some()
}

/// Parses the arguments of `raid` of level raid1, `raid1 <n> ... <number of legs> (<metadata> <data>)...`.
pub fn raid1(params: &str) -> Option<Legs> {
    let mut words = Words::new(params);
    let level = words.word()?;
    let options = words.counted()?;
    // With these options, the data does not begin at the start of the data device.
    let moved = options.iter().any(|option| matches!(*option, "data_offset" | "delta_disks"));
    let count: usize = words.number()?;
    let mut legs = Vec::new();
    for _ in 0..count {
        // An absent metadata device is printed as `-`. An absent data device too, which is not a device number.
        words.word()?;
        legs.push(Place { device: words.device()?, start: Sectors::new(0) });
    }
    words.end(legs).filter(|legs| level == "raid1" && !moved && !legs.is_empty())
}

/// Parses the status of `raid`, `<level> <legs> <health> <in sync>/<all> <action> <mismatches> [<data offset> ...]`.
/// Returns whether all legs are in sync, no action runs, and the data begins at the start of each leg.
pub fn raid_is_in_sync(status: &str, legs: usize) -> bool {
    let read = || {
        let mut words = Words::new(status);
        words.word()?;
        let count: usize = words.number()?;
        let health = words.word()?;
        let (done, all) = fraction(words.word()?)?;
        let idle = words.word()? == "idle";
        words.number::<u64>()?;
        // Printed since version 1.5 of the target. Older versions have no data offset.
        let offset = words.word().unwrap_or("0");
        let alive = health.len() == legs && health.bytes().all(|leg| leg == b'A');
        (count == legs && alive && done == all && idle && offset == "0").then_some(())
    };
    read().is_some()
}

/// The arguments of `clone`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cloning {
    /// The device that regions are copied to.
    pub destination: DeviceId,
    /// The device that they are copied from.
    pub source: DeviceId,
}

/// Parses the arguments of `clone`, `<metadata device> <destination> <source> <region size> ...`.
pub fn cloning(params: &str) -> Option<Cloning> {
    let mut words = Words::new(params);
    words.device()?;
    let clone = Cloning { destination: words.device()?, source: words.device()? };
    words.sectors()?;
    Some(clone)
}

/// How much of a `clone` is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloneStatus {
    /// All regions were copied.
    Complete,
    /// Some regions are still read from the source.
    Partial,
    /// Its metadata failed: all reads fail.
    Failed,
}

/// Parses the status of `clone`, `<metadata block size> <used>/<all> <region size> <copied>/<regions> <copying> <n> ...
/// <n> ... <metadata mode>`.
pub fn clone_status(status: &str) -> Option<CloneStatus> {
    let mut words = Words::new(status);
    words.number::<u64>()?;
    fraction(words.word()?)?;
    words.sectors()?;
    let (copied, regions) = fraction(words.word()?)?;
    let copying: u64 = words.number()?;
    words.counted()?;
    words.counted()?;
    let mode = words.word()?;
    words.end(match mode {
        "rw" | "ro" if copied == regions && copying == 0 => CloneStatus::Complete,
        "rw" | "ro" => CloneStatus::Partial,
        _ => CloneStatus::Failed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(minor: u32, start: u64) -> Place {
        Place { device: DeviceId { major: 7, minor }, start: Sectors::new(start) }
    }

    #[test]
    fn mirrors() {
        let legs = vec![place(0, 0), place(1, 8)];
        for text in [
            "core 1 1024 2 7:0 0 7:1 8",
            "core 2 1024 nosync 2 7:0 0 7:1 8 1 handle_errors",
            "disk 2 7:3 1024 2 7:0 0 7:1 8 2 handle_errors keep_log",
        ] {
            assert_eq!(mirror(text), Some(legs.clone()), "{text:?}");
        }
        for text in [
            "clustered-core 1 1024 2 7:0 0 7:1 8",
            "core 1 1024 2 7:0 0 7:1",
            "core 1 1024 0",
            "core 1 1024 2 7:0 0 7:1 8 1",
            "core 1 1024 2 7:0 0 7:1 8 0 x",
            "core",
        ] {
            assert_eq!(mirror(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_mirror_is_in_sync_when_all_regions_and_legs_are() {
        assert!(mirror_is_in_sync("2 7:0 7:1 16/16 1 AA 1 core", 2));
        assert!(mirror_is_in_sync("2 7:0 7:1 16/16 1 AA 3 disk 7:3 A", 2));
        for text in [
            "2 7:0 7:1 15/16 1 AA 1 core",
            "2 7:0 7:1 16/16 1 AD 1 core",
            "2 7:0 7:1 16/16 1 A 1 core",
            "2 7:0 7:1 16/16 0 1 core",
            "3 7:0 7:1 7:2 16/16 1 AAA 1 core",
            "2 7:0 7:1",
            "",
        ] {
            assert!(!mirror_is_in_sync(text, 2), "{text:?}");
        }
    }

    #[test]
    fn raid1_of_device_mapper() {
        let legs = vec![place(1, 0), place(3, 0)];
        assert_eq!(raid1("raid1 3 0 region_size 1024 2 7:0 7:1 7:2 7:3"), Some(legs.clone()));
        assert_eq!(raid1("raid1 1 128 2 - 7:1 - 7:3"), Some(legs));
        for text in [
            "raid10 1 128 2 - 7:1 - 7:3",
            "raid1 1 128 2 - 7:1 - -",
            "raid1 3 0 data_offset 8 2 - 7:1 - 7:3",
            "raid1 1 128 2 - 7:1 -",
            "raid1 1 128 2 - 7:1 - 7:3 7:4",
            "raid1 1 128 0",
        ] {
            assert_eq!(raid1(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_raid_is_in_sync_when_idle_and_whole() {
        for text in ["raid1 2 AA 2048/2048 idle 0 0 -", "raid1 2 AA 2048/2048 idle 0"] {
            assert!(raid_is_in_sync(text, 2), "{text:?}");
        }
        for text in [
            "raid1 2 Aa 2048/2048 idle 0 0 -",
            "raid1 2 AD 2048/2048 idle 0 0 -",
            "raid1 2 AA 1024/2048 idle 0 0 -",
            "raid1 2 AA 2048/2048 resync 0 0 -",
            "raid1 2 AA 2048/2048 idle 0 8 -",
            "raid1 3 AAA 2048/2048 idle 0 0 -",
            "raid1 2 AA",
            "",
        ] {
            assert!(!raid_is_in_sync(text, 2), "{text:?}");
        }
    }

    #[test]
    fn clones() {
        let read = cloning("7:0 7:1 7:2 8 1 no_hydration 4 hydration_threshold 1 hydration_batch_size 1").unwrap();
        let id = |minor| DeviceId { major: 7, minor };
        assert_eq!(read, Cloning { destination: id(1), source: id(2) });
        assert_eq!(cloning("7:0 7:1 7:2"), None);
        let line = |copied, copying, mode| {
            clone_status(&format!(
                "8 16/1024 8 {copied}/512 {copying} 1 no_hydration 4 hydration_threshold 1 hydration_batch_size 1 {mode}"
            ))
        };
        assert_eq!(line(512, 0, "rw"), Some(CloneStatus::Complete));
        assert_eq!(line(511, 0, "rw"), Some(CloneStatus::Partial));
        assert_eq!(line(512, 1, "ro"), Some(CloneStatus::Partial));
        assert_eq!(line(512, 0, "Fail"), Some(CloneStatus::Failed));
        assert_eq!(line(512, 0, "rw rw"), None);
        assert_eq!(clone_status("Fail"), None);
    }
}
