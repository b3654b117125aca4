//! Texts of sysfs: md arrays, the I/O counters and the name of a device, device numbers; the records of daemons; and the times of
//! devices.
//!
//! Invariant: no text makes a parser panic. An md array has as many legs as its attribute `raid_disks` states, and
//! each leg has a device, an offset and a size. The name of a device is a path below `/dev`. A device number that is parsed and
//! formatted again is the same. So are the times of devices, of which there are no more than the limit.

use std::collections::HashMap;

use blkholefs::testing::fs::change::records::{LONGEST_TEXT, Records};
use blkholefs::testing::mount::record;
use blkholefs::testing::source::md::array::Array;
use blkholefs::testing::sys::boot::BootId;
use blkholefs::testing::sys::device::DeviceId;
use blkholefs::testing::sys::sysfs;
use blkholefs::testing::units::Sectors;

pub fn run(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    array(&text);
    if let Some((read, Some(counters))) = sysfs::parse_stat(&text) {
        let words: Vec<u64> = text.split_ascii_whitespace().map_while(|word| word.parse().ok()).collect();
        assert_eq!((read, counters.writes, counters.write_sectors), (Sectors::new(words[2]), words[4], words[6]));
        assert_eq!(counters.discards, words.get(11).copied().unwrap_or(0));
        assert_eq!(counters.discard_sectors, words.get(13).copied().unwrap_or(0));
    }
    if let Some(name) = sysfs::name_in(input) {
        assert!(!name.starts_with('/') && name.split('/').all(|part| !part.is_empty() && part != ".."));
        assert!(text.contains(&format!("DEVNAME={name}")));
    }
    if let Ok(id) = text.parse::<DeviceId>() {
        assert_eq!(id.to_string().parse(), Ok(id));
        let is_kernels = id.major < 1 << 12 && id.minor < 1 << 20;
        assert!(!is_kernels || DeviceId::from_huge(id.to_huge()) == id);
    }
    if let Some(record) = record::RecordText::parse(input) {
        assert!(record.daemon.as_raw() > 0);
        assert_eq!(record::RecordText::parse(&record.format()), Some(record));
    }
    times(&text);
}

/// Parses the text as the times of devices in the boot that the corpus has.
fn times(text: &str) {
    let boot = BootId::parse("0b1c2d3e-0000-4000-8000-0123456789ab").expect("a UUID");
    let records = Records::parse(text, boot);
    let again = records.text(boot);
    assert!(again.len() <= LONGEST_TEXT && Records::parse(&again, boot) == records);
    let lines = again.lines().count() - 1;
    assert!(lines == 0 || lines == text.lines().count() - 1, "all devices or none");
}

/// Parses the text as the attributes of an array, one line `NAME=VALUE` for each. The first line with a name counts.
fn array(text: &str) {
    let mut attributes = HashMap::new();
    for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
        attributes.entry(name).or_insert(value);
    }
    let attribute = |name: &str| attributes.get(name).map(|value| (*value).to_owned());
    let Ok(array) = Array::read(&|name| Ok(attribute(name))) else { return };
    assert!(!array.legs.is_empty());
    assert_eq!(attribute("raid_disks").and_then(|count| count.parse().ok()), Some(array.legs.len()));
    assert!(array.legs.len() <= text.lines().count() / 4);
    assert!(array.component.get().is_multiple_of(1024));
    assert!(array.legs.iter().all(|leg| leg.len.get().is_multiple_of(1024)));
    assert!(array.near_copies().is_none_or(|copies| (1..256).contains(&copies)));
    assert_eq!(attribute("reshape_position").as_deref(), Some("none"));
    assert!(
        attribute("degraded").is_none_or(|degraded| degraded == "0" || matches!(&*array.level, "raid0" | "linear"))
    );
}
