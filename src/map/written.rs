//! A device with ranges that were written since its extents were read.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use super::{Extent, ExtentKind, FillMap, HoleMap};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The limit of separate ranges. They are no longer complete when there would be more.
const MOST_RANGES: usize = 1 << 16;

/// A count of data looks at no more ranges than this.
const MOST_COUNTED: usize = 1024;

/// What one range takes in memory: its two ends, and its part of the nodes of the tree.
const RANGE_SIZE: u64 = 32;

/// Memory is reported in whole steps of this size, so that it changes seldom.
const MEMORY_STEP: Bytes = Bytes::new(64 << 10);

/// Holes of less than this are not looked for: see [`HoleMap::is_sparse`].
const SHORTEST_HOLE: Bytes = Bytes::new(4096);

/// Ranges of a device that were written. The set only grows.
///
/// Each range is rounded outwards to blocks, which are the unit of allocation. Ranges that touch are one. While there are none,
/// a question about them takes no lock.
pub struct WrittenRanges {
    len: Bytes,
    block: Bytes,
    limit: usize,
    /// The number of ranges, or `usize::MAX` once the limit was exceeded.
    count: AtomicUsize,
    /// The ends of the ranges, by their starts.
    ranges: RwLock<BTreeMap<Bytes, Bytes>>,
}

/// A position as the ranges have it.
enum Place {
    /// In a range that ends there.
    Inside(Bytes),
    /// Before a range that starts there, or before the end of the device.
    Before(Bytes),
}

impl WrittenRanges {
    /// No ranges, of a device of `len` bytes that is allocated in units of `block` bytes.
    pub fn new(len: Bytes, block: Bytes) -> Self {
        Self::with_limit(len, block, MOST_RANGES)
    }

    fn with_limit(len: Bytes, block: Bytes, limit: usize) -> Self {
        Self { len, block, limit, count: AtomicUsize::new(0), ranges: RwLock::default() }
    }

    /// Adds a range. When this returns, each later question finds data there, or [`WrittenRanges::is_complete`] is `false`.
    pub fn add(&self, range: &Range<Bytes>) {
        let (mut start, mut end) = (range.start.align_down(self.block), range.end.align_up(self.block));
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let before = ranges.range(..=start).next_back().map(|(&start, &end)| (start, end));
        if let Some(before) = before.filter(|before| before.1 >= start) {
            start = before.0;
            end = end.map(|end| end.max(before.1));
            if end == Some(before.1) {
                return;
            }
        }
        let mut end = end.unwrap_or(Bytes::MAX).min(self.len);
        if start >= end {
            return;
        }
        while let Some((&next, &next_end)) = ranges.range(start..=end).next() {
            ranges.remove(&next);
            end = end.max(next_end);
        }
        if ranges.len() >= self.limit || self.count.load(Ordering::SeqCst) == usize::MAX {
            self.count.store(usize::MAX, Ordering::SeqCst);
            ranges.clear();
            return;
        }
        ranges.insert(start, end);
        self.count.store(ranges.len(), Ordering::SeqCst);
    }

    /// Whether all ranges that were added are in the set.
    pub fn is_complete(&self) -> bool {
        self.count.load(Ordering::SeqCst) != usize::MAX
    }

    /// The memory that the ranges take, in whole steps.
    pub fn memory(&self) -> Bytes {
        let count = match self.count.load(Ordering::SeqCst) {
            usize::MAX => 0,
            count => count as u64,
        };
        Bytes::new(count * RANGE_SIZE).align_up(MEMORY_STEP).unwrap_or(Bytes::MAX)
    }

    /// The ranges, unless there are none.
    fn some(&self) -> Option<RwLockReadGuard<'_, BTreeMap<Bytes, Bytes>>> {
        let is_empty = self.count.load(Ordering::SeqCst) == 0;
        (!is_empty).then(|| self.ranges.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The ranges from `offset` on, cut there. The last one that begins before may end before it, too.
fn place(ranges: &BTreeMap<Bytes, Bytes>, offset: Bytes) -> Place {
    if let Some((_, &end)) = ranges.range(..=offset).next_back().filter(|&(_, &end)| end > offset) {
        return Place::Inside(end);
    }
    Place::Before(ranges.range(offset..).next().map_or(Bytes::MAX, |(&start, _)| start))
}

/// A device with ranges that were written since its extents were read: these are data, and the others are as they were.
pub struct Written {
    /// The extents as they were read.
    pub base: Arc<dyn HoleMap>,
    /// The ranges, of a device of the same length.
    pub ranges: Arc<WrittenRanges>,
}

impl Written {
    fn extent_by(&self, offset: Bytes, ask: impl Fn(&dyn HoleMap) -> Option<Extent>) -> Option<Extent> {
        let place = match self.ranges.some() {
            Some(ranges) if offset < self.len() => place(&ranges, offset),
            _ => return ask(&*self.base),
        };
        match place {
            Place::Inside(end) => Some(Extent { end: end.min(self.len()), kind: ExtentKind::Data }),
            Place::Before(next) => ask(&*self.base).map(|extent| Extent { end: extent.end.min(next), ..extent }),
        }
    }

    /// At most this many bytes of the device are data; `None` where the base does not know it.
    fn allocated_at_most(&self) -> Option<Bytes> {
        let allocated = self.base.allocated()?;
        let Some(ranges) = self.ranges.some() else { return Some(allocated) };
        // Without a lookup for each range, the whole of it counts as new.
        let looked_up = ranges.len() <= MOST_COUNTED;
        let new = |(&start, &end): (&Bytes, &Bytes)| {
            let counted = if looked_up { self.base.count_data(&(start..end), Bytes::new(1)) } else { None };
            end.saturating_sub(start).saturating_sub(counted.unwrap_or(Bytes::ZERO))
        };
        let sum = ranges.iter().map(new).fold(allocated, Bytes::saturating_add);
        Some(sum.min(self.len()))
    }
}

impl HoleMap for Written {
    fn len(&self) -> Bytes {
        self.base.len()
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        self.extent_by(offset, |base| Some(base.extent_at(offset))).unwrap_or(Extent::outside(offset))
    }

    fn expected_extent(&self, offset: Bytes) -> Option<Extent> {
        self.extent_by(offset, |base| base.expected_extent(offset))
    }

    fn next_data(&self, offset: Bytes) -> Bytes {
        let data = self.base.next_data(offset);
        match self.ranges.some().map(|ranges| place(&ranges, offset)) {
            Some(Place::Inside(_)) if offset < self.len() => offset,
            Some(Place::Before(next)) => data.min(next),
            _ => data,
        }
    }

    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        let Some(ranges) = self.ranges.some() else { return self.base.next_hole(offset) };
        let mut at = offset;
        loop {
            let hole = self.base.next_hole(at)?;
            match place(&ranges, hole.start) {
                Place::Before(next) => return Some(hole.start..hole.end.min(next)),
                Place::Inside(end) if end < self.len() => at = end,
                Place::Inside(_) => return None,
            }
        }
    }

    fn count_data(&self, range: &Range<Bytes>, unit: Bytes) -> Option<Bytes> {
        let counted = self.base.count_data(range, unit)?;
        let Some(ranges) = self.ranges.some() else { return Some(counted) };
        if !self.ranges.block.get().is_multiple_of(unit.get().max(1)) {
            return None;
        }
        let first = match place(&ranges, range.start) {
            Place::Inside(end) => Some((range.start, end)),
            Place::Before(_) => None,
        };
        let inside = ranges.range(range.start..range.end).map(|(&start, &end)| (start, end));
        // A range that begins where the counted one does is in both.
        let all = first.into_iter().chain(inside.skip_while(|&(start, _)| first.is_some() && start == range.start));
        let mut sum = counted;
        for (index, (start, end)) in all.enumerate() {
            let cut = start..end.min(range.end);
            let known = self.base.count_data(&cut, unit).filter(|_| index < MOST_COUNTED)?;
            sum = sum.saturating_add(cut.end.saturating_sub(start).saturating_sub(known));
        }
        Some(sum)
    }

    fn allocated(&self) -> Option<Bytes> {
        self.allocated_at_most()
    }

    fn is_sparse(&self) -> Option<bool> {
        let is_sparse = self.base.is_sparse();
        if is_sparse != Some(true) || self.ranges.some().is_none() {
            return is_sparse;
        }
        // What is left is whole blocks, and perhaps a part of one at the end of the device.
        let left = self.len().saturating_sub(self.allocated_at_most()?);
        (self.ranges.block >= SHORTEST_HOLE && left >= self.ranges.block).then_some(true)
    }

    fn dense_because(&self) -> Option<DenseReason> {
        self.base.dense_because()
    }

    fn is_guarded(&self) -> bool {
        self.base.is_guarded()
    }

    fn fill_map(&self) -> Option<&FillMap> {
        self.base.fill_map().filter(|_| self.ranges.some().is_none())
    }

    fn memory(&self) -> Bytes {
        self.base.memory().saturating_add(self.ranges.memory())
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::map::model::ExpectedRuns;
    use crate::map::view;
    use crate::map::{Block, FillBuilder};

    const BLOCK: u64 = 4096;
    const BLOCKS: u64 = 40;
    /// The last block is cut.
    const LEN: u64 = BLOCKS * BLOCK - 512;

    fn base(mapped: &[bool]) -> Arc<FillMap> {
        let builder = FillBuilder::new(Bytes::new(LEN), Bytes::new(BLOCK));
        for (block, _) in (0..).zip(mapped).filter(|(_, mapped)| **mapped) {
            builder.filler().set_range(Block::new(block)..Block::new(block + 1));
        }
        Arc::new(builder.finish().unwrap())
    }

    fn written(mapped: &[bool], limit: usize) -> Written {
        let ranges = WrittenRanges::with_limit(Bytes::new(LEN), Bytes::new(BLOCK), limit);
        Written { base: base(mapped), ranges: Arc::new(ranges) }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_answer_is_that_of_a_device_with_these_blocks_mapped(
            mapped in vec(any::<bool>(), BLOCKS as usize),
            writes in vec((0..LEN, 1..5 * BLOCK), 0..12),
        ) {
            let map = written(&mapped, 100);
            let mut blocks = mapped;
            for (start, len) in writes {
                let end = (start + len).min(LEN);
                map.ranges.add(&(Bytes::new(start)..Bytes::new(end)));
                for block in start / BLOCK..end.div_ceil(BLOCK) {
                    blocks[usize::try_from(block).unwrap()] = true;
                }
                prop_assert!(map.ranges.is_complete());
                let kinds = blocks.iter().map(|&data| if data { ExtentKind::Data } else { ExtentKind::Hole });
                let lens = (0..BLOCKS).map(|block| BLOCK.min(LEN - block * BLOCK));
                let expected = ExpectedRuns::new(lens.zip(kinds));
                expected.check(&map);
                expected.check_view(&map, BLOCK);
                prop_assert_eq!(map.allocated(), base(&blocks).allocated());
                prop_assert!(map.is_sparse().is_none_or(|sparse| sparse == expected.has_hole()));
                for (from, to) in [(0, LEN), (start, end), (BLOCK, 9 * BLOCK + 5), (start / 2, LEN)] {
                    let range = Bytes::new(from.min(to))..Bytes::new(to.max(from));
                    let counted = view::count_data(&map, Bytes::new(BLOCK), &range);
                    prop_assert_eq!(counted, base(&blocks).count_data(&range, Bytes::new(BLOCK)));
                }
            }
        }
    }

    #[test]
    fn without_ranges_the_base_answers_and_with_them_it_is_no_bitmap() {
        let map = written(&[false, true], 100);
        assert!(map.fill_map().is_some());
        assert_eq!(map.memory(), map.base.memory());
        map.ranges.add(&(Bytes::new(1)..Bytes::new(2)));
        assert!(map.fill_map().is_none());
        assert_eq!(map.memory(), map.base.memory().saturating_add(MEMORY_STEP));
        assert_eq!(map.extent_at(Bytes::ZERO), Extent { end: Bytes::new(BLOCK), kind: ExtentKind::Data });
    }

    #[test]
    fn too_many_ranges_are_not_complete_and_stay_so() {
        let map = written(&[], 3);
        let add = |block: u64| map.ranges.add(&(Bytes::new(block * BLOCK)..Bytes::new((block + 1) * BLOCK)));
        for block in [0, 2, 4, 1] {
            add(block);
            assert!(map.ranges.is_complete(), "{block}: neighbours are one range");
        }
        add(9);
        assert!(map.ranges.is_complete());
        add(20);
        assert!(!map.ranges.is_complete());
        add(0);
        assert!(!map.ranges.is_complete());
        assert_eq!(map.ranges.memory(), Bytes::ZERO);
    }
}
