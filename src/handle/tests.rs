//! What a question costs, loads and logs, on an export that counts and a clock that stands still.

mod evicted;

use std::io;
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use super::clock::Clock;
use super::*;
use crate::export::{HostNode, MIN_ALIGN};
use crate::map::{Block, FillBuilder, FillMap, WrittenRanges};
use crate::source::{Layer, LoadExtents};

const LEN: Bytes = Bytes::new(1 << 20);
const BLOCK: Bytes = Bytes::new(64 << 10);

/// The time that loading takes.
const COST: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Counters {
    resolved: AtomicUsize,
    loads: AtomicUsize,
}

impl Counters {
    fn resolved(&self) -> usize {
        self.resolved.load(Ordering::Relaxed)
    }

    fn loads(&self) -> usize {
        self.loads.load(Ordering::Relaxed)
    }
}

/// An export whose extents are stored, and whose status reports one allocated block.
struct CountingExport {
    counters: Arc<Counters>,
    maps: Arc<MapCache>,
    result: std::result::Result<(), DenseReason>,
}

/// The stored extents of the export: one block of data.
struct Stored {
    counters: Arc<Counters>,
    maps: Arc<MapCache>,
    result: std::result::Result<(), DenseReason>,
}

impl LoadExtents for Stored {
    fn load(&self) -> std::result::Result<FillMap, DenseReason> {
        self.counters.loads.fetch_add(1, Ordering::Relaxed);
        self.result.clone()?;
        self.maps.clock.sleep(COST);
        let builder = FillBuilder::new(LEN, BLOCK);
        builder.filler().set_range(Block::new(1)..Block::new(2));
        builder.finish().ok_or_else(|| "too large".into())
    }
}

impl Export for CountingExport {
    fn name(&self) -> &Path {
        Path::new("counting")
    }

    fn size(&self) -> io::Result<Bytes> {
        Ok(LEN)
    }

    fn align(&self) -> Bytes {
        MIN_ALIGN
    }

    fn read_at(&self, _buffer: &mut AlignedBuffer, _offset: Bytes, _size: usize) -> io::Result<Range<usize>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn resolve(&self, context: &Context) -> Stack {
        Stack::build(context, |resolver| {
            self.counters.resolved.fetch_add(1, Ordering::Relaxed);
            let (counters, maps) = (self.counters.clone(), self.maps.clone());
            let stored = Stored { counters, maps, result: self.result.clone() };
            let map = resolver.stored(LEN, BLOCK, Some(BLOCK), stored);
            let (name, kind) = ("counting".to_owned(), "test".to_owned());
            Arc::new(Layer { name, kind, holes_from: "a test".to_owned(), map, device: None, below: Vec::new() })
        })
    }

    fn host_node(&self) -> io::Result<HostNode> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A limit of the memory of extents, or the default, with a clock that stands still.
fn cache(limit: Option<Bytes>) -> Arc<MapCache> {
    Arc::new(MapCache::with_clock(limit, Clock::Manual(Mutex::default())))
}

fn handle(maps: &Arc<MapCache>, result: std::result::Result<(), DenseReason>) -> (Handle, Arc<Counters>) {
    let counters = Arc::<Counters>::default();
    let export = CountingExport { counters: counters.clone(), maps: maps.clone(), result };
    (Handle::new(Arc::new(export), Arc::default(), maps.clone()), counters)
}

#[test]
fn a_stat_before_the_first_seek_loads_nothing_and_hides_no_memory_and_no_cost() {
    let maps = cache(None);
    let (handle, counters) = handle(&maps, Ok(()));
    assert!(handle.has_hole().unwrap());
    assert_eq!(handle.allocated(), Some(BLOCK));
    assert_eq!((counters.loads(), maps.used()), (0, Bytes::ZERO), "the status answers");
    assert_eq!(handle.seek(Bytes::ZERO, Whence::Data).unwrap(), Some(BLOCK));
    assert_eq!(counters.loads(), 1);
    assert!(maps.used() > Bytes::ZERO);
    assert_eq!(handle.current().unwrap().cost().rest(maps.clock.now()), 9 * COST);
    assert_eq!(handle.seek(BLOCK, Whence::Hole).unwrap(), Some(Bytes::new(128 << 10)));
    assert_eq!(counters.loads(), 1, "they are loaded once");
}

#[test]
fn a_lasting_failure_after_a_stat_is_all_data_with_its_reason() {
    let reason = DenseReason::Damaged("wrong checksum".into());
    let (handle, counters) = handle(&cache(None), Err(reason.clone()));
    assert!(handle.has_hole().unwrap(), "as far as the status knows");
    for _ in 0..3 {
        assert_eq!(handle.seek(Bytes::ZERO, Whence::Hole).unwrap(), Some(LEN));
    }
    assert!(!handle.has_hole().unwrap());
    assert_eq!(*handle.logged_reason.lock().unwrap(), Some(reason));
    let dense = handle.state().0.dense;
    assert_eq!((dense.len(), &*dense[0].reason, dense[0].is_degraded), (1, "wrong checksum", true));
    let since = dense[0].since.expect("the time of the load");
    handle.drop_map();
    assert_eq!(handle.state().0.dense, [], "nothing is known");
    assert_eq!(handle.seek(Bytes::ZERO, Whence::Hole).unwrap(), Some(LEN));
    assert_eq!(handle.state().0.dense[0].since, Some(since), "the same reason as before");
    assert_eq!(counters.loads(), 2, "nothing changed, apart from the map that was dropped");
}

#[test]
fn a_temporary_failure_is_loaded_again_at_a_later_question() {
    let (handle, counters) = handle(&cache(None), Err(DenseReason::NotNow("the pool is suspended".into())));
    for count in 1..=3 {
        assert_eq!(handle.seek(Bytes::ZERO, Whence::Hole).unwrap(), Some(LEN));
        assert_eq!(counters.loads(), count);
    }
}

#[test]
fn a_stack_that_only_answered_a_stat_counts_with_the_time_of_resolving() {
    let clock = Clock::Manual(Mutex::default());
    let resolve = || {
        clock.sleep(COST);
        Stack::build(&Context::default(), |_| Arc::new(crate::source::dense::layer("x", "test", LEN, "a test")))
    };
    let resolved = Resolved::new(&clock, None, resolve, || Some(LEN));
    assert_eq!(resolved.cost().rest(clock.now()), Duration::ZERO, "it answered nothing");
    resolved.set_answered();
    assert_eq!(resolved.cost().rest(clock.now()), 9 * COST);
}

#[test]
fn answers_from_one_stack_have_equal_states() {
    let maps = cache(None);
    let (handle, _) = handle(&maps, Ok(()));
    let range = Bytes::ZERO..LEN;
    let (one, other) = (handle.holes_now(&range).unwrap(), handle.holes_now(&range).unwrap());
    assert_eq!(one.holes, [Bytes::ZERO..BLOCK, Bytes::new(128 << 10)..LEN]);
    assert!(one.state.is_some_and(|state| state.is_guarded));
    assert_eq!((&one.holes, one.state), (&other.holes, other.state));
    // As after a change that a guard found.
    handle.drop_map();
    let later = handle.holes_now(&range).unwrap();
    assert_eq!(later.holes, one.holes);
    assert!(later.state.is_some() && later.state != one.state);
    let walked: Vec<_> = handle.walk(range).map(|extent| extent.unwrap()).collect();
    assert_eq!(walked.iter().filter(|(_, extent)| extent.kind.is_hole()).count(), 2);
    assert_eq!(walked.last().map(|(_, extent)| extent.end), Some(LEN));
}

/// Finds own writes, which the extents follow.
struct OwnWritesOnly;

impl crate::source::Guard for OwnWritesOnly {
    fn unchanged(&self) -> bool {
        false
    }

    fn unchanged_but_followed(&self) -> bool {
        true
    }
}

#[test]
fn extents_that_follow_own_writes_stay_fresh_and_their_growth_is_counted() {
    let clock = Clock::Manual(Mutex::default());
    let ranges = Arc::new(WrittenRanges::new(LEN, BLOCK));
    let resolve = || {
        Stack::build(&Context::default(), |resolver| {
            resolver.guard(OwnWritesOnly);
            let base = Arc::new(FillBuilder::new(LEN, BLOCK).finish().unwrap());
            let map = resolver.followed(base, ranges.clone());
            Arc::new(Layer { map, ..crate::source::dense::layer("x", "test", LEN, "a test") })
        })
    };
    let resolved = Resolved::new(&clock, None, resolve, || Some(LEN));
    let loaded = resolved.load(&clock, |_| {});
    assert!(resolved.is_fresh(SequenceNumber::last(), false));
    assert!(!resolved.stack.unchanged(), "for all that is not among the extents");
    assert_eq!(resolved.memory_again(None), None);
    ranges.add(&(BLOCK..Bytes::new(BLOCK.get() + 1)));
    assert_eq!(view::seek(loaded.map(), MIN_ALIGN, Bytes::ZERO, Whence::Data), Some(BLOCK));
    assert_eq!(resolved.stack.allocated(), Some(BLOCK));
    let memory = resolved.memory_again(None).expect("it has grown");
    assert!(memory > loaded.memory);
    assert_eq!(resolved.memory_again(None), None);
}
