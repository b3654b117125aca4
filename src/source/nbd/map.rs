//! The holes of an export, asked from its server.
//!
//! An export has no change counter, and others may write to it, even where the server lets *us* only read. So every hole
//! is claimed from a reply to a request that was sent after the question came, and no hole is remembered: an lseek costs
//! one round trip. Data is always a correct answer; what a reply says about the data around a hole is remembered for a
//! second, which saves the second round trip that finding a run's end would take.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::client::Client;
use super::reply::Failure;
use crate::map::{Extent, ExtentKind, HoleMap};
use crate::reason::DenseReason;
use crate::source::known::KnownData;
use crate::source::walks::Walks;
use crate::sys::sysfs::IoCounters;
use crate::units::Bytes;

/// What is asked about first.
const FIRST_WINDOW: u64 = 64 << 20;
/// The shortest range that is asked about.
const SHORTEST_WINDOW: u64 = 1 << 20;
/// How much longer the next window is when a run fills one.
const GROWTH: u64 = 16;
/// Runs in one answer that are enough: a server has to find all of a window's, and only the first ones are used.
const ENOUGH_RUNS: u64 = 32;
/// Windows of the longest length that are asked about together, where a run goes on and on.
const WINDOWS: usize = 16;

/// Whether writes over other connections are made visible before the server is asked for holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settling {
    /// The bytes are read over the connection of the block status, or no other connection can write.
    Needless,
    /// The bytes are read over another connection, as those of a device of the kernel's NBD client.
    EachTime,
}

/// The holes of an export.
pub struct NbdMap {
    client: Arc<Client>,
    settling: Settling,
    window: AtomicU64,
    known: Mutex<KnownData>,
    walks: Mutex<Walks>,
    failing: AtomicBool,
}

impl NbdMap {
    /// The map of a client's export. Nothing is asked yet.
    pub fn new(client: Arc<Client>, settling: Settling) -> Self {
        Self {
            client,
            settling,
            window: AtomicU64::new(FIRST_WINDOW),
            // Nothing counts the writes of others. Data is only kept for its time.
            known: Mutex::new(KnownData::new(Box::new(|| Some(IoCounters::default())))),
            walks: Mutex::default(),
            failing: AtomicBool::new(false),
        }
    }

    /// The run at `offset`, as the server says now.
    fn ask(&self, offset: Bytes, goes_on: bool) -> Extent {
        let block = self.client.minimum_block();
        let start = offset.align_down(block);
        let windows = self.windows(start, goes_on);
        let runs = match join(&windows, self.client.block_status(&windows, self.settling)) {
            Ok(runs) => {
                self.failing.store(false, Ordering::Relaxed);
                self.adapt(start, &windows, &runs);
                runs
            }
            Err(failure) => {
                if !self.failing.swap(true, Ordering::Relaxed) {
                    log::warn!("{}: taken for data: {failure}", self.client.uri());
                }
                // Nothing was learnt about the lengths of runs, but maybe the range was too long.
                self.window.fetch_min(FIRST_WINDOW, Ordering::Relaxed);
                // What the server cannot tell of one place it may know of others; what is away knows nothing.
                let told = matches!(failure, Failure::Server(_)).then(|| windows.last().map(|window| window.end));
                vec![Extent { end: told.flatten().unwrap_or(self.len()), kind: ExtentKind::Data }]
            }
        };
        let few = runs.len().min(usize::try_from(ENOUGH_RUNS).unwrap_or(usize::MAX));
        self.known().add(start, &runs[..few]);
        let block_end = start.saturating_add(block).min(self.len());
        runs.into_iter().find(|run| run.end > offset).unwrap_or(Extent { end: block_end, kind: ExtentKind::Data })
    }

    /// The ranges to ask about from `start` on: one, or several where a run of the longest windows goes on.
    fn windows(&self, start: Bytes, goes_on: bool) -> Vec<Range<Bytes>> {
        let longest = self.client.longest_status();
        let length = Bytes::new(self.window.load(Ordering::Relaxed)).min(longest);
        let count = if goes_on && length == longest { WINDOWS } else { 1 };
        let mut windows = Vec::new();
        let mut at = start;
        while windows.len() < count && at < self.len() {
            // Lengths are multiples of every minimum block size.
            let end = at.saturating_add(length).min(self.len());
            windows.push(at..end);
            at = end;
        }
        windows
    }

    /// Makes the next window longer after an answer of one run, and shorter after one of many.
    fn adapt(&self, start: Bytes, windows: &[Range<Bytes>], runs: &[Extent]) {
        let window = self.window.load(Ordering::Relaxed);
        let next = match (runs, windows.last()) {
            ([run], Some(last)) if run.end >= last.end => window.saturating_mul(GROWTH),
            (runs, _) if runs.len() as u64 > ENOUGH_RUNS => {
                let told = runs.last().map_or(Bytes::ZERO, |run| run.end.saturating_sub(start));
                told.get() / runs.len() as u64 * ENOUGH_RUNS
            }
            _ => return,
        };
        let longest = self.client.longest_status();
        let next = Bytes::new(next.max(SHORTEST_WINDOW)).align_down(Bytes::new(SHORTEST_WINDOW));
        self.window.store(next.min(longest).get(), Ordering::Relaxed);
    }

    fn known(&self) -> MutexGuard<'_, KnownData> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_data(&self, offset: Bytes) -> Option<Bytes> {
        let mut known = self.known();
        known.refresh();
        known.end_of(offset)
    }

    fn walks(&self) -> MutexGuard<'_, Walks> {
        self.walks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls what follows data, and remembers it, so that the next question finds the same.
    fn give_respite(&self, offset: Bytes, respite: Bytes) -> Extent {
        let uri = self.client.uri();
        log::warn!("{uri}: too slow to tell where a run ends: {respite} bytes of data at byte {offset}");
        let run = Extent { end: offset.saturating_add(respite).min(self.len()), kind: ExtentKind::Data };
        self.known().add(offset, &[run]);
        run
    }
}

impl HoleMap for NbdMap {
    fn len(&self) -> Bytes {
        self.client.size()
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let len = self.len();
        if offset >= len {
            return Extent::outside(offset);
        }
        if self.client.no_status().is_some() {
            return Extent { end: len, kind: ExtentKind::Data };
        }
        let walk = self.walks().take(offset);
        let begin = Instant::now();
        let run = match (self.known_data(offset), walk.respite(len)) {
            (Some(end), _) => Extent { end, kind: ExtentKind::Data },
            (None, Some(respite)) => return self.give_respite(offset, respite),
            (None, None) => self.ask(offset, walk.kind().is_some()),
        };
        self.walks().put(walk.on(run, begin.elapsed()));
        run
    }

    fn dense_because(&self) -> Option<DenseReason> {
        self.client.no_status().map(|why| why.to_owned().into())
    }

    fn memory(&self) -> Bytes {
        self.known().memory()
    }
}

/// Joins answers as far as they follow each other without a gap.
fn join(windows: &[Range<Bytes>], answers: Vec<Result<Vec<Extent>, Failure>>) -> Result<Vec<Extent>, Failure> {
    let mut all: Vec<Extent> = Vec::new();
    for (window, answer) in windows.iter().zip(answers) {
        match answer {
            Err(failure) if all.is_empty() => return Err(failure),
            Ok(runs) if all.last().is_none_or(|last| last.end == window.start) => {
                for run in runs {
                    match all.last_mut() {
                        Some(last) if last.kind == run.kind => last.end = run.end,
                        _ => all.push(run),
                    }
                }
            }
            _ => break,
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_joined_up_to_the_first_gap() {
        let bytes = Bytes::new;
        let windows = [0..10, 10..20, 20..30].map(|window: Range<u64>| bytes(window.start)..bytes(window.end));
        let hole = |end| Extent { end: bytes(end), kind: ExtentKind::Hole };
        let data = |end| Extent { end: bytes(end), kind: ExtentKind::Data };
        for (answers, wanted) in [
            ([Ok(vec![hole(10)]), Ok(vec![hole(20)]), Ok(vec![data(30)])], Ok(vec![hole(20), data(30)])),
            ([Ok(vec![hole(9)]), Ok(vec![hole(20)]), Ok(vec![hole(30)])], Ok(vec![hole(9)])),
            ([Ok(vec![hole(15)]), Ok(vec![data(20)]), Ok(vec![data(30)])], Ok(vec![hole(15)])),
            ([Ok(vec![data(5), hole(10)]), Err(Failure::Server(5)), Ok(vec![hole(30)])], Ok(vec![data(5), hole(10)])),
            ([Err(Failure::Server(5)), Ok(vec![hole(20)]), Ok(vec![hole(30)])], Err(Failure::Server(5))),
        ] {
            assert_eq!(join(&windows, answers.to_vec()), wanted);
        }
    }
}
