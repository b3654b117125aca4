//! Data that is remembered between questions.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::map::{Extent, ExtentKind};
use crate::sys::sysfs::IoCounters;
use crate::units::Bytes;

/// Runs that are remembered at most; then all are forgotten.
const RUNS_MAX: usize = 4096;
/// How long data is remembered. UNMAP commands of other hosts, and those sent past the block layer, move no counter.
const LIFE: Duration = Duration::from_secs(1);

/// Reads a disk's accounting; `None` when it cannot be read.
pub(super) type Counters = Box<dyn Fn() -> Option<IoCounters> + Send + Sync>;

/// Ranges that were data when they were last asked, by their start; they do not overlap.
///
/// All are forgotten as soon as this host wrote to the disk or discarded something on it. That is for the holes that
/// such a command may have made; calling something data for longer would be no lie.
pub(super) struct KnownData {
    runs: BTreeMap<Bytes, Bytes>,
    counters: Counters,
    seen: Option<(IoCounters, Instant)>,
}

impl KnownData {
    /// Nothing known yet of the disk with these counters. While they cannot be read nothing is remembered.
    pub(super) fn new(counters: Counters) -> Self {
        Self { runs: BTreeMap::new(), counters, seen: None }
    }

    /// Forgets what may no longer be so. To be called before the disk is asked for what is to be added.
    pub(super) fn refresh(&mut self) {
        let now = (self.counters)();
        let still = self.seen.is_some_and(|(counters, since)| Some(counters) == now && since.elapsed() < LIFE);
        if !still {
            self.runs.clear();
            self.seen = now.map(|counters| (counters, Instant::now()));
        }
    }

    /// The end of the known run of data that holds `offset`.
    pub(super) fn end_of(&self, offset: Bytes) -> Option<Bytes> {
        let (_, end) = self.runs.range(..=offset).next_back()?;
        (*end > offset).then_some(*end)
    }

    /// Adds what is data in runs that follow each other from `start`.
    pub(super) fn add(&mut self, mut start: Bytes, runs: &[Extent]) {
        for run in runs {
            if run.kind == ExtentKind::Data && self.seen.is_some() {
                self.insert(start, run.end);
            }
            start = run.end;
        }
    }

    /// Adds `[start, end)`, joined with what it touches.
    fn insert(&mut self, mut start: Bytes, mut end: Bytes) {
        while let Some((first, last)) = self.runs.range(..=end).next_back().map(|(first, last)| (*first, *last)) {
            if last < start {
                break;
            }
            self.runs.remove(&first);
            start = start.min(first);
            end = end.max(last);
        }
        if self.runs.len() >= RUNS_MAX {
            self.runs.clear();
        }
        self.runs.insert(start, end);
    }

    /// Memory that this holds.
    pub(super) fn memory(&self) -> Bytes {
        // A tree's nodes are half full at worst.
        let bytes = self.runs.len().saturating_mul(2 * size_of::<(Bytes, Bytes)>());
        Bytes::new(u64::try_from(bytes).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn what_is_remembered_is_bounded_and_joined() {
        let mut known = KnownData::new(Box::new(|| Some(IoCounters::default())));
        let bytes = Bytes::new;
        known.insert(bytes(10), bytes(20));
        known.insert(bytes(30), bytes(40));
        known.insert(bytes(50), bytes(60));
        assert_eq!([9, 10, 19, 20].map(|at| known.end_of(bytes(at))), [None, Some(bytes(20)), Some(bytes(20)), None]);
        known.insert(bytes(20), bytes(35));
        assert_eq!(known.end_of(bytes(10)), Some(bytes(40)));
        known.insert(bytes(0), bytes(100));
        assert_eq!(known.runs.len(), 1);
        for start in 0..3 * RUNS_MAX as u64 {
            known.insert(bytes(1000 + start * 2), bytes(1001 + start * 2));
            assert!(known.runs.len() <= RUNS_MAX);
        }
        assert!(known.memory() > Bytes::ZERO);
    }

    #[test]
    fn without_accounting_nothing_is_remembered() {
        let mut known = KnownData::new(Box::new(|| None));
        known.refresh();
        known.add(Bytes::ZERO, &[Extent { end: Bytes::new(10), kind: ExtentKind::Data }]);
        assert_eq!(known.end_of(Bytes::ZERO), None);
    }

    #[test]
    fn data_is_forgotten_when_its_time_is_over() {
        let mut known = KnownData::new(Box::new(|| Some(IoCounters::default())));
        let long_ago = Instant::now().checked_sub(2 * LIFE).expect("the machine is up for longer");
        known.seen = Some((IoCounters::default(), long_ago));
        known.add(Bytes::ZERO, &[Extent { end: Bytes::new(10), kind: ExtentKind::Data }]);
        assert!(known.end_of(Bytes::ZERO).is_some());
        known.refresh();
        assert_eq!(known.end_of(Bytes::ZERO), None);
    }

    #[test]
    fn data_is_forgotten_when_the_host_writes() {
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let counters = || Some(IoCounters { writes: WRITES.load(Ordering::Relaxed), ..IoCounters::default() });
        let mut known = KnownData::new(Box::new(counters));
        known.refresh();
        known.add(Bytes::ZERO, &[Extent { end: Bytes::new(10), kind: ExtentKind::Data }]);
        known.refresh();
        assert!(known.end_of(Bytes::ZERO).is_some());
        WRITES.fetch_add(1, Ordering::Relaxed);
        known.refresh();
        assert_eq!(known.end_of(Bytes::ZERO), None);
    }
}
