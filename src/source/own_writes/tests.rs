//! Own writes, foreign writes and questions in any order, on a device that counts as the kernel does.

use std::cell::{Cell, RefCell};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::map::{Block, ExtentKind, FillBuilder, FillMap, HoleMap, Written};

const BLOCKS: usize = 8;
const BLOCK: u64 = UNIT.get();
const BLOCK_SECTORS: u64 = BLOCK / 512;
const LEN: Bytes = Bytes::new(BLOCKS as u64 * BLOCK);

fn bytes(blocks: &Range<usize>) -> Range<Bytes> {
    Bytes::new(blocks.start as u64 * BLOCK)..Bytes::new(blocks.end as u64 * BLOCK)
}

/// A write under way. Each block is a request of its own.
struct Running<'a> {
    own: Option<OwnWrite<'a>>,
    is_own: bool,
    is_started: bool,
    /// The blocks that have not ended.
    left: Range<usize>,
    blocks: Range<usize>,
    /// It fails when this many blocks are left.
    fails_at: Option<usize>,
}

#[derive(Default)]
struct Device<'a> {
    counters: IoCounters,
    in_flight: u64,
    mapped: [bool; BLOCKS],
    /// The blocks that completed writes have filled.
    filled: [bool; BLOCKS],
    /// How often each block was discarded.
    discarded: [usize; BLOCKS],
    running: Vec<Running<'a>>,
}

/// What happens.
#[derive(Clone, Copy, Debug)]
struct Allowed {
    /// The kernel counts a write when it begins, and not when it ends.
    counts_at_start: bool,
    foreign: bool,
    failures: bool,
    /// Own writes may meet, and be one write of the device.
    meeting: bool,
}

struct Model<'a> {
    own: &'a OwnWrites,
    device: RefCell<Device<'a>>,
    choices: RefCell<std::vec::IntoIter<u8>>,
    allowed: Allowed,
    loads: Cell<usize>,
}

/// Extents that were loaded, and what guards them.
struct Loaded {
    map: Written,
    seen: (IoCounters, u64),
    baseline: Option<Baseline>,
}

impl<'a> Model<'a> {
    fn choice(&self, of: usize) -> usize {
        usize::from(self.choices.borrow_mut().next().unwrap_or(0)) % of
    }

    fn is_over(&self) -> bool {
        self.choices.borrow().len() == 0
    }

    /// A few steps of the writers.
    fn steps(&self) {
        for _ in 0..[0, 0, 0, 0, 0, 1, 2, 4][self.choice(8)] {
            match self.choice(6) {
                0 => self.begin(true),
                1 if self.allowed.foreign => self.begin(false),
                2 if self.allowed.foreign && self.choice(4) == 0 => self.discard(),
                _ => self.advance(),
            }
        }
    }

    fn begin(&self, is_own: bool) {
        let start = self.choice(BLOCKS);
        let blocks = start..(start + 1 + self.choice(3)).min(BLOCKS);
        let fails = self.allowed.failures && self.choice(4) == 0;
        let fails_at = fails.then(|| self.choice(blocks.len()));
        let mut device = self.device.borrow_mut();
        let meets = |other: &Running<'_>| other.blocks.start < blocks.end && blocks.start < other.blocks.end;
        if device.running.len() > 3 || !self.allowed.meeting && device.running.iter().any(meets) {
            return;
        }
        let own = is_own.then(|| self.own.begin(&bytes(&blocks)));
        device.running.push(Running { own, is_own, is_started: false, left: blocks.clone(), blocks, fails_at });
    }

    /// One write goes on: it starts, a block of it ends, or it ends.
    fn advance(&self) {
        let mut device = self.device.borrow_mut();
        let device = &mut *device;
        let Some(index) = device.running.len().checked_sub(1).map(|last| self.choice(last + 1)) else { return };
        let at_start = self.allowed.counts_at_start;
        let now = &mut device.running[index];
        if !now.is_started {
            now.is_started = true;
            device.in_flight += 1;
            device.counters.write_sectors += if at_start { now.blocks.len() as u64 * BLOCK_SECTORS } else { 0 };
        } else if now.fails_at == Some(now.left.len()) {
            device.in_flight -= 1;
            device.running.remove(index);
        } else if let Some(block) = now.left.next() {
            let is_own = now.is_own;
            let is_last = now.left.is_empty();
            device.mapped[block] = true;
            device.counters.write_sectors += if at_start { 0 } else { BLOCK_SECTORS };
            if is_last && !is_own {
                self.fill(device, index);
            } else if is_own && !at_start {
                // Another own write whose next block is this one is the same write of the device.
                let next = |other: &&mut Running<'_>| other.is_own && other.is_started && other.left.start == block;
                if let Some(other) = device.running.iter_mut().filter(next).find(|other| other.left.len() > 1) {
                    other.left.next();
                }
            }
        } else {
            // All of it was counted before. Now its write call returns.
            let own = now.own.take();
            self.fill(device, index);
            if let Some(own) = own {
                own.succeeded();
            }
        }
    }

    fn fill(&self, device: &mut Device<'a>, index: usize) {
        let ended = device.running.remove(index);
        device.filled[ended.blocks].fill(true);
        device.in_flight -= 1;
    }

    fn discard(&self) {
        let block = self.choice(BLOCKS);
        let mut device = self.device.borrow_mut();
        // Whether a write and a discard at the same time leave the block mapped is not defined.
        if device.running.iter().any(|write| write.blocks.contains(&block)) {
            return;
        }
        (device.mapped[block], device.filled[block]) = (false, false);
        device.discarded[block] += 1;
        device.counters.discards += 1;
        device.counters.discard_sectors += BLOCK_SECTORS;
    }

    fn counters(&self) -> IoCounters {
        self.steps();
        let counters = self.device.borrow().counters;
        self.steps();
        counters
    }

    fn in_flight(&self) -> u64 {
        let in_flight = self.device.borrow().in_flight;
        self.steps();
        in_flight
    }

    fn load(&self) -> Loaded {
        self.loads.set(self.loads.get() + 1);
        let seen = (self.counters(), self.in_flight());
        let baseline = self.own.baseline(seen.0, seen.1 == 0);
        self.steps();
        let ranges = self.own.follow(LEN, Bytes::new(BLOCK));
        self.steps();
        let builder = FillBuilder::new(LEN, Bytes::new(BLOCK));
        for (block, _) in (0..).zip(self.device.borrow().mapped).filter(|(_, mapped)| *mapped) {
            builder.filler().set_range(Block::new(block)..Block::new(block + 1));
        }
        let base: Arc<FillMap> = Arc::new(builder.finish().unwrap());
        self.steps();
        Loaded { map: Written { base, ranges }, seen, baseline }
    }

    fn answer(&self, loaded: &Loaded) -> [ExtentKind; BLOCKS] {
        std::array::from_fn(|block| {
            self.steps();
            loaded.map.extent_at(Bytes::new(block as u64 * BLOCK)).kind
        })
    }

    /// As the guard of a thin volume decides it.
    fn is_fresh(&self, loaded: &Loaded) -> bool {
        let (counters, in_flight) = loaded.seen;
        if (in_flight == 0 || self.in_flight() == in_flight) && self.counters() == counters {
            return true;
        }
        let read = || Ok(self.counters());
        let only_own = |baseline| self.own.only_own_since(baseline, Duration::ZERO, read).unwrap();
        loaded.baseline.as_ref().is_some_and(only_own)
    }

    /// A question. Every block that a completed write has filled before is data.
    fn ask(&self, loaded: &mut Option<Loaded>) {
        let (filled, discarded) = (self.device.borrow().filled, self.device.borrow().discarded);
        let old = loaded.take().map(|old| (self.answer(&old), old));
        let (answer, now) = match old {
            Some((answer, old)) if self.is_fresh(&old) => (answer, old),
            _ => {
                let new = self.load();
                (self.answer(&new), new)
            }
        };
        for (block, kind) in answer.into_iter().enumerate() {
            let device = self.device.borrow();
            let is_filled = filled[block] && device.discarded[block] == discarded[block];
            assert!(!is_filled || kind.is_data(), "block {block} of {answer:?}: {:?}", device.mapped);
        }
        *loaded = Some(now);
    }
}

fn model(own: &OwnWrites, choices: Vec<u8>, allowed: Allowed) -> Model<'_> {
    let (device, choices) = (RefCell::default(), RefCell::new(choices.into_iter()));
    Model { own, device, choices, allowed, loads: Cell::new(0) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn no_completed_write_is_in_a_hole(
        choices in vec(any::<u8>(), 0..2000),
        counts_at_start in any::<bool>(),
        foreign in any::<bool>(),
        failures in any::<bool>(),
    ) {
        let own = OwnWrites::default();
        let model = model(&own, choices, Allowed { counts_at_start, foreign, failures, meeting: true });
        let mut loaded = None;
        while !model.is_over() {
            model.steps();
            // Without own writes under way, a foreign one is all that may have been counted besides.
            while model.choice(2) == 1 && model.device.borrow().running.iter().any(|write| write.is_own) {
                (0..8).for_each(|_| model.advance());
            }
            model.ask(&mut loaded);
        }
        prop_assert!(!own.lock().is_inexact);
    }

    #[test]
    fn own_writes_alone_cause_no_second_load(choices in vec(any::<u8>(), 0..2000)) {
        let allowed = Allowed { counts_at_start: false, foreign: false, failures: false, meeting: false };
        let own = OwnWrites::default();
        let model = model(&own, choices, allowed);
        let mut loaded = None;
        model.ask(&mut loaded);
        while !model.is_over() {
            model.steps();
            // The writes that are under way end.
            while !model.device.borrow().running.is_empty() {
                model.advance();
            }
            let rest = model.choices.replace(Vec::new().into_iter());
            model.ask(&mut loaded);
            model.choices.replace(rest);
        }
        prop_assert!(model.loads.get() <= 2, "{} loads", model.loads.get());
    }
}

fn counters(write_sectors: u64) -> IoCounters {
    IoCounters { write_sectors, ..IoCounters::default() }
}

fn only_own(own: &OwnWrites, baseline: &Baseline, sectors: u64) -> bool {
    own.only_own_since(baseline, Duration::ZERO, || Ok(counters(sectors))).unwrap()
}

#[test]
fn a_write_that_failed_passes_for_a_foreign_one() {
    let own = OwnWrites::default();
    let baseline = own.baseline(counters(100), true).unwrap();
    drop(own.begin(&bytes(&(0..1))));
    assert!(only_own(&own, &baseline, 100), "nothing of it was counted");
    assert!(!only_own(&own, &baseline, 101));
    let baseline = own.baseline(counters(101), true).unwrap();
    own.begin(&bytes(&(0..1))).succeeded();
    assert!(only_own(&own, &baseline, 101 + BLOCK_SECTORS));
    assert!(!only_own(&own, &baseline, 102 + BLOCK_SECTORS));
    // A write that is no number of whole sectors.
    own.begin(&(Bytes::ZERO..Bytes::new(100))).succeeded();
    assert!(only_own(&own, &baseline, 101 + BLOCK_SECTORS));
}

#[test]
fn no_baseline_begins_while_a_write_may_have_been_counted() {
    let own = OwnWrites::default();
    assert_eq!(own.baseline(counters(100), false), None);
    let before = own.baseline(counters(100), true);
    assert!(before.is_some());
    assert_eq!(own.baseline(counters(200), false), before, "the last one that was certain");
    let write = own.begin(&bytes(&(0..1)));
    // All of the write may have been counted, so that as many sectors fewer may be foreign.
    assert_eq!(own.baseline(counters(100 + BLOCK_SECTORS), true), before);
    write.succeeded();
    assert!(only_own(&own, &before.unwrap(), 100 + BLOCK_SECTORS));
}

#[test]
fn counters_that_grow_by_less_than_the_own_writes_are_not_used_again() {
    let own = OwnWrites::default();
    let baseline = own.baseline(counters(100), true).unwrap();
    own.begin(&bytes(&(0..1))).succeeded();
    assert!(!only_own(&own, &baseline, 100 + BLOCK_SECTORS - 1));
    assert!(!only_own(&own, &baseline, 100 + BLOCK_SECTORS), "a foreign write may hide");
}

#[test]
fn a_question_waits_for_the_end_of_a_write_and_not_for_one_that_hangs() {
    let own = OwnWrites::default();
    let baseline = own.baseline(counters(100), true).unwrap();
    let write = own.begin(&bytes(&(0..1)));
    let counted = || Ok(counters(100 + BLOCK_SECTORS));
    assert!(!own.only_own_since(&baseline, Duration::from_millis(5), counted).unwrap());
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| own.only_own_since(&baseline, Duration::from_secs(60), counted).unwrap());
        write.succeeded();
        assert!(asked.join().unwrap());
    });
}

#[test]
fn ranges_that_follow_later_get_the_writes_under_way() {
    let own = OwnWrites::default();
    let kind = |ranges: &Arc<WrittenRanges>, block: u64| {
        let base = Arc::new(FillBuilder::new(LEN, Bytes::new(BLOCK)).finish().unwrap());
        Written { base, ranges: ranges.clone() }.extent_at(Bytes::new(block * BLOCK)).kind
    };
    own.begin(&bytes(&(0..1))).succeeded();
    let write = own.begin(&bytes(&(2..3)));
    let ranges = own.follow(LEN, Bytes::new(BLOCK));
    let later = own.begin(&bytes(&(5..6)));
    let kinds: Vec<_> = [0, 2, 4, 5].map(|block| kind(&ranges, block).is_data()).into();
    assert_eq!(kinds, [false, true, false, true]);
    drop((write, later));
    assert_eq!(own.lock().followers.len(), 1);
    drop(ranges);
    own.begin(&bytes(&(0..1))).succeeded();
    assert_eq!(own.lock().followers.len(), 0);
}
