//! Extents that are kept: those of a device that is asked once, because nobody writes to it (`-o static`).
//!
//! Each answer of the device is a window: consecutive extents that are data and hole by turns. The windows do not overlap.
//! They take 8 bytes for each extent. When they take more than their limit, the ones that were asked longest ago are
//! dropped, and the device is asked about them again.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::map::{Extent, ExtentKind};
use crate::units::Bytes;

/// The memory that a window takes besides its extents: its entries in two trees, whose nodes are half full at worst, and
/// the rounding of its allocation.
const WINDOW_MEMORY: usize = 2 * (2 * size_of::<Bytes>() + size_of::<Window>() + size_of::<u64>()) + 16;

/// Windows of extents, and the limit of their memory.
pub(super) struct KeptExtents {
    windows: BTreeMap<Bytes, Window>,
    /// The starts of the windows, in the order in which they were asked.
    order: BTreeMap<u64, Bytes>,
    next: u64,
    memory: usize,
    limit: usize,
}

/// Consecutive extents, of which the first is a hole or not, and the others are data and hole by turns.
struct Window {
    begins_with_hole: bool,
    /// The end of each extent, in ascending order; there is at least one.
    ends: Box<[Bytes]>,
    /// The key in [`KeptExtents::order`].
    asked: u64,
}

impl Window {
    /// A window from `start` on; `None` if it has no bytes.
    fn new(start: Bytes, extents: &[Extent], asked: u64) -> Option<Self> {
        let mut ends: Vec<Bytes> = Vec::with_capacity(extents.len());
        let (mut begins_with_hole, mut is_hole, mut at) = (false, false, start);
        for extent in extents.iter().filter(|extent| extent.end > start) {
            if extent.end <= at {
                continue;
            }
            at = extent.end;
            match ends.last_mut() {
                Some(last) if is_hole == extent.kind.is_hole() => *last = at,
                Some(_) => ends.push(at),
                None => {
                    begins_with_hole = extent.kind.is_hole();
                    ends.push(at);
                }
            }
            is_hole = extent.kind.is_hole();
        }
        (!ends.is_empty()).then(|| Self { begins_with_hole, ends: ends.into(), asked })
    }

    fn end(&self) -> Bytes {
        self.ends.last().copied().expect("a window has an extent")
    }

    fn is_hole(&self, index: usize) -> bool {
        self.begins_with_hole == index.is_multiple_of(2)
    }

    fn extent(&self, index: usize) -> Extent {
        let kind = if self.is_hole(index) { ExtentKind::Hole } else { ExtentKind::Data };
        Extent { end: self.ends[index], kind }
    }

    /// The index of the extent that holds `offset`, which must be before the end.
    fn index(&self, offset: Bytes) -> usize {
        self.ends.partition_point(|end| *end <= offset)
    }

    fn memory(&self) -> usize {
        self.ends.len().saturating_mul(size_of::<Bytes>()).saturating_add(WINDOW_MEMORY)
    }
}

impl KeptExtents {
    /// No extents, which may take up to `limit` bytes of memory. One window is kept in any case.
    pub(super) fn new(limit: Bytes) -> Self {
        let limit = usize::try_from(limit.get()).unwrap_or(usize::MAX);
        Self { windows: BTreeMap::new(), order: BTreeMap::new(), next: 0, memory: 0, limit }
    }

    /// The rest of the kept extent that holds `offset`.
    pub(super) fn extent_at(&self, offset: Bytes) -> Option<Extent> {
        let (_, window) = self.window_at(offset)?;
        Some(window.extent(window.index(offset)))
    }

    /// The first range that is not known, from `from` on: up to the next window, or to `end`. `None` if all is known.
    pub(super) fn unknown(&self, from: Bytes, end: Bytes) -> Option<Range<Bytes>> {
        let mut start = from;
        while let Some((_, window)) = self.window_at(start) {
            start = window.end();
        }
        let next = self.windows.range(start..).next().map_or(end, |(next, _)| (*next).min(end));
        (start < next).then_some(start..next)
    }

    /// Keeps consecutive extents, the first of which begins at `start`. Those of earlier answers about the same bytes are
    /// replaced or kept: both are true for as long as nobody writes.
    pub(super) fn keep(&mut self, mut start: Bytes, extents: &[Extent]) {
        if let Some((_, before)) = self.window_at(start) {
            start = before.end();
        }
        let Some(mut window) = Window::new(start, extents, self.next) else { return };
        while let Some((next, end)) = self.after(start).filter(|(next, _)| *next < window.end()) {
            if end > window.end() {
                let Some(shorter) = self.cut(start, &window, next) else { return };
                window = shorter;
                break;
            }
            self.remove(next);
        }
        self.next += 1;
        self.insert(start, window);
        self.join(start);
        self.make_room();
    }

    /// Forgets all extents.
    pub(super) fn clear(&mut self) {
        *self = Self { limit: self.limit, ..Self::new(Bytes::ZERO) };
    }

    /// The memory that the extents take.
    pub(super) fn memory(&self) -> Bytes {
        Bytes::new(self.memory as u64)
    }

    /// The window that holds `offset`, with its start.
    fn window_at(&self, offset: Bytes) -> Option<(Bytes, &Window)> {
        let (start, window) = self.windows.range(..=offset).next_back()?;
        (window.end() > offset).then_some((*start, window))
    }

    /// The start and the end of the first window at or after `start`.
    fn after(&self, start: Bytes) -> Option<(Bytes, Bytes)> {
        self.windows.range(start..).next().map(|(next, window)| (*next, window.end()))
    }

    /// The part of a window from `start` on that is before `end`.
    fn cut(&self, start: Bytes, window: &Window, end: Bytes) -> Option<Window> {
        let extents: Vec<Extent> = (0..window.ends.len()).map(|index| window.extent(index)).collect();
        let count = extents.partition_point(|extent| extent.end < end);
        let last = extents.get(count).map(|extent| Extent { end, ..*extent });
        Window::new(start, &[&extents[..count], last.as_slice()].concat(), self.next)
    }

    fn insert(&mut self, start: Bytes, window: Window) {
        self.memory = self.memory.saturating_add(window.memory());
        self.order.insert(window.asked, start);
        self.windows.insert(start, window);
    }

    fn remove(&mut self, start: Bytes) -> Option<Window> {
        let window = self.windows.remove(&start)?;
        self.memory = self.memory.saturating_sub(window.memory());
        self.order.remove(&window.asked);
        Some(window)
    }

    /// Joins the window at `start` with its neighbours where each of them is one extent of the same kind, so that a large
    /// empty device takes no memory.
    fn join(&mut self, start: Bytes) {
        let single = |window: &Window| (window.ends.len() == 1).then_some((window.begins_with_hole, window.end()));
        let Some((kind, mut end)) = self.windows.get(&start).and_then(single) else { return };
        let mut first = start;
        if let Some((next, window)) = self.windows.range(end..).next().map(|(next, window)| (*next, single(window)))
            && let Some((next_kind, next_end)) = window
            && next == end
            && next_kind == kind
        {
            self.remove(next);
            end = next_end;
        }
        if let Some((before, window)) =
            self.windows.range(..start).next_back().map(|(at, window)| (*at, single(window)))
            && window == Some((kind, start))
        {
            self.remove(before);
            first = before;
        }
        if let Some(mut window) = self.remove(start) {
            window.ends = [end].into();
            self.insert(first, window);
        }
    }

    /// Drops the windows that were asked longest ago, until the rest fits.
    fn make_room(&mut self) {
        while self.memory > self.limit
            && self.windows.len() > 1
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.remove(oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const LIMIT: Bytes = Bytes::new(1 << 20);

    fn extents(ends: &[(u64, bool)]) -> Vec<Extent> {
        let kind = |is_hole| if is_hole { ExtentKind::Hole } else { ExtentKind::Data };
        ends.iter().map(|&(end, is_hole)| Extent { end: Bytes::new(end), kind: kind(is_hole) }).collect()
    }

    fn at(kept: &KeptExtents, offset: u64) -> Option<(u64, bool)> {
        kept.extent_at(Bytes::new(offset)).map(|extent| (extent.end.get(), extent.kind.is_hole()))
    }

    #[test]
    fn extents_are_found_up_to_the_end_of_their_answer() {
        let mut kept = KeptExtents::new(LIMIT);
        kept.keep(Bytes::new(10), &extents(&[(20, true), (25, false), (30, false), (40, true)]));
        let found = [9, 10, 19, 20, 29, 30, 39, 40].map(|offset| at(&kept, offset));
        let (first, data, last) = (Some((20, true)), Some((30, false)), Some((40, true)));
        assert_eq!(found, [None, first, first, data, data, last, last, None]);
        assert_eq!(kept.unknown(Bytes::ZERO, Bytes::new(99)), Some(Bytes::ZERO..Bytes::new(10)));
        assert_eq!(kept.unknown(Bytes::new(10), Bytes::new(99)), Some(Bytes::new(40)..Bytes::new(99)));
        assert_eq!(kept.unknown(Bytes::new(10), Bytes::new(40)), None);
        kept.clear();
        assert_eq!((at(&kept, 10), kept.memory()), (None, Bytes::ZERO));
    }

    #[test]
    fn single_extents_of_one_kind_are_joined() {
        let mut kept = KeptExtents::new(LIMIT);
        for start in [20, 0, 10, 40, 30] {
            kept.keep(Bytes::new(start), &extents(&[(start + 10, true)]));
        }
        assert_eq!((kept.windows.len(), kept.order.len(), at(&kept, 0)), (1, 1, Some((50, true))));
        let memory = kept.memory();
        kept.keep(Bytes::new(50), &extents(&[(60, false)]));
        assert_eq!((kept.windows.len(), at(&kept, 0), at(&kept, 50)), (2, Some((50, true)), Some((60, false))));
        assert_eq!(kept.memory().get(), 2 * memory.get());
    }

    #[test]
    fn the_windows_that_were_asked_longest_ago_are_dropped() {
        let mut kept = KeptExtents::new(Bytes::new(10_000));
        for window in 0..1000_u64 {
            let start = window * 100;
            let ends: Vec<_> = (1..=50).map(|index| (start + index, index % 2 == 0)).collect();
            kept.keep(Bytes::new(start), &extents(&ends));
            assert!(kept.memory() <= Bytes::new(10_000) && kept.windows.len() == kept.order.len());
            assert!(at(&kept, start).is_some(), "the newest stays");
        }
        assert!(kept.windows.len() > 10 && at(&kept, 0).is_none());
        let mut none = KeptExtents::new(Bytes::ZERO);
        none.keep(Bytes::ZERO, &extents(&[(10, true), (20, false)]));
        assert_eq!(at(&none, 10), Some((20, false)), "one is kept in any case");
    }

    /// Answers that overlap in any way give the extents of the device, or nothing.
    #[test]
    fn any_answers_about_one_device_equal_it() {
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        const LEN: u64 = 2000;
        let mut device: BTreeMap<u64, bool> = BTreeMap::new();
        let (mut start, mut is_hole) = (0, true);
        while start < LEN {
            device.insert(start, is_hole);
            (start, is_hole) = (start + 1 + random(60), !is_hole);
        }
        let is_hole = |offset: u64| *device.range(..=offset).next_back().expect("it begins at 0").1;
        let mut kept = KeptExtents::new(LIMIT);
        for _ in 0..500 {
            let (start, len) = (random(LEN), 1 + random(200));
            let end = (start + len).min(LEN);
            let answer: Vec<_> = (start..end).map(|offset| (offset + 1, is_hole(offset))).collect();
            kept.keep(Bytes::new(start), &extents(&answer));
            let memory: usize = kept.windows.values().map(Window::memory).sum();
            assert_eq!((kept.memory, kept.order.len()), (memory, kept.windows.len()));
            for offset in (0..LEN).step_by(13) {
                if let Some((end, hole)) = at(&kept, offset) {
                    assert!((offset..end).all(|offset| is_hole(offset) == hole), "{offset}..{end}");
                }
            }
            assert_eq!(kept.unknown(Bytes::new(start), Bytes::new(end)), None, "the last answer is known");
        }
    }
}
