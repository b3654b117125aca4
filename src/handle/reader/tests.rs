//! What is fetched ahead, and when it is used, on a file that counts what is read from it directly.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{OnceLock, Weak};

use super::*;
use crate::export::{Export, HostNode, MIN_ALIGN, PendingRead};
use crate::map::view::Whence;
use crate::map::{Block, FillBuilder, FillMap};
use crate::reason::DenseReason;
use crate::source::{Context, Layer, LoadExtents, Stack};
use crate::sys::aio::AioQueue;

const MIB: u64 = 1 << 20;
const LEN: Bytes = Bytes::new(64 * MIB);
const BLOCK: Bytes = Bytes::new(64 << 10);

/// A file of which the first 64 KiB of each MiB are data.
struct SparseExport {
    file: File,
    queue: Arc<AioQueue>,
    /// Bytes of reads that were begun.
    begun: AtomicU64,
    /// The longest of these reads.
    longest_begun: AtomicU64,
    longest: Bytes,
    /// Beginning reads panics.
    panics: AtomicBool,
    /// The handle, and its generation when it resolved the stack last.
    handle: OnceLock<Weak<Handle>>,
    resolved_in: AtomicU64,
}

impl Export for SparseExport {
    fn name(&self) -> &Path {
        Path::new("sparse")
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

    fn read_queue(&self) -> Option<&dyn ReadQueue> {
        Some(self)
    }

    fn resolve(&self, context: &Context) -> Stack {
        let handle = self.handle.get().and_then(Weak::upgrade).expect("the handle is kept");
        self.resolved_in.store(handle.generation(), Ordering::Relaxed);
        Stack::build(context, |resolver| {
            let map = resolver.stored(LEN, BLOCK, None, FirstBlocks);
            let (name, kind) = ("sparse".to_owned(), "test".to_owned());
            Arc::new(Layer { name, kind, holes_from: "a test".to_owned(), map, device: None, below: Vec::new() })
        })
    }

    fn host_node(&self) -> io::Result<HostNode> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl ReadQueue for SparseExport {
    fn longest(&self) -> Bytes {
        self.longest
    }

    fn begin(&self, reads: Vec<(Bytes, AlignedBuffer)>) -> Vec<PendingRead> {
        let bytes: usize = reads.iter().map(|(_, buffer)| buffer.bytes().len()).sum();
        assert!(!self.panics.load(Ordering::Relaxed), "on purpose");
        self.begun.fetch_add(bytes as u64, Ordering::Relaxed);
        let longest = reads.iter().map(|(_, buffer)| buffer.bytes().len()).max().unwrap_or(0);
        self.longest_begun.fetch_max(longest as u64, Ordering::Relaxed);
        self.queue.begin(&self.file, reads).into_iter().map(PendingRead::Direct).collect()
    }

    fn finish(&self) {}
}

struct FirstBlocks;

impl LoadExtents for FirstBlocks {
    fn load(&self) -> std::result::Result<FillMap, DenseReason> {
        let builder = FillBuilder::new(LEN, BLOCK);
        for block in (0..LEN.get() / BLOCK.get()).step_by(16) {
            builder.filler().set_range(Block::new(block)..Block::new(block + 1));
        }
        builder.finish().ok_or_else(|| "too large".into())
    }
}

struct Fixture {
    export: Arc<SparseExport>,
    handle: Arc<Handle>,
    ahead: Arc<ReadAhead>,
    reader: Arc<Reader>,
}

impl Fixture {
    fn new(memory: u64) -> Self {
        Self::with_longest(memory, Bytes::new(MIB))
    }

    fn with_longest(memory: u64, longest: Bytes) -> Self {
        let mut path = std::env::temp_dir();
        path.push(format!("blkholefs-reader-{}-{:?}", std::process::id(), std::thread::current().id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file.set_len(LEN.get()).unwrap();
        let queue = AioQueue::new(256).unwrap();
        let (begun, longest_begun, panics, handle, resolved_in) = Default::default();
        let export = Arc::new(SparseExport { file, queue, begun, longest_begun, longest, panics, handle, resolved_in });
        let handle = Arc::new(Handle::new(export.clone(), Arc::default(), Arc::default()));
        export.handle.set(Arc::downgrade(&handle)).expect("it is the first handle");
        let ahead = ReadAhead::new(Some(Bytes::new(memory)), None);
        let reader = Reader::new(handle.clone(), ahead.clone());
        let fixture = Self { export, handle, ahead, reader };
        fixture.write(1);
        fixture
    }

    /// Writes a byte to all data.
    fn write(&self, byte: u8) {
        for start in (0..LEN.get()).step_by(1 << 20) {
            self.export.file.write_all_at(&vec![byte; 64 << 10], start).unwrap();
        }
    }

    /// Looks for the data of MiB `index` and reads it. Returns its first byte, if it was fetched ahead.
    fn read_extent(&self, index: u64) -> Option<u8> {
        let start = Bytes::new(index * MIB);
        assert_eq!(self.handle.seek(start, Whence::Data).unwrap(), Some(start));
        let mut buffer = AlignedBuffer::new();
        let bytes = self.reader.fetched(&mut buffer, start, 64 << 10)?;
        assert!(bytes.as_ref().len() == 64 << 10 && bytes.as_ref().iter().all(|byte| *byte == bytes.as_ref()[0]));
        let first = bytes.as_ref()[0];
        self.reader.fetch_more();
        Some(first)
    }

    /// Reads the first `count` extents.
    fn read_extents(&self, count: u64) {
        for index in 0..count {
            self.read_extent(index);
        }
    }

    fn begun(&self) -> u64 {
        self.export.begun.load(Ordering::Relaxed)
    }
}

#[test]
fn the_extents_that_come_next_are_fetched_and_each_byte_once() {
    let fixture = Fixture::new(32 * MIB);
    let fetched: Vec<_> = (0..64).map(|index| fixture.read_extent(index)).collect();
    assert!(fetched[..2].iter().all(Option::is_none), "two reads in order are the sign");
    assert!(fetched[4..].iter().all(|byte| *byte == Some(1)), "{fetched:?}");
    assert!(fixture.begun() <= 64 * (64 << 10), "no byte was read twice, and no hole at all");
}

#[test]
fn bytes_from_before_an_open_or_a_change_are_not_used_after_it() {
    let fixture = Fixture::new(32 * MIB);
    fixture.read_extents(8);
    fixture.write(2);
    assert_eq!(fixture.read_extent(8), Some(1), "the open is older than the write");
    fixture.handle.begin_generation();
    let later: Vec<_> = (9..20).map(|index| fixture.read_extent(index)).collect();
    assert!(later.iter().all(|byte| byte.is_none_or(|byte| byte == 2)), "{later:?}");
    assert!(later.contains(&Some(2)), "the next ones are fetched again");
    fixture.write(3);
    // A guard found a change: the stack is resolved again.
    fixture.handle.drop_map();
    let later: Vec<_> = (20..30).map(|index| fixture.read_extent(index)).collect();
    assert!(later.iter().all(|byte| byte.is_none_or(|byte| byte == 3)), "{later:?}");
}

/// A change between the two would be found by no guard, since those of the new stack are made after it.
#[test]
fn what_was_fetched_before_a_new_stack_was_made_is_not_used_with_it() {
    let fixture = Fixture::new(32 * MIB);
    for _ in 0..3 {
        fixture.handle.drop_map();
        fixture.handle.seek(Bytes::ZERO, Whence::Hole).unwrap();
        assert!(fixture.handle.generation() > fixture.export.resolved_in.load(Ordering::Relaxed));
    }
}

#[test]
fn a_client_that_does_something_else_has_nothing_fetched() {
    let fixture = Fixture::new(32 * MIB);
    fixture.read_extents(8);
    assert!(fixture.begun() > 0);
    let before = fixture.begun();
    for index in [50, 3, 40, 12, 60, 20, 33] {
        fixture.read_extent(index);
    }
    assert_eq!(fixture.begun(), before);
    // Until it reads in order again, what was fetched is used if it happens to be what the client reads.
    fixture.read_extent(34);
    let (_, bytes) = fixture.reader.lock().window.ahead(Bytes::new(34 * MIB));
    assert_eq!(bytes, fixture.reader.lock().window.ahead(Bytes::ZERO).1, "the pieces for the start are dropped");
}

#[test]
fn the_memory_is_bounded_and_shared_with_files_that_use_theirs() {
    let fixture = Fixture::new(MIB);
    fixture.read_extents(8);
    let (_, bytes) = fixture.reader.lock().window.ahead(Bytes::ZERO);
    assert!(Bytes::ZERO < bytes && bytes <= Bytes::new(MIB / 2), "a half for one file: {bytes}");
    assert!(fixture.ahead.memory() <= 1 << 20);
    let none = Fixture::new(0);
    assert!((0..20).all(|index| none.read_extent(index).is_none()));
    assert_eq!((none.begun(), none.ahead.memory()), (0, 0));
}

#[test]
fn pieces_that_are_too_old_give_way_to_another_file() {
    let fixture = Fixture::new(MIB);
    fixture.read_extents(8);
    // As a second later.
    fixture.handle.begin_generation();
    let taken: Vec<_> = std::iter::from_fn(|| fixture.ahead.buffer(64 << 10, &mut Vec::new())).collect();
    assert!(taken.len() >= 14, "{} of 15 buffers", taken.len());
}

#[test]
fn a_client_that_reads_everything_is_served_in_any_size_of_read() {
    let fixture = Fixture::new(32 * MIB);
    // Through the map of the export, which is loaded by the first question.
    fixture.handle.seek(Bytes::ZERO, Whence::Hole).unwrap();
    let (mut hits, mut reads) = (0, 0);
    for start in (0..LEN.get()).step_by(300 << 10) {
        let mut buffer = AlignedBuffer::new();
        let wanted: Vec<u8> =
            (start..(start + (300 << 10)).min(LEN.get())).map(|at| u8::from(at % MIB < 64 << 10)).collect();
        reads += 1;
        if let Some(bytes) = fixture.reader.fetched(&mut buffer, Bytes::new(start), 300 << 10) {
            assert!(bytes.as_ref() == wanted, "at {start}");
            hits += 1;
        }
        fixture.reader.fetch_more();
    }
    assert!(hits * 4 > reads, "{hits} of {reads}");
}

#[test]
fn threads_that_read_at_the_same_time_get_their_own_bytes() {
    let fixture = Fixture::new(32 * MIB);
    fixture.read_extents(4);
    let next = AtomicU64::new(4 * 16);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut buffer = AlignedBuffer::new();
                loop {
                    // Pieces of 4 KiB of the extents, in order.
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= 64 * 16 {
                        return;
                    }
                    let start = Bytes::new(index / 16 * MIB + index % 16 * 4096);
                    if let Some(bytes) = fixture.reader.fetched(&mut buffer, start, 4096) {
                        assert!(bytes.as_ref() == [1; 4096]);
                    }
                    fixture.reader.fetch_more();
                }
            });
        }
    });
}

#[test]
fn what_the_kernel_reads_behind_each_extent_is_fetched_with_the_extent() {
    let fixture = Fixture::new(32 * MIB);
    let mut hits = Vec::new();
    for index in 0..30 {
        let start = Bytes::new(index * MIB);
        assert_eq!(fixture.handle.seek(start, Whence::Data).unwrap(), Some(start));
        for (at, len) in [(0, 4 << 10), (4 << 10, 76 << 10)] {
            let mut buffer = AlignedBuffer::new();
            hits.push(fixture.reader.fetched(&mut buffer, start.saturating_add(Bytes::new(at)), len).is_some());
            fixture.reader.fetch_more();
        }
    }
    assert!(hits[10..].iter().all(|hit| *hit), "{hits:?}");
}

#[test]
fn no_piece_is_longer_than_a_read_may_be() {
    for longest in [4 << 10, 64 << 10, (64 << 10) + 512] {
        let fixture = Fixture::with_longest(32 * MIB, Bytes::new(longest));
        for index in 0..30 {
            let start = Bytes::new(index * MIB);
            assert_eq!(fixture.handle.seek(start, Whence::Data).unwrap(), Some(start));
            // The kernel reads more than the extent.
            let mut buffer = AlignedBuffer::new();
            if let Some(bytes) = fixture.reader.fetched(&mut buffer, start, 100 << 10) {
                assert!((0..).zip(bytes.as_ref()).all(|(at, byte)| *byte == u8::from(at < 64 << 10)));
            }
            fixture.reader.fetch_more();
        }
        assert!(fixture.begun() > 0 && fixture.export.longest_begun.load(Ordering::Relaxed) <= longest, "{longest}");
    }
}

#[test]
fn without_memory_no_map_is_asked_for_a_client_that_looks_for_none() {
    for (memory, asks) in [(0, false), (1, false), (4096, false), (32 * MIB, true)] {
        let fixture = Fixture::new(memory);
        for start in (0..4 * MIB).step_by(64 << 10) {
            fixture.reader.fetched(&mut AlignedBuffer::new(), Bytes::new(start), 64 << 10);
            fixture.reader.fetch_more();
        }
        assert_eq!(fixture.handle.current().is_some(), asks, "{memory}");
    }
}

#[test]
fn a_read_begins_others_without_a_wait_for_the_map() {
    let fixture = Fixture::new(32 * MIB);
    for start in (0..4 * MIB).step_by(64 << 10) {
        assert!(fixture.reader.fetched(&mut AlignedBuffer::new(), Bytes::new(start), 64 << 10).is_none());
    }
    assert!(fixture.handle.current().is_none(), "only after the reply");
}

#[test]
fn nothing_is_fetched_after_the_close() {
    let fixture = Fixture::new(32 * MIB);
    fixture.read_extents(8);
    // The thread that replied to the last read fetches more at the same time.
    let before = fixture.begun();
    fixture.reader.finish();
    fixture.read_extents(30);
    assert_eq!((fixture.begun(), fixture.reader.lock().window.ahead(Bytes::ZERO)), (before, (0, Bytes::ZERO)));
}

#[test]
fn after_a_panic_no_thread_waits_for_its_pieces() {
    let fixture = Fixture::new(32 * MIB);
    fixture.export.panics.store(true, Ordering::Relaxed);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| fixture.read_extents(8)));
    assert!(panicked.is_err());
    fixture.export.panics.store(false, Ordering::Relaxed);
    let fetched: Vec<_> = (0..30).map(|index| fixture.read_extent(index)).collect();
    assert!(fetched[10..].iter().all(|byte| *byte == Some(1)), "{fetched:?}");
}

#[test]
fn extents_that_share_a_unit_have_one_piece_for_it() {
    let fixture = Fixture::new(32 * MIB);
    let mut state = fixture.reader.lock();
    fixture.handle.seek(Bytes::ZERO, Whence::Data).unwrap();
    let unit = MIN_ALIGN.get();
    // A piece that ends within the next extent, at its second unit.
    state.window.push(Bytes::ZERO..Bytes::new(MIB + unit), 0);
    let next = |state: &State, at| match fixture.reader.next_piece(state, Bytes::new(at), Bytes::new(MIB), LEN) {
        NextPiece::Range(range) => Some((range.start.get(), range.end.get())),
        NextPiece::Behind(_) | NextPiece::None => None,
    };
    assert_eq!(next(&state, MIB + 5), Some((MIB + unit, MIB + (64 << 10))));
    assert_eq!(next(&state, 2 * MIB + 5), Some((2 * MIB, 2 * MIB + (64 << 10))));
    assert_eq!(next(&state, 2 * MIB + (64 << 10)), None, "a hole");
    state.window.push(Bytes::new(2 * MIB)..Bytes::new(4 * MIB), 0);
    assert_eq!(next(&state, 2 * MIB + 5), None, "it is there");
}
