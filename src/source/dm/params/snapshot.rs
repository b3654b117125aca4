//! Arguments and status lines of snapshots with a copy-on-write store.

use super::{Words, fraction};
use crate::sys::device::DeviceId;
use crate::units::Sectors;

/// The arguments of `snapshot`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotParams {
    /// The device that chunks without an exception are read from.
    pub origin: DeviceId,
    /// The store: the device with the exceptions.
    pub cow: DeviceId,
    /// Where the exceptions are listed.
    pub store: Store,
    /// The length of a chunk, which is the unit of exceptions.
    pub chunk: Sectors,
}

/// The place of the list of a snapshot's exceptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// On the store (`P` or `PO`).
    Persistent,
    /// In the kernel's memory only (`N`).
    Transient,
}

/// Parses the arguments of `snapshot`, `<origin> <COW device> <P|PO|N> <chunk>`. A line with features is `None`:
/// features change how the store is used.
pub fn snapshot(params: &str) -> Option<SnapshotParams> {
    let mut words = Words::new(params);
    let (origin, cow) = (words.device()?, words.device()?);
    let store = match words.word()? {
        "P" | "PO" => Store::Persistent,
        "N" => Store::Transient,
        _ => return None,
    };
    let chunk = words.sectors()?;
    words.end(SnapshotParams { origin, cow, store, chunk })
}

/// Parses the status of `snapshot`, `<allocated>/<size> <of these metadata>`. Returns how much of the store is
/// allocated. The status of a snapshot that is invalid or has overflowed is a word, and `None`.
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
        let expected = SnapshotParams { origin: id(0), cow: id(1), store: Store::Persistent, chunk: Sectors::new(8) };
        assert_eq!(snapshot("7:0 7:1 P 8"), Some(expected));
        assert_eq!(snapshot("7:0 7:1 PO 8"), Some(expected));
        assert_eq!(snapshot("7:0 7:1 N 8"), Some(SnapshotParams { store: Store::Transient, ..expected }));
        for text in ["7:0 7:1 X 8", "7:0 7:1 P", "7:0 P 8", "7:0 7:1 P 8 1 discard_zeroes_cow", ""] {
            assert_eq!(snapshot(text), None, "{text:?}");
        }
    }

    #[test]
    fn only_a_valid_snapshot_has_an_allocated_size() {
        assert_eq!(allocated("24/2048 16"), Some(Sectors::new(24)));
        for text in ["Invalid", "Overflow", "Merge failed", "Unknown", "24/2048", "24 2048 16", "24/2048 16 1", ""] {
            assert_eq!(allocated(text), None, "{text:?}");
        }
    }
}
