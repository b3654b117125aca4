//! What changed in a device since an older snapshot of it.

use std::ops::Range;

use super::{Extent, ExtentKind, FillMap, HoleMap};
use crate::units::Bytes;

/// What changed in a device since an older snapshot of it, as a map of the device.
///
/// | kind | what is true of the range |
/// |---|---|
/// | [`ExtentKind::Data`] | it may differ from the snapshot: read it |
/// | [`ExtentKind::Hole`] | it reads as zeros now, and may differ from the snapshot |
/// | [`ExtentKind::Unchanged`] | it is proven to equal the snapshot, and lies inside of the snapshot |
///
/// A range may be data without a change, and never the other way round: "unchanged" is a promise as strong as "hole".
pub struct ChangeMap {
    /// Data: what may differ.
    changed: FillMap,
    /// Data: what reads as zeros now and may have been something else.
    cleared: FillMap,
}

impl ChangeMap {
    /// The map of a device. Data of `changed` is what may differ from the snapshot. Data of `cleared` is what reads as zeros
    /// now, and may have been something else; where both say so, the range counts as changed. All else is unchanged.
    /// `None` if the two maps have different lengths.
    pub fn new(changed: FillMap, cleared: FillMap) -> Option<Self> {
        (changed.len() == cleared.len()).then_some(Self { changed, cleared })
    }
}

impl HoleMap for ChangeMap {
    fn len(&self) -> Bytes {
        self.changed.len()
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let changed = self.changed.extent_at(offset);
        if changed.kind.is_data() {
            return changed;
        }
        let cleared = self.cleared.extent_at(offset);
        let kind = if cleared.kind.is_data() { ExtentKind::Hole } else { ExtentKind::Unchanged };
        Extent { end: changed.end.min(cleared.end), kind }
    }

    fn next_data(&self, offset: Bytes) -> Bytes {
        self.changed.next_data(offset)
    }

    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        self.changed.next_hole(offset)
    }

    fn allocated(&self) -> Option<Bytes> {
        self.changed.allocated()
    }

    fn memory(&self) -> Bytes {
        self.changed.memory().saturating_add(self.cleared.memory())
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]
mod tests {
    use super::*;
    use crate::map::{Block, FillBuilder};

    const BLOCK: u64 = 64 << 10;

    fn fill(blocks: u64, ranges: &[Range<u64>]) -> FillMap {
        let builder = FillBuilder::new(Bytes::new(blocks * BLOCK), Bytes::new(BLOCK));
        let mut filler = builder.filler();
        ranges.iter().for_each(|range| filler.set_range(Block::new(range.start)..Block::new(range.end)));
        drop(filler);
        builder.finish().unwrap()
    }

    #[test]
    fn changed_wins_over_cleared_and_the_rest_is_unchanged() {
        let map = ChangeMap::new(fill(10, &[2..4]), fill(10, &[3..6])).unwrap();
        let mut found = Vec::new();
        let mut at = Bytes::ZERO;
        while at < map.len() {
            let extent = map.extent_at(at);
            found.push((at.get() / BLOCK, extent.end.get() / BLOCK, extent.kind));
            at = extent.end;
        }
        let expected = [
            (0, 2, ExtentKind::Unchanged),
            (2, 4, ExtentKind::Data),
            (4, 6, ExtentKind::Hole),
            (6, 10, ExtentKind::Unchanged),
        ];
        assert_eq!(found, expected);
        assert_eq!(map.extent_at(map.len()).kind, ExtentKind::Data);
        assert!(ChangeMap::new(fill(10, &[]), fill(9, &[])).is_none());
    }
}
