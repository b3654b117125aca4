//! What a question costs, loads and logs, on an export that counts.

use std::io;
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::export::{HostNode, MIN_ALIGN};
use crate::map::{Block, FillBuilder, FillMap};
use crate::source::{Layer, LoadExtents};

const LEN: Bytes = Bytes::new(1 << 20);
const BLOCK: Bytes = Bytes::new(64 << 10);

/// An export whose extents are stored, and whose status reports one allocated block.
struct CountingExport {
    loads: Arc<AtomicUsize>,
    result: std::result::Result<(), DenseReason>,
}

/// The stored extents of the export: one block of data.
struct Stored {
    loads: Arc<AtomicUsize>,
    result: std::result::Result<(), DenseReason>,
}

impl LoadExtents for Stored {
    fn load(&self) -> std::result::Result<FillMap, DenseReason> {
        self.loads.fetch_add(1, Ordering::Relaxed);
        self.result.clone()?;
        // So that it has a cost on any clock.
        thread::sleep(Duration::from_millis(20));
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
            let stored = Stored { loads: self.loads.clone(), result: self.result.clone() };
            let map = resolver.stored(LEN, BLOCK, Some(BLOCK), stored);
            let (name, kind) = ("counting".to_owned(), "test".to_owned());
            Arc::new(Layer { name, kind, holes_from: "a test".to_owned(), map, device: None, below: Vec::new() })
        })
    }

    fn host_node(&self) -> io::Result<HostNode> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn handle(result: std::result::Result<(), DenseReason>) -> (Handle, Arc<AtomicUsize>, Arc<MapCache>) {
    let (loads, maps) = (Arc::<AtomicUsize>::default(), Arc::<MapCache>::default());
    let export = CountingExport { loads: loads.clone(), result };
    (Handle::new(Arc::new(export), Arc::default(), maps.clone()), loads, maps)
}

#[test]
fn a_stat_before_the_first_seek_loads_nothing_and_hides_no_memory_and_no_cost() {
    let (handle, loads, maps) = handle(Ok(()));
    assert!(handle.has_hole().unwrap());
    assert_eq!(handle.allocated(), Some(BLOCK));
    assert_eq!((loads.load(Ordering::Relaxed), maps.used()), (0, Bytes::ZERO), "the status answers");
    assert_eq!(handle.seek(Bytes::ZERO, Whence::Data).unwrap(), Some(BLOCK));
    assert_eq!(loads.load(Ordering::Relaxed), 1);
    assert!(maps.used() > Bytes::ZERO);
    let rest = handle.current().unwrap().rest();
    assert!(rest > Duration::from_millis(100), "nine times the cost of loading, and not {rest:?}");
    assert_eq!(handle.seek(BLOCK, Whence::Hole).unwrap(), Some(Bytes::new(128 << 10)));
    assert_eq!(loads.load(Ordering::Relaxed), 1, "they are loaded once");
}

#[test]
fn a_lasting_failure_after_a_stat_is_all_data_with_its_reason() {
    let reason = DenseReason::Damaged("wrong checksum".into());
    let (handle, loads, _) = handle(Err(reason.clone()));
    assert!(handle.has_hole().unwrap(), "as far as the status knows");
    for _ in 0..3 {
        assert_eq!(handle.seek(Bytes::ZERO, Whence::Hole).unwrap(), Some(LEN));
    }
    assert!(!handle.has_hole().unwrap());
    assert_eq!(*handle.logged_reason.lock().unwrap(), Some(reason));
    assert_eq!(loads.load(Ordering::Relaxed), 1, "nothing changed");
}

#[test]
fn a_temporary_failure_is_loaded_again_at_a_later_question() {
    let (handle, loads, _) = handle(Err(DenseReason::NotNow("the pool is suspended".into())));
    for count in 1..=3 {
        assert_eq!(handle.seek(Bytes::ZERO, Whence::Hole).unwrap(), Some(LEN));
        assert_eq!(loads.load(Ordering::Relaxed), count);
    }
}

#[test]
fn a_stack_that_only_answered_a_stat_counts_with_the_time_of_resolving() {
    let resolve = || {
        thread::sleep(Duration::from_millis(20));
        Stack::build(&Context::default(), |_| Arc::new(crate::source::dense::layer("x", "test", LEN, "a test")))
    };
    let resolved = Resolved::new(resolve, || Some(LEN));
    assert_eq!(resolved.rest(), Duration::ZERO, "it answered nothing");
    resolved.set_answered();
    assert!(resolved.rest() > Duration::from_millis(100), "nine times the time of resolving");
}
