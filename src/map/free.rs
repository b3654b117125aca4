//! The used space of a file system as a map.

use std::ops::Range;

use super::{Extent, ExtentKind, FillMap, HoleMap};
use crate::units::Bytes;

/// A fill map whose blocks that are not mapped are the free space of a file system: its holes are [`ExtentKind::Free`].
pub struct FreeSpace(FillMap);

impl FreeSpace {
    /// The map of a file system whose used blocks are the mapped blocks of `used`.
    pub const fn new(used: FillMap) -> Self {
        Self(used)
    }
}

impl HoleMap for FreeSpace {
    fn len(&self) -> Bytes {
        self.0.len()
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let extent = self.0.extent_at(offset);
        Extent { kind: if extent.kind.is_data() { ExtentKind::Data } else { ExtentKind::Free }, ..extent }
    }

    fn next_data(&self, offset: Bytes) -> Bytes {
        self.0.next_data(offset)
    }

    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        self.0.next_hole(offset)
    }

    fn count_data(&self, range: &Range<Bytes>, unit: Bytes) -> Option<Bytes> {
        self.0.count_data(range, unit)
    }

    fn allocated(&self) -> Option<Bytes> {
        self.0.allocated()
    }

    fn memory(&self) -> Bytes {
        self.0.memory()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{Block, FillBuilder, view};

    #[test]
    fn unmapped_blocks_are_free() {
        let builder = FillBuilder::new(Bytes::new(10_000), Bytes::new(1000));
        builder.filler().set_range(Block::new(2)..Block::new(4));
        let map = FreeSpace::new(builder.finish().expect("few chunks"));
        let runs: Vec<_> = view::runs(&map, Bytes::new(1), Bytes::ZERO..map.len())
            .map(|(start, extent)| (start.get(), extent.end.get(), extent.kind))
            .collect();
        let (data, free) = (ExtentKind::Data, ExtentKind::Free);
        assert_eq!(runs, [(0, 2000, free), (2000, 4000, data), (4000, 10_000, free)]);
        assert_eq!(map.allocated(), Some(Bytes::new(2000)));
        assert_eq!(map.next_data(Bytes::ZERO), Bytes::new(2000));
    }
}
