//! What sysfs tells of an md array. Pure: takes the attributes by name, and is total.

use crate::sys::device::DeviceId;
use crate::units::{Bytes, Sectors};

/// More legs than any array has (`MD_SB_DISKS` of `include/uapi/linux/raid/md_p.h` is 27, and 1.x allows 384 or more).
const MAX_LEGS: usize = 4096;

/// A running, idle and whole array.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Array {
    /// The level, `raid1`.
    pub level: String,
    /// The length of a chunk; zero where the level has none.
    pub chunk: Bytes,
    /// What is used of each leg; zero where legs may differ.
    pub component: Bytes,
    /// The legs, in order.
    pub legs: Vec<Leg>,
    /// Means something for raid10 only; some levels print -1.
    layout: String,
}

/// A leg of an array.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leg {
    /// Its device.
    pub device: DeviceId,
    /// Where the array's data begins on it.
    pub offset: Sectors,
    /// How much of the array's data it holds.
    pub len: Bytes,
}

impl Array {
    /// Reads an array from its attributes.
    ///
    /// # Errors
    ///
    /// Why the array cannot be believed: it is not whole or not idle, or an attribute is missing or not understood.
    pub fn read(attribute: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let level = attribute("level").ok_or("it has no level")?;
        let is = |name: &str, allowed: &[&str]| match attribute(name) {
            Some(value) if allowed.contains(&value.as_str()) => Ok(()),
            value => Err(format!("its {name} is {}", value.as_deref().unwrap_or("not told"))),
        };
        is("array_state", &["clean", "active", "active-idle", "write-pending", "readonly", "read-auto"])?;
        is("metadata_version", &["0.90", "1.0", "1.1", "1.2"])?;
        is("reshape_position", &["none"])?;
        if !matches!(level.as_str(), "raid0" | "linear") {
            is("degraded", &["0"])?;
            is("sync_action", &["idle"])?;
        }
        if attribute("bitmap/metadata").as_deref() == Some("clustered") {
            return Err("other hosts of a cluster write to it".to_owned());
        }
        let number = |name: &str| {
            attribute(name).and_then(|value| unsigned(&value)).ok_or_else(|| format!("its {name} is not understood"))
        };
        let count = usize::try_from(number("raid_disks")?).ok().filter(|count| (1..=MAX_LEGS).contains(count));
        let legs = (0..count.ok_or("its number of legs is out of range")?).map(|slot| Leg::read(slot, attribute));
        Ok(Self {
            chunk: Bytes::new(number("chunk_size")?),
            component: kib(number("component_size")?).ok_or("its component_size is out of range")?,
            layout: attribute("layout").unwrap_or_default(),
            legs: legs.collect::<Result<_, _>>()?,
            level,
        })
    }

    /// The number of copies of a raid10 array whose copies are all near ones (`setup_geo` of `drivers/md/raid10.c`).
    pub fn near_copies(&self) -> Option<usize> {
        let layout = unsigned(&self.layout)?;
        let (near, far, rest) = (layout & 0xff, layout >> 8 & 0xff, layout >> 16);
        (near > 0 && far == 1 && rest == 0).then(|| usize::try_from(near).ok()).flatten()
    }
}

impl Leg {
    fn read(slot: usize, attribute: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let of_leg = |name: &str| attribute(&format!("rd{slot}/{name}"));
        let state = of_leg("state").ok_or_else(|| format!("leg {slot} is missing"))?;
        let whole = |word: &str| matches!(word, "in_sync" | "write_mostly" | "failfast");
        if !state.split(',').all(whole) || !state.split(',').any(|word| word == "in_sync") {
            return Err(format!("leg {slot} is {state}"));
        }
        let read = || {
            Some(Self {
                device: of_leg("block/dev")?.parse().ok()?,
                offset: Sectors::new(unsigned(&of_leg("offset")?)?),
                len: kib(unsigned(&of_leg("size")?)?)?,
            })
        };
        read().ok_or_else(|| format!("leg {slot} is not understood"))
    }
}

/// A number as the kernel prints it: `FromStr` would take a sign.
fn unsigned(word: &str) -> Option<u64> {
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok()).flatten()
}

/// md tells sizes in KiB.
fn kib(number: u64) -> Option<Bytes> {
    number.checked_mul(1024).map(Bytes::new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// A raid1 of two legs, as sysfs shows it, with some attributes replaced; an empty one is missing.
    fn read(replaced: &[(&str, &str)]) -> Result<Array, String> {
        let mut attributes = HashMap::from([
            ("level", "raid1"),
            ("array_state", "clean"),
            ("metadata_version", "1.2"),
            ("reshape_position", "none"),
            ("degraded", "0"),
            ("sync_action", "idle"),
            ("raid_disks", "2"),
            ("chunk_size", "0"),
            ("component_size", "1024"),
            ("layout", "0"),
            ("rd0/state", "in_sync"),
            ("rd0/block/dev", "7:0"),
            ("rd0/offset", "2048"),
            ("rd0/size", "1024"),
            ("rd1/state", "in_sync,write_mostly"),
            ("rd1/block/dev", "7:1"),
            ("rd1/offset", "2048"),
            ("rd1/size", "1024"),
        ]);
        attributes.extend(replaced.iter().copied());
        Array::read(&|name| attributes.get(name).filter(|value| !value.is_empty()).map(|value| (*value).to_owned()))
    }

    #[test]
    fn an_array_is_what_its_attributes_say() {
        let leg =
            |minor| Leg { device: DeviceId { major: 7, minor }, offset: Sectors::new(2048), len: Bytes::new(1 << 20) };
        let array = read(&[]).unwrap();
        assert_eq!(array.legs, [leg(0), leg(1)]);
        assert_eq!((array.level.as_str(), array.chunk, array.component), ("raid1", Bytes::ZERO, Bytes::new(1 << 20)));
        for state in ["active", "active-idle", "write-pending", "readonly", "read-auto"] {
            assert_eq!(read(&[("array_state", state)]).unwrap(), array, "{state}: writing changes nothing");
        }
    }

    #[test]
    fn an_array_that_is_not_whole_and_idle_is_refused() {
        for (name, value) in [
            ("level", ""),
            ("array_state", "inactive"),
            ("array_state", "broken"),
            ("metadata_version", "external:imsm"),
            ("metadata_version", "none"),
            ("reshape_position", "4096"),
            ("degraded", "1"),
            ("degraded", ""),
            ("sync_action", "resync"),
            ("sync_action", "check"),
            ("sync_action", ""),
            ("bitmap/metadata", "clustered"),
            ("raid_disks", "3 (2)"),
            ("raid_disks", "3"),
            ("raid_disks", "0"),
            ("raid_disks", "99999999999999999999"),
            ("component_size", "18446744073709551615"),
            ("rd1/state", "faulty"),
            ("rd1/state", "in_sync,want_replacement"),
            ("rd1/state", "spare"),
            ("rd1/state", "write_mostly"),
            ("rd1/state", ""),
            ("rd1/block/dev", "x"),
            ("rd1/offset", "+1"),
            ("rd1/size", ""),
        ] {
            assert!(read(&[(name, value)]).is_err(), "{name} {value:?}");
        }
    }

    #[test]
    fn levels_without_redundancy_tell_less() {
        let quiet = [("degraded", ""), ("sync_action", ""), ("level", "raid0"), ("chunk_size", "65536")];
        assert_eq!(read(&quiet).unwrap().chunk, Bytes::new(65536));
        assert!(read(&[("level", "raid0"), ("degraded", ""), ("array_state", "clear")]).is_err());
    }

    #[test]
    fn layouts_of_raid10() {
        let copies = |layout: u32| read(&[("layout", &layout.to_string())]).unwrap().near_copies();
        for (layout, near) in
            [(0x102, Some(2)), (0x103, Some(3)), (0x101, Some(1)), (0x201, None), (0x202, None), (0x1_0201, None)]
        {
            assert_eq!(copies(layout), near, "{layout:#x}");
        }
        assert_eq!(copies(0x100), None);
        assert_eq!(copies(0x2_0102), None);
        assert_eq!(read(&[("layout", "-1")]).unwrap().near_copies(), None);
    }
}
