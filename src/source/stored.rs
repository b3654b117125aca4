//! Extents that are stored in metadata, and read from there in one step: the mapping tree of a thin volume, the store of a
//! snapshot.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::map::{Extent, ExtentKind, FillMap, HoleMap};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// Shorter extents are not a hole for [`HoleMap::is_sparse`].
const SHORTEST_HOLE: Bytes = Bytes::new(4096);

/// Reads the extents of a device from its metadata.
pub trait LoadExtents: Send + Sync {
    /// Reads all of them.
    ///
    /// # Errors
    /// Why they cannot be known.
    fn load(&self) -> Result<FillMap, DenseReason>;
}

/// The extents of one device, before and after they are loaded.
///
/// Before that, and after a failure, all of it is data. A question never loads them.
pub struct StoredExtents {
    len: Bytes,
    /// The unit of allocation.
    block: Bytes,
    /// Bytes that the device's status reports as allocated.
    allocated: Option<Bytes>,
    source: Box<dyn LoadExtents>,
    loaded: OnceLock<Result<FillMap, DenseReason>>,
}

impl StoredExtents {
    /// The extents of a device of `len` bytes that is allocated in units of `block` bytes. `allocated` is what is known
    /// of it without loading.
    pub fn new(len: Bytes, block: Bytes, allocated: Option<Bytes>, source: impl LoadExtents + 'static) -> Arc<Self> {
        Arc::new(Self { len, block, allocated, source: Box::new(source), loaded: OnceLock::new() })
    }

    /// Reads the extents, unless that was done before.
    ///
    /// # Errors
    /// Why they cannot be known, the first time and each time after it.
    pub fn load(&self) -> Result<&FillMap, &DenseReason> {
        self.loaded.get_or_init(|| self.source.load()).as_ref()
    }

    fn map(&self) -> Option<&FillMap> {
        self.loaded.get()?.as_ref().ok()
    }
}

impl HoleMap for StoredExtents {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        match self.map() {
            Some(map) => map.extent_at(offset),
            None if offset < self.len => Extent { end: self.len, kind: ExtentKind::Data },
            None => Extent::outside(offset),
        }
    }

    fn next_data(&self, offset: Bytes) -> Bytes {
        self.map().map_or(offset.min(self.len), |map| map.next_data(offset))
    }

    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        self.map()?.next_hole(offset)
    }

    fn count_data(&self, range: &Range<Bytes>, unit: Bytes) -> Option<Bytes> {
        self.map()?.count_data(range, unit)
    }

    fn allocated(&self) -> Option<Bytes> {
        match self.loaded.get() {
            Some(Ok(map)) => map.allocated(),
            Some(Err(_)) => Some(self.len),
            None => self.allocated,
        }
    }

    fn is_sparse(&self) -> Option<bool> {
        let not_allocated = self.len.saturating_sub(self.allocated()?);
        // What is not allocated is whole units, and perhaps a part of one at the end of the device.
        match not_allocated {
            Bytes::ZERO => Some(false),
            some if self.block >= SHORTEST_HOLE && some >= self.block => Some(true),
            _ => None,
        }
    }

    fn dense_because(&self) -> Option<DenseReason> {
        self.loaded.get()?.as_ref().err().cloned()
    }

    fn is_guarded(&self) -> bool {
        true
    }

    fn fill_map(&self) -> Option<&FillMap> {
        self.map()
    }

    fn memory(&self) -> Bytes {
        self.map().map_or(Bytes::ZERO, HoleMap::memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{Block, FillBuilder};

    const LEN: Bytes = Bytes::new(1 << 20);
    const BLOCK: Bytes = Bytes::new(64 << 10);

    struct OneBlock;

    impl LoadExtents for OneBlock {
        fn load(&self) -> Result<FillMap, DenseReason> {
            let builder = FillBuilder::new(LEN, BLOCK);
            builder.filler().set_range(Block::new(1)..Block::new(2));
            builder.finish().ok_or_else(|| "too large".into())
        }
    }

    struct Unreadable;

    impl LoadExtents for Unreadable {
        fn load(&self) -> Result<FillMap, DenseReason> {
            Err(DenseReason::NotNow("the pool is suspended".into()))
        }
    }

    #[test]
    fn before_loading_all_is_data_and_the_status_is_known() {
        let extents = StoredExtents::new(LEN, BLOCK, Some(BLOCK), OneBlock);
        assert_eq!(extents.extent_at(Bytes::ZERO), Extent { end: LEN, kind: ExtentKind::Data });
        assert_eq!((extents.next_data(Bytes::ZERO), extents.next_hole(Bytes::ZERO)), (Bytes::ZERO, None));
        assert_eq!((extents.allocated(), extents.is_sparse()), (Some(BLOCK), Some(true)));
        assert_eq!((extents.dense_because(), extents.memory()), (None, Bytes::ZERO));
    }

    #[test]
    fn loading_gives_the_extents_and_their_memory() {
        let extents = StoredExtents::new(LEN, BLOCK, None, OneBlock);
        assert_eq!(extents.is_sparse(), None);
        assert!(extents.load().is_ok());
        assert_eq!(extents.extent_at(Bytes::ZERO), Extent { end: BLOCK, kind: ExtentKind::Hole });
        assert_eq!((extents.allocated(), extents.is_sparse()), (Some(BLOCK), Some(true)));
        assert!(extents.memory() > Bytes::ZERO);
    }

    #[test]
    fn what_cannot_be_loaded_is_data_with_a_reason() {
        let extents = StoredExtents::new(LEN, BLOCK, Some(BLOCK), Unreadable);
        assert!(extents.load().is_err_and(DenseReason::is_temporary));
        assert_eq!(extents.extent_at(Bytes::ZERO), Extent { end: LEN, kind: ExtentKind::Data });
        assert_eq!((extents.allocated(), extents.is_sparse()), (Some(LEN), Some(false)));
        assert_eq!(extents.dense_because(), Some(DenseReason::NotNow("the pool is suspended".into())));
    }

    #[test]
    fn units_below_4096_bytes_prove_no_hole() {
        let extents = StoredExtents::new(LEN, Bytes::new(512), Some(Bytes::new(512)), OneBlock);
        assert_eq!(extents.is_sparse(), None);
    }
}
