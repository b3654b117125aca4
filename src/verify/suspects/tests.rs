//! The rounds, on a device whose map and bytes do not agree.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::super::differences::tests::ranges;
use super::super::{Progress, holes};
use super::*;
use crate::export::{Export, HostNode, MIN_ALIGN};
use crate::map::{FillBuilder, FillMap};
use crate::reason::DenseReason;
use crate::source::{Context, Guard, Layer, LoadExtents, Stack};

fn suspect() -> Suspect {
    Suspect::new(Bytes::ZERO..Bytes::new(16384), ranges(&[(0, 4096), (8192, 12288)]))
}

fn bytes(value: u8) -> Vec<u8> {
    [vec![value; 4096], vec![0; 4096], vec![value; 8192]].concat()
}

#[test]
fn only_what_is_never_zero_and_always_a_hole_stays() {
    let mut suspect = suspect();
    suspect.note_read(&bytes(1));
    assert_eq!(suspect.ranges, ranges(&[(0, 4096), (8192, 12288)]));
    suspect.keep(&ranges(&[(4096, 10000)]));
    assert_eq!(suspect.ranges, ranges(&[(8192, 10000)]));
    suspect.note_read(&bytes(0));
    assert_eq!(suspect.ranges, []);
}

#[test]
fn without_guards_the_same_bytes_are_needed_in_three_reads() {
    let mut suspect = suspect();
    suspect.was_quiet = true;
    for (value, proven) in [(1, false), (1, false), (2, false), (2, false), (2, true), (3, false)] {
        suspect.note_read(&bytes(value));
        assert_eq!(suspect.is_proven(), proven, "{value}");
    }
    suspect.is_guarded = true;
    assert!(suspect.is_proven());
    suspect.was_quiet = false;
    assert!(!suspect.is_proven());
}

/// Fewer bytes than before are no proof that the remaining ones are the same.
#[test]
fn other_ranges_begin_again() {
    let mut suspect = suspect();
    suspect.was_quiet = true;
    (0..2).for_each(|_| suspect.note_read(&bytes(1)));
    suspect.keep(&ranges(&[(0, 4096)]));
    for proven in [false, false, true] {
        suspect.note_read(&bytes(1));
        assert_eq!(suspect.is_proven(), proven);
    }
}

const LEN: Bytes = Bytes::new(1 << 20);

/// A device that is one hole by its map, and reads as other bytes.
struct WrongMap {
    /// What all bytes are.
    byte: AtomicU8,
    /// After each read, all bytes are one more.
    is_rewritten: bool,
    /// A guard finds a change at each question.
    is_changing: bool,
    /// Reads return nothing: the device has become shorter since its length was asked.
    is_shorter: bool,
    /// After so many reads, all bytes are zero.
    zero_after: u8,
    reads: AtomicU8,
}

impl WrongMap {
    /// The findings of a verification, and the number of reads.
    fn verified(self) -> (Findings, u8) {
        let export = Arc::new(self);
        let handle = Handle::new(export.clone(), Arc::default(), Arc::default());
        let report = holes(&handle, &Progress::hidden()).unwrap();
        assert_eq!((report.holes, report.bytes, report.read), (1, LEN, LEN));
        (report.findings, export.reads.load(Ordering::SeqCst))
    }
}

fn wrong_map() -> WrongMap {
    WrongMap {
        byte: AtomicU8::new(1),
        is_rewritten: false,
        is_changing: false,
        is_shorter: false,
        zero_after: u8::MAX,
        reads: AtomicU8::new(0),
    }
}

struct NoData;

impl LoadExtents for NoData {
    fn load(&self) -> std::result::Result<FillMap, DenseReason> {
        FillBuilder::new(LEN, Bytes::new(4096)).finish().ok_or_else(|| "too large".into())
    }
}

struct Changing;

impl Guard for Changing {
    fn unchanged(&self) -> bool {
        false
    }

    fn is_of_content(&self) -> bool {
        true
    }
}

impl Export for WrongMap {
    fn name(&self) -> &Path {
        Path::new("wrong")
    }

    fn size(&self) -> io::Result<Bytes> {
        Ok(LEN)
    }

    fn align(&self) -> Bytes {
        MIN_ALIGN
    }

    fn read_at(&self, buffer: &mut AlignedBuffer, _offset: Bytes, size: usize) -> io::Result<Range<usize>> {
        let reads = self.reads.fetch_add(1, Ordering::SeqCst);
        let byte = self.byte.fetch_add(u8::from(self.is_rewritten), Ordering::SeqCst);
        buffer.resize(size).fill(if reads < self.zero_after { byte } else { 0 });
        Ok(0..if self.is_shorter { 0 } else { size })
    }

    fn resolve(&self, context: &Context) -> Stack {
        Stack::build(context, |resolver| {
            if self.is_changing {
                resolver.guard(Changing);
            }
            let map = resolver.stored(LEN, Bytes::new(4096), None, NoData);
            let (name, kind) = ("wrong".to_owned(), "test".to_owned());
            Arc::new(Layer { name, kind, holes_from: "a test".to_owned(), map, device: None, below: Vec::new() })
        })
    }

    fn host_node(&self) -> io::Result<HostNode> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Guards that find each change are proof, whatever the bytes are.
#[test]
fn without_a_change_three_rounds_are_proof() {
    for is_rewritten in [false, true] {
        let (findings, reads) = WrongMap { is_rewritten, ..wrong_map() }.verified();
        assert_eq!(findings.wrong.iter().collect::<Vec<_>>(), [Bytes::ZERO..LEN]);
        assert!(findings.undecided.is_empty());
        assert_eq!(reads, 4);
    }
}

#[test]
fn on_a_device_that_changes_all_the_time_nothing_is_proven() {
    let (findings, reads) = WrongMap { is_changing: true, ..wrong_map() }.verified();
    assert_eq!(findings.undecided.iter().collect::<Vec<_>>(), [Bytes::ZERO..LEN]);
    assert!(findings.wrong.is_empty());
    assert_eq!(u32::from(reads), MOST_ROUNDS + 1);
}

#[test]
fn one_read_of_zeros_is_enough() {
    for zero_after in 0..4 {
        let (findings, reads) = WrongMap { zero_after, ..wrong_map() }.verified();
        assert!(findings.is_empty(), "{findings}");
        assert_eq!(reads, zero_after + 1);
    }
}

#[test]
fn what_a_device_does_not_have_any_more_is_not_verified() {
    let (findings, _) = WrongMap { is_shorter: true, ..wrong_map() }.verified();
    assert!(!findings.is_empty() && findings.wrong.is_empty());
    assert_eq!(findings.to_string(), format!("{} bytes unreadable", LEN.get()));
}
