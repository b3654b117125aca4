//! Parser of the attributes that sysfs has of an md array (`Documentation/admin-guide/md.rst`).

use std::io;

use crate::reason::DenseReason;
use crate::sys::device::DeviceId;
use crate::units::{Bytes, Sectors};

/// The limit of legs, more than any array has (`MD_SB_DISKS` of `include/uapi/linux/raid/md_p.h` is 27, and metadata of
/// version 1.x allows 384 or more).
const MAX_LEGS: usize = 4096;

/// Reads an attribute by its name. `None` when the array has no such attribute, an error when it cannot be read.
pub type Attribute<'a> = &'a dyn Fn(&str) -> io::Result<Option<String>>;

/// An array that runs, is idle and has all its legs in sync.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Array {
    /// The level, `raid1`.
    pub level: String,
    /// The length of a chunk; zero where the level has none.
    pub chunk: Bytes,
    /// The length that is used of each leg; zero where legs may differ.
    pub component: Bytes,
    /// The legs, in order.
    pub legs: Vec<Leg>,
    /// The layout of a raid10 array. It has no meaning for other levels, of which some print -1.
    layout: String,
}

/// A leg of an array.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Leg {
    /// Its device.
    pub device: DeviceId,
    /// The start of the array's data on it.
    pub offset: Sectors,
    /// How much of the array's data it holds.
    pub len: Bytes,
}

impl Array {
    /// Reads an array from its attributes.
    ///
    /// # Errors
    /// When the array is degraded or not idle, or an attribute is missing or not understood.
    pub fn read(attribute: Attribute<'_>) -> Result<Self, DenseReason> {
        let attribute =
            |name: &str| attribute(name).map_err(|error| DenseReason::cannot(format!("read its {name}"), &error));
        let level = attribute("level")?.ok_or_else(|| missing("level"))?;
        let is = |name: &str, allowed: &[&str]| match attribute(name)? {
            Some(value) if allowed.contains(&value.as_str()) => Ok(()),
            Some(value) => Err(DenseReason::State(format!("its {name} is {value}").into())),
            None => Err(missing(name)),
        };
        is("array_state", &["clean", "active", "active-idle", "write-pending", "readonly", "read-auto"])?;
        is("metadata_version", &["0.90", "1.0", "1.1", "1.2"])?;
        is("reshape_position", &["none"])?;
        if !matches!(level.as_str(), "raid0" | "linear") {
            is("degraded", &["0"])?;
            is("sync_action", &["idle"])?;
        }
        if attribute("bitmap/metadata")?.as_deref() == Some("clustered") {
            return Err("other hosts of a cluster write to it".into());
        }
        let number = |name: &str| {
            let value = attribute(name)?.ok_or_else(|| missing(name))?;
            unsigned(&value).ok_or_else(|| not_understood(format!("its {name} is"), &value))
        };
        let count = usize::try_from(number("raid_disks")?).ok().filter(|count| (1..=MAX_LEGS).contains(count));
        let legs = (0..count.ok_or("its number of legs is out of range")?).map(|slot| Leg::read(slot, &attribute));
        Ok(Self {
            chunk: Bytes::new(number("chunk_size")?),
            component: kib(number("component_size")?).ok_or("its component_size is out of range")?,
            layout: attribute("layout")?.unwrap_or_default(),
            legs: legs.collect::<Result<_, _>>()?,
            level,
        })
    }

    /// The number of copies of each chunk in a raid10 array of layout "near"; `None` for other layouts (`setup_geo` of
    /// `drivers/md/raid10.c`).
    pub fn near_copies(&self) -> Option<usize> {
        let layout = unsigned(&self.layout)?;
        let (near, far, rest) = (layout & 0xff, layout >> 8 & 0xff, layout >> 16);
        (near > 0 && far == 1 && rest == 0).then(|| usize::try_from(near).ok()).flatten()
    }
}

impl Leg {
    fn read(slot: usize, attribute: &dyn Fn(&str) -> Result<Option<String>, DenseReason>) -> Result<Self, DenseReason> {
        let of_leg = |name: &str| attribute(&format!("rd{slot}/{name}"));
        let state = of_leg("state")?.ok_or_else(|| DenseReason::State(format!("leg {slot} is missing").into()))?;
        let harmless = |word: &str| matches!(word, "in_sync" | "write_mostly" | "failfast");
        if !state.split(',').all(harmless) || !state.split(',').any(|word| word == "in_sync") {
            return Err(DenseReason::State(format!("leg {slot} is {state}").into()));
        }
        let [device, offset, len] = [of_leg("block/dev")?, of_leg("offset")?, of_leg("size")?];
        let text = [&device, &offset, &len].map(|value| value.as_deref().unwrap_or("-")).join(" ");
        let read = || {
            Some(Self {
                device: device?.parse().ok()?,
                offset: Sectors::new(unsigned(&offset?)?),
                len: kib(unsigned(&len?)?)?,
            })
        };
        read().ok_or_else(|| not_understood(format!("leg {slot} is"), &text))
    }
}

fn missing(attribute: &str) -> DenseReason {
    format!("it has no attribute {attribute}").into()
}

fn not_understood(what: String, text: &str) -> DenseReason {
    DenseReason::NotUnderstood { what: what.into(), text: text.to_owned() }
}

/// Parses a number as the kernel prints it: `FromStr` alone would accept a sign.
fn unsigned(word: &str) -> Option<u64> {
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok()).flatten()
}

/// The size of that many KiB, the unit of md's sizes.
fn kib(number: u64) -> Option<Bytes> {
    number.checked_mul(1024).map(Bytes::new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Reads a raid1 of two legs as sysfs shows it, with some attributes replaced. A replacement that is empty stands
    /// for an attribute that is missing, and `?` for one that cannot be read.
    fn read(replaced: &[(&str, &str)]) -> Result<Array, DenseReason> {
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
        Array::read(&|name| match attributes.get(name) {
            Some(&"?") => Err(io::Error::from_raw_os_error(libc::EMFILE)),
            value => Ok(value.filter(|value| !value.is_empty()).map(|value| (*value).to_owned())),
        })
    }

    #[test]
    fn an_unreadable_attribute_is_an_error_and_a_missing_one_may_not_be() {
        assert!(read(&[("bitmap/metadata", "")]).is_ok());
        assert!(read(&[("bitmap/metadata", "internal")]).is_ok());
        for name in ["level", "bitmap/metadata", "layout", "rd1/offset"] {
            let refused = read(&[(name, "?")]).unwrap_err();
            assert_eq!(refused.to_string(), format!("cannot read its {name}: Too many open files"));
        }
    }

    #[test]
    fn an_array_is_read_from_its_attributes() {
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
    fn an_array_that_is_degraded_or_not_idle_is_refused() {
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
    fn levels_without_redundancy_have_fewer_attributes() {
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
