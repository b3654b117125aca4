//! The arguments of targets, as the kernel prints them (`Documentation/admin-guide/device-mapper/`). Pure and total.

use crate::sys::device::DeviceId;
use crate::units::Sectors;

/// A place on a lower device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The device.
    pub device: DeviceId,
    /// Where on it.
    pub start: Sectors,
}

/// The arguments of `striped`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Striped {
    /// The length of one chunk.
    pub chunk: Sectors,
    /// Where each leg lies, in order.
    pub legs: Vec<Place>,
}

/// Reads `<device> <start>`.
pub fn linear(params: &str) -> Option<Place> {
    let mut words = params.split_ascii_whitespace();
    let place = next_place(&mut words)?;
    words.next().is_none().then_some(place)
}

/// Reads `<number of stripes> <chunk> (<device> <start>)...`.
pub fn striped(params: &str) -> Option<Striped> {
    let mut words = params.split_ascii_whitespace();
    let count: usize = words.next()?.parse().ok()?;
    let chunk = next_sectors(&mut words)?;
    let mut legs = Vec::new();
    for _ in 0..count {
        legs.push(next_place(&mut words)?);
    }
    (words.next().is_none() && count > 0 && chunk.get() > 0).then_some(Striped { chunk, legs })
}

/// Reads `<device> <start>` off the front.
fn next_place<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<Place> {
    Some(Place { device: words.next()?.parse().ok()?, start: next_sectors(words)? })
}

fn next_sectors<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<Sectors> {
    words.next()?.parse().ok().map(Sectors::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(major: u32, minor: u32, start: u64) -> Place {
        Place { device: DeviceId { major, minor }, start: Sectors::new(start) }
    }

    #[test]
    fn linear_takes_a_device_and_a_start() {
        assert_eq!(linear("7:0 2048"), Some(place(7, 0, 2048)));
        for text in ["", "7:0", "7:0 x", "7:0 -1", "7:0 1 2", "/dev/sda 0", "7:0 18446744073709551616"] {
            assert_eq!(linear(text), None, "{text:?}");
        }
    }

    #[test]
    fn striped_takes_as_many_legs_as_it_says() {
        let striped_two = striped("2 128 7:0 0 254:300 8").unwrap();
        assert_eq!(striped_two.chunk, Sectors::new(128));
        assert_eq!(striped_two.legs, [place(7, 0, 0), place(254, 300, 8)]);
        for text in ["", "2 128 7:0 0", "1 128 7:0 0 7:1 0", "0 128", "1 0 7:0 0", "99999999999 128 7:0 0"] {
            assert_eq!(striped(text), None, "{text:?}");
        }
    }
}
