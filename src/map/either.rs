//! A device some of whose ranges are replaced by zeros.

use super::{Extent, HoleMap, ask_expected, ask_now};
use crate::units::Bytes;

use std::sync::Arc;

/// A device some of whose ranges are replaced by zeros: a range is a hole where either map has a hole.
///
/// The hole is of the kind of the first map where that has one.
pub struct Either {
    /// The ranges that are replaced by zeros are its holes. It is as long as the device.
    pub zeroed: Arc<dyn HoleMap>,
    /// The device.
    pub device: Arc<dyn HoleMap>,
}

impl Either {
    fn extent_by<E>(&self, offset: Bytes, ask: impl Fn(&dyn HoleMap, Bytes) -> Result<Extent, E>) -> Result<Extent, E> {
        if offset >= self.len() {
            return Ok(Extent::outside(offset));
        }
        let zeroed = ask(&*self.zeroed, offset)?;
        if zeroed.kind.is_hole() {
            return Ok(zeroed);
        }
        let device = ask(&*self.device, offset)?;
        Ok(Extent { end: device.end.min(zeroed.end).min(self.len()), kind: device.kind })
    }
}

impl HoleMap for Either {
    fn len(&self) -> Bytes {
        self.device.len()
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let Ok(extent) = self.extent_by(offset, ask_now);
        extent
    }

    fn expected_extent(&self, offset: Bytes) -> Option<Extent> {
        self.extent_by(offset, ask_expected).ok()
    }

    fn allocated(&self) -> Option<Bytes> {
        // The number is known where the device has no holes of its own.
        self.device.allocated().filter(|&all| all == self.device.len()).and_then(|_| self.zeroed.allocated())
    }

    fn memory(&self) -> Bytes {
        self.zeroed.memory().saturating_add(self.device.memory())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{Block, ExtentKind, FillBuilder, FillMap};

    const BLOCK: u64 = 4096;

    fn fill(range: std::ops::Range<u64>) -> Arc<FillMap> {
        let builder = FillBuilder::new(Bytes::new(8 * BLOCK), Bytes::new(BLOCK));
        builder.filler().set_range(Block::new(range.start)..Block::new(range.end));
        Arc::new(builder.finish().unwrap())
    }

    #[test]
    fn a_range_is_data_where_both_maps_have_data() {
        let map = Either { zeroed: fill(0..4), device: fill(2..8) };
        let mut found = Vec::new();
        let mut at = Bytes::ZERO;
        while at < map.len() {
            let extent = map.extent_at(at);
            found.push((at.get() / BLOCK, extent.end.get() / BLOCK, extent.kind));
            at = extent.end;
        }
        assert_eq!(found, [(0, 2, ExtentKind::Hole), (2, 4, ExtentKind::Data), (4, 8, ExtentKind::Hole)]);
        assert_eq!(map.allocated(), None);
        assert_eq!(Either { zeroed: fill(0..4), device: fill(0..8) }.allocated(), Some(Bytes::new(4 * BLOCK)));
        assert_eq!(map.extent_at(map.len()).kind, ExtentKind::Data);
    }
}
