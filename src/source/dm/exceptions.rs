//! Parser of the persistent store of a snapshot: the list of chunks that have an exception.
//!
//! The format is that of `drivers/md/dm-snap-persistent.c`. All numbers are little-endian. The store is a row of
//! chunks: a header, then areas. An area is one chunk of entries and then one chunk of data for each entry. The list
//! ends with the first entry that has no data chunk.

use crate::map::Block;
use crate::units::{Bytes, Sectors};

/// `SNAP_MAGIC`.
const MAGIC: u32 = 0x7041_6e53;
/// `SNAPSHOT_DISK_VERSION`.
const VERSION: u32 = 1;
/// `struct disk_exception`: the chunk of the snapshot, and the chunk of the store.
const ENTRY: usize = 16;
/// Chunks before the data of the first area: the header and the area's entries.
const FIRST_FREE: u64 = 2;

/// The positions of the parts of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreLayout {
    chunk: Bytes,
    entries: u64,
}

/// One exception: a chunk of the snapshot that is not read from the origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// The chunk of the snapshot.
    pub chunk: Block,
    /// The chunk of the store that holds its bytes. The kernel gives each exception another one, in ascending order
    /// (`persistent_prepare_exception`).
    pub stored: u64,
}

/// The entries of one area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// The exceptions, in the order in which they were completed.
    pub exceptions: Vec<Exception>,
    /// Whether the list goes on in the next area.
    pub is_full: bool,
}

impl StoreLayout {
    /// The layout of a store with chunks of this length. `None` unless it is a power of two, as the kernel requires.
    pub fn new(chunk: Sectors) -> Option<Self> {
        // The kernel allows up to 2^31 sectors. A chunk is read at once, so here the limit is 128 MiB.
        let chunk = chunk.bytes().filter(|chunk| chunk.get().is_power_of_two() && chunk.get() <= 128 << 20)?;
        Some(Self { chunk, entries: chunk.get() / 16 })
    }

    /// The length of a chunk.
    pub fn chunk(self) -> Bytes {
        self.chunk
    }

    /// The position of the entries of an area. `None` when it is out of range.
    pub fn area(self, index: u64) -> Option<Bytes> {
        let chunk = self.entries.checked_add(1)?.checked_mul(index)?.checked_add(1)?;
        chunk.checked_mul(self.chunk.get()).map(Bytes::new)
    }

    /// The number of exceptions of a store of which `allocated` is in use. `None` when no number of exceptions has that
    /// size. They are those whose chunks of the store lie below that size.
    ///
    /// The kernel allocates the chunks of an exception before it begins to copy, and the entries of an area as soon as
    /// the one before is full (`persistent_prepare_exception`).
    pub fn exceptions(self, allocated: Sectors) -> Option<u64> {
        let allocated = allocated.bytes()?;
        let used = (allocated.get() / self.chunk.get()).checked_sub(FIRST_FREE)?;
        let whole = allocated.align_down(self.chunk) == allocated;
        let stride = self.entries + 1;
        // The kernel allocates the entries of the next area together with the last exception of a full one.
        (whole && used % stride != self.entries).then(|| used / stride * self.entries + used % stride)
    }

    /// Whether `data`, the first chunk of a store, is the header of a valid store with this layout.
    pub fn is_header(self, data: &[u8]) -> bool {
        let field = |at: usize| Some(u32::from_le_bytes(*data.get(at..)?.first_chunk()?));
        let chunk = |sectors| Sectors::new(u64::from(sectors)).bytes();
        field(0) == Some(MAGIC)
            && field(4) == Some(1)
            && field(8) == Some(VERSION)
            && field(12).and_then(chunk) == Some(self.chunk)
    }
}

/// Parses the entries of an area.
pub fn area(data: &[u8]) -> Area {
    let (entries, _) = data.as_chunks::<ENTRY>();
    let exceptions = entries.iter().map_while(|entry| {
        let (old, new) = entry.split_first_chunk::<8>()?;
        let (chunk, stored) = (Block::new(u64::from_le_bytes(*old)), u64::from_le_bytes(*new.first_chunk()?));
        (stored != 0).then_some(Exception { chunk, stored })
    });
    let exceptions: Vec<_> = exceptions.collect();
    Area { is_full: !entries.is_empty() && exceptions.len() == entries.len(), exceptions }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks of 4 KiB: 256 entries in an area.
    fn layout() -> StoreLayout {
        StoreLayout::new(Sectors::new(8)).unwrap()
    }

    #[test]
    fn chunks_are_powers_of_two_of_a_sane_size() {
        for (sectors, fits) in [(0, false), (1, true), (8, true), (12, false), (1 << 18, true), (1 << 31, false)] {
            assert_eq!(StoreLayout::new(Sectors::new(sectors)).is_some(), fits, "{sectors}");
        }
        assert_eq!(StoreLayout::new(Sectors::new(u64::MAX)), None);
    }

    #[test]
    fn areas_lie_one_stride_apart() {
        assert_eq!(layout().area(0), Some(Bytes::new(4096)));
        assert_eq!(layout().area(1), Some(Bytes::new(258 * 4096)));
        assert_eq!(layout().area(u64::MAX), None);
    }

    /// Compares with the kernel's way to allocate, one exception after the other.
    #[test]
    fn the_number_of_exceptions_follows_from_what_is_allocated() {
        let mut next_free = 2;
        for exceptions in 0..2000 {
            assert_eq!(layout().exceptions(Sectors::new(next_free * 8)), Some(exceptions));
            next_free += 1;
            if next_free % 257 == 1 {
                next_free += 1;
            }
        }
        for sectors in [0, 8, 17, 258 * 8, u64::MAX] {
            assert_eq!(layout().exceptions(Sectors::new(sectors)), None, "{sectors}");
        }
    }

    fn header(fields: [u32; 4]) -> Vec<u8> {
        fields.iter().flat_map(|field| field.to_le_bytes()).collect()
    }

    #[test]
    fn headers() {
        assert!(layout().is_header(&header([MAGIC, 1, 1, 8])));
        for fields in [[0, 1, 1, 8], [MAGIC, 0, 1, 8], [MAGIC, 1, 2, 8], [MAGIC, 1, 1, 16]] {
            assert!(!layout().is_header(&header(fields)), "{fields:?}");
        }
        assert!(!layout().is_header(&header([MAGIC, 1, 1, 8])[..15]));
    }

    fn entries(list: &[(u64, u64)]) -> Vec<u8> {
        list.iter().flat_map(|(old, new)| [old.to_le_bytes(), new.to_le_bytes()].concat()).collect()
    }

    #[test]
    fn a_list_ends_with_the_first_entry_without_data() {
        let of = |list: &[(u64, u64)]| -> Vec<Exception> {
            list.iter().map(|(old, new)| Exception { chunk: Block::new(*old), stored: *new }).collect()
        };
        let read = area(&entries(&[(7, 2), (0, 3), (5, 0), (6, 4)]));
        assert_eq!(read, Area { exceptions: of(&[(7, 2), (0, 3)]), is_full: false });
        let read = area(&entries(&[(7, 2), (u64::MAX, 3)]));
        assert_eq!(read, Area { exceptions: of(&[(7, 2), (u64::MAX, 3)]), is_full: true });
        assert_eq!(area(&[1; 15]), Area { exceptions: vec![], is_full: false });
        assert_eq!(area(&[]), Area { exceptions: vec![], is_full: false });
    }

    #[test]
    fn no_bytes_make_the_parser_panic() {
        use proptest::prelude::*;
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        runner
            .run(&(proptest::collection::vec(any::<u8>(), 0..600), any::<u64>(), 0..19_u32), |(data, number, power)| {
                let read = area(&data);
                assert!(read.exceptions.len() <= data.len() / ENTRY);
                assert!(!read.is_full || read.exceptions.len() == data.len() / ENTRY);
                let layout = StoreLayout::new(Sectors::new(1_u64 << power)).unwrap();
                let _ = (layout.is_header(&data), layout.area(number), layout.exceptions(Sectors::new(number)));
                Ok(())
            })
            .unwrap();
    }
}
