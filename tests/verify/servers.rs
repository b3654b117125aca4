//! Servers whose block status and bytes do not agree: always, at times, or because of writers.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::common::image::Image;
use crate::fake::{Action, BLOCK, CONTEXT, Dialect, FakeServer, Message, Step, extents, refusal, status_reply};
use crate::{Verified, against, verify};

const BLOCKS: usize = 512;
/// The block of the disk that is not zero.
const WRITTEN: usize = 300;
const AT: usize = WRITTEN * BLOCK;

/// Zeros, but for one block.
fn disk() -> Vec<u8> {
    let mut disk = vec![0; BLOCKS * BLOCK];
    disk[AT..AT + BLOCK].fill(0xa5);
    disk
}

/// A server whose answer to a block status query is "hole" wherever `is_wrong` returns true. It gets the number
/// of reads of the written block before.
fn server(disk: &[u8], is_wrong: impl Fn(usize) -> bool + Send + Sync + 'static, changes_bytes: bool) -> FakeServer {
    let reads = AtomicUsize::new(0);
    let hook = move |message: &mut Message| {
        let request = message.request;
        let has_block = request.offset < (AT + BLOCK) as u64 && request.offset + request.len > AT as u64;
        match message.step {
            Step::Read if has_block => {
                let number = reads.fetch_add(1, Ordering::SeqCst);
                if changes_bytes {
                    let byte = u8::try_from(number % 200).expect("a byte") + 1;
                    message.bytes.iter_mut().filter(|it| **it == 0xa5).take(100).for_each(|it| *it = byte);
                }
            }
            Step::Status if is_wrong(reads.load(Ordering::SeqCst)) => {
                message.bytes = status_reply(Dialect::Structured, request, CONTEXT, &[(request.len, true)]);
            }
            _ => {}
        }
        Action::Continue
    };
    FakeServer::new(Dialect::Structured, disk, Arc::new(hook))
}

#[test]
fn a_wrong_hole_is_found() {
    let server = server(&disk(), |_| true, false);
    let verified = verify(Path::new(&server.uri));
    let lines = verified.failed();
    assert_eq!(lines[0], format!("not zero in a hole: {BLOCK} bytes at {AT}"));
    assert!(lines[1].ends_with(&format!("{BLOCK} bytes in holes not zero")), "{}", lines[1]);
    assert_eq!(lines.len(), 2);
}

/// The copy has what the device has, but its map is wrong.
#[test]
fn a_wrong_hole_is_found_by_its_copy() {
    let server = server(&disk(), |_| true, false);
    let copy = Image::new(0);
    std::fs::write(copy.path(), disk()).expect("a copy");
    let verified = against(copy.path(), Path::new(&server.uri));
    assert_eq!(verified.failed()[0], format!("not zero in a hole: {BLOCK} bytes at {AT}"));
}

/// The map has a hole, the read finds bytes, and then the map has data: the block was written in between.
#[test]
fn a_block_that_was_written_is_no_wrong_hole() {
    for reads in 1..4 {
        let server = server(&disk(), move |before| before < reads, false);
        let verified = verify(Path::new(&server.uri));
        assert!(verified.agreed()[0].ends_with("all zero"), "{reads}");
    }
}

/// In each round the block is a hole, then it has other bytes, then it is a hole again. A writer that writes and discards can
/// have done that.
#[test]
fn other_bytes_in_each_read_are_undecided() {
    let server = server(&disk(), |_| true, true);
    let verified = verify(Path::new(&server.uri));
    let lines = verified.failed();
    assert_eq!(lines[0], format!("not zero in a hole, or written at that moment: {BLOCK} bytes at {AT}"));
}

#[test]
fn wrong_holes_are_listed_up_to_a_number_and_counted() {
    let mut disk = vec![0; BLOCKS * BLOCK];
    (0..BLOCKS).step_by(4).for_each(|block| disk[block * BLOCK + 7..][..10].fill(1));
    let server = server(&disk, |_| true, false);
    let verified = verify(Path::new(&server.uri));
    let lines = verified.failed();
    assert_eq!(lines[1], format!("not zero in a hole: 10 bytes at {}", 4 * BLOCK + 7));
    assert_eq!(lines[10], format!("not zero in a hole: {} bytes more", BLOCKS / 4 * 10 - 100));
    assert!(lines[11].ends_with(&format!("{} bytes in holes not zero", BLOCKS / 4 * 10)), "{}", lines[11]);
}

#[test]
fn what_cannot_be_read_is_named_and_a_failure() {
    let hook = |message: &mut Message| {
        if message.step == Step::Read {
            message.bytes = refusal(Dialect::Structured, message.request.cookie);
        }
        Action::Continue
    };
    let server = FakeServer::new(Dialect::Structured, &vec![0; BLOCKS * BLOCK], Arc::new(hook));
    let verified = verify(Path::new(&server.uri));
    let lines = verified.failed();
    assert_eq!(lines.len(), 3, "{lines:?}");
    for (line, at) in lines.iter().zip([0, 1 << 20]) {
        assert!(
            lines[..2].iter().any(|line| line.ends_with(&format!("cannot read at {at}: Input/output error"))),
            "{line}"
        );
    }
    assert!(lines[2].ends_with(&format!("{} bytes unreadable", BLOCKS * BLOCK)), "{}", lines[2]);
}

/// A server that records what is read from a disk with many holes.
struct Recorder {
    server: FakeServer,
    reads: Arc<Mutex<BTreeSet<(u64, u64)>>>,
}

impl Recorder {
    fn new() -> Self {
        let mut disk = vec![0; 8192 * BLOCK];
        disk.chunks_mut(BLOCK).step_by(7).for_each(|block| block.fill(1));
        let reads = Arc::new(Mutex::new(BTreeSet::new()));
        let recorded = Arc::clone(&reads);
        let hook = move |message: &mut Message| {
            if message.step == Step::Read {
                recorded.lock().expect("no panic").insert((message.request.offset, message.request.len));
            }
            Action::Continue
        };
        Self { server: FakeServer::new(Dialect::Structured, &disk, Arc::new(hook)), reads }
    }

    /// The lines, and what was read.
    fn run(&self, words: &[&str]) -> (Vec<String>, BTreeSet<(u64, u64)>) {
        let verified = Verified::of(&[words, &[&*self.server.uri]].concat());
        let lines = verified.agreed().into_iter().map(str::to_owned).collect();
        (lines, std::mem::take(&mut *self.reads.lock().expect("no panic")))
    }
}

#[test]
fn a_seed_repeats_a_sample() {
    let recorder = Recorder::new();
    let (lines, first) = recorder.run(&["--sample", "9"]);
    let seed = lines[0].strip_prefix("seed ").expect("the seed is printed");
    let read: u64 = first.iter().map(|read| read.1).sum();
    let expected = format!("9 pieces of 65536 bytes at random, {read} bytes read, all zero");
    assert!(lines[1].ends_with(&expected), "{}", lines[1]);
    // The last of all pieces is shorter.
    assert!((8 << 16..=9 << 16).contains(&read), "{read}");
    let (again, repeated) = recorder.run(&["--sample", "9", "--seed", seed]);
    assert_eq!((&again, &repeated), (&lines, &first));
    let other = if seed == "1" { "2" } else { "1" };
    assert_ne!(recorder.run(&["--sample", "9", "--seed", other]).1, first);
    // More pieces than there are.
    let (lines, all) = recorder.run(&["--sample", "1000000", "--seed", "1"]);
    let holes: u64 = all.iter().map(|read| read.1).sum();
    assert!(lines[1].contains(&format!("{holes} bytes read")), "{lines:?}");
    let (lines, every) = recorder.run(&[]);
    assert_eq!(every.iter().map(|read| read.1).sum::<u64>(), holes);
    assert!(lines[0].contains(&format!("{holes} bytes in 1171 holes")), "{lines:?}");
}

/// A wrong hole is in a sample of all pieces.
#[test]
fn a_sample_finds_wrong_holes() {
    let server = server(&disk(), |_| true, false);
    let verified = Verified::of(&["--sample", "1000", &*server.uri]);
    assert_eq!(verified.failed()[1], format!("not zero in a hole: {BLOCK} bytes at {AT}"));
    // The server reports the block as data unless its answers are wrong.
    assert!(
        extents(&disk(), crate::fake::Request { flags: 0, cookie: 0, offset: 0, len: (BLOCKS * BLOCK) as u64 }).len()
            == 3
    );
}
