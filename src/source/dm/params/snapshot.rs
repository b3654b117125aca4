//! Snapshots with a copy-on-write store.

use super::{Words, fraction};
use crate::sys::device::DeviceId;
use crate::units::Sectors;

/// The arguments of `snapshot`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// What is read where there is no exception.
    pub origin: DeviceId,
    /// The device with the exceptions.
    pub cow: DeviceId,
    /// Whether the exceptions are listed there.
    pub store: Store,
    /// The unit of exceptions.
    pub chunk: Sectors,
}

/// Where a snapshot lists its exceptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// On the device with the exceptions.
    Persistent,
    /// In the kernel's memory only.
    Transient,
}

/// Reads `<origin> <COW device> <P|PO|N> <chunk>`. With features it does more to the store than is known here.
pub fn snapshot(params: &str) -> Option<Snapshot> {
    let mut words = Words::new(params);
    let (origin, cow) = (words.device()?, words.device()?);
    let store = match words.word()? {
        "P" | "PO" => Store::Persistent,
        "N" => Store::Transient,
        _ => return None,
    };
    let chunk = words.sectors()?;
    words.end(Snapshot { origin, cow, store, chunk })
}

/// Reads the status of `snapshot`, `<allocated>/<size> <of these metadata>`: what is allocated. An invalid or overflown
/// snapshot has a word instead, and is `None`.
pub fn allocated(status: &str) -> Option<Sectors> {
    let mut words = Words::new(status);
    let (allocated, _size) = fraction(words.word()?)?;
    words.sectors()?;
    words.end(Sectors::new(allocated))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots() {
        let id = |minor| DeviceId { major: 7, minor };
        let expected = Snapshot { origin: id(0), cow: id(1), store: Store::Persistent, chunk: Sectors::new(8) };
        assert_eq!(snapshot("7:0 7:1 P 8"), Some(expected));
        assert_eq!(snapshot("7:0 7:1 PO 8"), Some(expected));
        assert_eq!(snapshot("7:0 7:1 N 8"), Some(Snapshot { store: Store::Transient, ..expected }));
        for text in ["7:0 7:1 X 8", "7:0 7:1 P", "7:0 P 8", "7:0 7:1 P 8 1 discard_zeroes_cow", ""] {
            assert_eq!(snapshot(text), None, "{text:?}");
        }
    }

    #[test]
    fn only_a_valid_snapshot_tells_what_is_allocated() {
        assert_eq!(allocated("24/2048 16"), Some(Sectors::new(24)));
        for text in ["Invalid", "Overflow", "Merge failed", "Unknown", "24/2048", "24 2048 16", "24/2048 16 1", ""] {
            assert_eq!(allocated(text), None, "{text:?}");
        }
    }
}
