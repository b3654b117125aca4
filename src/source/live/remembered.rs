//! Data that is remembered between questions.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::map::{Extent, ExtentKind};
use crate::sys::sysfs::IoCounters;
use crate::units::Bytes;

/// The number of ranges that are remembered at most. At one more, all earlier ones are dropped.
const MAX_RANGES: usize = 4096;
/// The time for which data is remembered. UNMAP commands of other hosts, and those sent past the block layer, change no
/// counter of this host.
const LIFETIME: Duration = Duration::from_secs(1);

/// Ranges that the device reported as data, start to end; they do not overlap.
///
/// All are dropped as soon as this host writes to the device or discards something on it, so that holes from a discard
/// appear at once. Data that is remembered for longer is still a correct answer.
#[derive(Default)]
pub(super) struct RememberedData {
    ranges: BTreeMap<Bytes, Bytes>,
    /// The counters that the ranges are valid for, and the time when they were read first.
    valid: Option<(IoCounters, Instant)>,
}

impl RememberedData {
    /// Drops data that is too old, or older than the last change of the counters. The counters must have been read
    /// before the query whose answer is added next. Without counters nothing is remembered.
    pub(super) fn refresh(&mut self, now: Option<IoCounters>) {
        let valid = self.valid.is_some_and(|(counters, since)| Some(counters) == now && since.elapsed() < LIFETIME);
        if !valid {
            self.ranges.clear();
            self.valid = now.map(|counters| (counters, Instant::now()));
        }
    }

    /// The end of the remembered range that holds `offset`.
    pub(super) fn end_of(&self, offset: Bytes) -> Option<Bytes> {
        let (_, end) = self.ranges.range(..=offset).next_back()?;
        (*end > offset).then_some(*end)
    }

    /// Adds the data among consecutive extents, the first of which begins at `start`.
    pub(super) fn add(&mut self, mut start: Bytes, extents: &[Extent]) {
        for extent in extents {
            if extent.kind == ExtentKind::Data && self.valid.is_some() {
                self.insert(start, extent.end);
            }
            start = extent.end;
        }
    }

    /// Adds `[start, end)`, joined with the ranges that it overlaps or touches.
    fn insert(&mut self, mut start: Bytes, mut end: Bytes) {
        while let Some((first, last)) = self.ranges.range(..=end).next_back().map(|(first, last)| (*first, *last)) {
            if last < start {
                break;
            }
            self.ranges.remove(&first);
            start = start.min(first);
            end = end.max(last);
        }
        if self.ranges.len() >= MAX_RANGES {
            self.ranges.clear();
        }
        self.ranges.insert(start, end);
    }

    /// The memory that the ranges take.
    pub(super) fn memory(&self) -> Bytes {
        // The nodes of a tree are half full at worst.
        let bytes = self.ranges.len().saturating_mul(2 * size_of::<(Bytes, Bytes)>());
        Bytes::new(u64::try_from(bytes).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: Option<IoCounters> = Some(IoCounters { writes: 0, write_sectors: 0, discards: 0, discard_sectors: 0 });
    const DATA: Extent = Extent { end: Bytes::new(10), kind: ExtentKind::Data };

    #[test]
    fn ranges_are_joined_and_their_number_is_bounded() {
        let mut remembered = RememberedData::default();
        let bytes = Bytes::new;
        remembered.insert(bytes(10), bytes(20));
        remembered.insert(bytes(30), bytes(40));
        remembered.insert(bytes(50), bytes(60));
        let ends = [9, 10, 19, 20].map(|at| remembered.end_of(bytes(at)));
        assert_eq!(ends, [None, Some(bytes(20)), Some(bytes(20)), None]);
        remembered.insert(bytes(20), bytes(35));
        assert_eq!(remembered.end_of(bytes(10)), Some(bytes(40)));
        remembered.insert(bytes(0), bytes(100));
        assert_eq!(remembered.ranges.len(), 1);
        for start in 0..3 * MAX_RANGES as u64 {
            remembered.insert(bytes(1000 + start * 2), bytes(1001 + start * 2));
            assert!(remembered.ranges.len() <= MAX_RANGES);
        }
        assert!(remembered.memory() > Bytes::ZERO);
    }

    #[test]
    fn without_counters_nothing_is_remembered() {
        let mut remembered = RememberedData::default();
        remembered.refresh(None);
        remembered.add(Bytes::ZERO, &[DATA]);
        assert_eq!(remembered.end_of(Bytes::ZERO), None);
    }

    #[test]
    fn data_is_dropped_when_its_time_is_over() {
        let mut remembered = RememberedData::default();
        let long_ago = Instant::now().checked_sub(2 * LIFETIME).expect("the machine is up for longer");
        remembered.valid = Some((IoCounters::default(), long_ago));
        remembered.add(Bytes::ZERO, &[DATA]);
        assert!(remembered.end_of(Bytes::ZERO).is_some());
        remembered.refresh(SOME);
        assert_eq!(remembered.end_of(Bytes::ZERO), None);
    }

    #[test]
    fn data_is_dropped_when_the_host_writes() {
        let mut remembered = RememberedData::default();
        remembered.refresh(SOME);
        remembered.add(Bytes::ZERO, &[DATA]);
        remembered.refresh(SOME);
        assert!(remembered.end_of(Bytes::ZERO).is_some());
        remembered.refresh(Some(IoCounters { writes: 1, ..IoCounters::default() }));
        assert_eq!(remembered.end_of(Bytes::ZERO), None);
    }
}
