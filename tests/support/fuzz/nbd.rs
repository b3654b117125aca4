//! Everything that an NBD server sends, and NBD URIs.
//!
//! Invariant: no input makes a parser panic, loop, or allocate more than the limits of the protocol allow. A read is complete
//! only if each of its bytes was sent, as data or as a hole, and its result equals what was sent. The runs of a block status
//! begin at the requested offset, have increasing ends, differ from their neighbours, and end within the export. A run is a
//! hole only if all of its extents have the bit ZERO, and unchanged only if all of them have no bit at all.

use std::ops::Range;

use blkholefs::testing::map::{Extent, ExtentKind};
use blkholefs::testing::source::nbd::Uri;
use blkholefs::testing::source::nbd::frame::{Dialect, REPLY_HEADER, ReplyHeader};
use blkholefs::testing::source::nbd::proto::{
    Greeting, MAX_OPTION_REPLY, NbdInfo, NbdOption, meta_contexts, option_reply,
};
use blkholefs::testing::source::nbd::reply::{PartialReply, ReplyContent, StatusContexts};
use blkholefs::testing::spec::Spec;
use blkholefs::testing::units::Bytes;

const EXPORT: u64 = 100_000;
const START: u64 = 4096;
const END: u64 = 12_288;

pub fn run(input: &[u8]) {
    let Some((&first, input)) = input.split_first() else { return };
    match first % 8 {
        0 => uri(&String::from_utf8_lossy(input)),
        1 => handshake(input),
        choice => {
            let dialect = [Dialect::Simple, Dialect::Structured, Dialect::Extended][usize::from(choice % 3)];
            reply(dialect, choice % 8 >= 5, (first >= 128).then_some(2), input);
        }
    }
}

fn uri(text: &str) {
    if let Ok(uri) = Uri::parse(text) {
        assert!(uri.export().len() <= 4096 && !uri.file_name().contains('/'));
        assert!(Spec::parse(text.as_ref()).is_ok_and(|spec| spec.nbd_uri() == Some(&uri)));
    }
}

fn handshake(input: &[u8]) {
    if let Some(bytes) = input.first_chunk() {
        let _ = Greeting::decode(bytes);
    }
    if let Some(bytes) = input.first_chunk()
        && let Ok((_, len)) = option_reply(bytes, NbdOption::Go)
    {
        assert!(len <= MAX_OPTION_REPLY);
    }
    if let Ok(NbdInfo::BlockSizes(blocks)) = NbdInfo::decode(input) {
        assert!(blocks.minimum.get().is_power_of_two() && blocks.maximum >= blocks.minimum);
        assert!(blocks.maximum.get() % blocks.minimum.get() == 0);
    }
    if let Ok(numbers) = meta_contexts(input.chunks(19), &["base:allocation", "dirty-bitmap:bb"]) {
        assert!(numbers.len() == 2 && (numbers[0] != numbers[1] || numbers[0].is_none()));
    }
}

/// Passes a stream of replies to one answer, as a connection does. `bitmap` is the number of a dirty bitmap's context.
fn reply(dialect: Dialect, status: bool, bitmap: Option<u32>, mut input: &[u8]) {
    let range = Bytes::new(START)..Bytes::new(END);
    let mut answer = if status {
        PartialReply::status(range, StatusContexts { allocation: 1, bitmap }, dialect, Bytes::new(EXPORT))
    } else {
        PartialReply::read(range).expect("a small read")
    };
    let (mut sent, mut expected) = (0, vec![0; (END - START) as usize]);
    let (mut extents, mut dirty) = (Vec::new(), Vec::new());
    while !answer.is_done() {
        let Some((head, after)) = input.split_first_chunk::<REPLY_HEADER>() else { return };
        let Ok(head) = ReplyHeader::decode(head, dialect) else { return };
        input = after;
        let mut at = START as usize;
        let place = match head {
            ReplyHeader::Simple { error, .. } => answer.simple(error, dialect),
            ReplyHeader::Chunk { flags, kind, .. } => {
                let Some((rest, after)) = input.split_at_checked(head.rest(dialect)) else { return };
                let Ok(chunk) = answer.chunk(flags, kind, rest) else { return };
                assert!(chunk.to_parse() <= (16 << 20) + 64);
                let Some((payload, after)) = after.split_at_checked(chunk.to_parse()) else { return };
                input = after;
                match kind {
                    1 => at = number(&payload[..8]) as usize,
                    2 => sent += number(&payload[8..12]) as usize,
                    5 | 6 if payload.starts_with(&[0, 0, 0, 1]) => extents = payload.to_vec(),
                    5 | 6 => dirty = payload.to_vec(),
                    _ => {}
                }
                answer.payload(chunk, payload)
            }
        };
        match place {
            Err(_) => return,
            Ok(None) => {}
            Ok(Some(place)) => {
                let Some((data, after)) = input.split_at_checked(place.len()) else { return };
                place.copy_from_slice(data);
                sent += data.len();
                expected[at - START as usize..][..data.len()].copy_from_slice(data);
                input = after;
            }
        }
    }
    match answer.finish() {
        Err(_) => {}
        Ok(ReplyContent::Done) => panic!("a request with content is never done without it"),
        Ok(ReplyContent::Bytes(bytes)) => assert!(!status && bytes.bytes().len() == sent && bytes.bytes() == expected),
        Ok(ReplyContent::Extents(runs)) => {
            assert!(status && bitmap.is_none());
            check_runs(&runs, ExtentKind::Hole, |range| all(dialect, &extents, range, |flags| flags & 2 != 0));
        }
        Ok(ReplyContent::Bitmap { allocation, bitmap: runs }) => {
            assert!(status && bitmap.is_some());
            check_runs(&allocation, ExtentKind::Hole, |range| all(dialect, &extents, range, |flags| flags & 2 != 0));
            check_runs(&runs, ExtentKind::Unchanged, |range| all(dialect, &dirty, range, |flags| flags == 0));
        }
    }
}

/// Checks runs that are data, or `promise` where `is_proven` says so.
fn check_runs(runs: &[Extent], promise: ExtentKind, is_proven: impl Fn(Range<u64>) -> bool) {
    assert!(runs.iter().all(|run| START < run.end.get() && run.end.get() <= EXPORT));
    assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].end && pair[0].kind != pair[1].kind));
    let mut start = START;
    for run in runs {
        let proven = run.kind == promise && is_proven(start..run.end.get());
        assert!(run.kind == ExtentKind::Data || proven, "{:?} from {start}", run.kind);
        start = run.end.get();
    }
}

/// Whether a range has only extents whose flags are those that `holds` accepts.
fn all(dialect: Dialect, extents: &[u8], range: Range<u64>, holds: impl Fn(u64) -> bool) -> bool {
    let (head, width) = if dialect == Dialect::Extended { (8, 16) } else { (4, 8) };
    let mut at = u128::from(START);
    for extent in extents[head..].chunks_exact(width) {
        let (len, flags) = extent.split_at(width / 2);
        let end = at + u128::from(number(len));
        let outside = end <= range.start.into() || at >= range.end.into();
        if !outside && !holds(number(flags)) {
            return false;
        }
        at = end;
    }
    at >= range.end.into()
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}
