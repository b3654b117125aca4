//! Everything that an NBD server sends, and NBD URIs.
//!
//! Invariant: no input makes a parser panic, loop, or allocate more than the limits of the protocol allow. A read is complete
//! only if each of its bytes was sent, as data or as a hole, and its result equals what was sent. The runs of a block status
//! begin at the requested offset, have increasing ends, differ from their neighbours, and end within the export. A run is a
//! hole only if all of its extents have the bit ZERO.

use std::ops::Range;

use blkholefs::testing::map::ExtentKind;
use blkholefs::testing::source::nbd::Uri;
use blkholefs::testing::source::nbd::frame::{Dialect, REPLY_HEADER, ReplyHeader};
use blkholefs::testing::source::nbd::proto::{
    Greeting, MAX_OPTION_REPLY, NbdInfo, NbdOption, meta_context, option_reply,
};
use blkholefs::testing::source::nbd::reply::{PartialReply, ReplyContent};
use blkholefs::testing::spec::Spec;
use blkholefs::testing::units::Bytes;

const EXPORT: u64 = 100_000;
const START: u64 = 4096;
const END: u64 = 12_288;

pub fn run(input: &[u8]) {
    let Some((choice, input)) = input.split_first() else { return };
    match choice % 8 {
        0 => uri(&String::from_utf8_lossy(input)),
        1 => handshake(input),
        choice => {
            let dialect = [Dialect::Simple, Dialect::Structured, Dialect::Extended][usize::from(choice % 3)];
            reply(dialect, choice >= 5, input);
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
    let _ = meta_context(input);
}

/// Passes a stream of replies to one answer, as a connection does.
fn reply(dialect: Dialect, status: bool, mut input: &[u8]) {
    let range = Bytes::new(START)..Bytes::new(END);
    let mut answer = if status {
        PartialReply::status(range, 1, dialect, Bytes::new(EXPORT))
    } else {
        PartialReply::read(range).expect("a small read")
    };
    let (mut sent, mut expected, mut extents) = (0, vec![0; (END - START) as usize], Vec::new());
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
                    5 | 6 => extents = payload.to_vec(),
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
        Ok(ReplyContent::Flushed) => panic!("no flush was asked for"),
        Ok(ReplyContent::Bytes(bytes)) => assert!(!status && bytes.bytes().len() == sent && bytes.bytes() == expected),
        Ok(ReplyContent::Extents(runs)) => {
            assert!(status && runs.iter().all(|run| START < run.end.get() && run.end.get() <= EXPORT));
            assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].end && pair[0].kind != pair[1].kind));
            let mut start = START;
            for run in runs {
                assert!(
                    run.kind == ExtentKind::Data || is_zero(dialect, &extents, start..run.end.get()),
                    "a hole from {start}"
                );
                start = run.end.get();
            }
        }
    }
}

/// Whether a range has only extents with the bit ZERO.
fn is_zero(dialect: Dialect, extents: &[u8], range: Range<u64>) -> bool {
    let (head, width) = if dialect == Dialect::Extended { (8, 16) } else { (4, 8) };
    let mut at = u128::from(START);
    for extent in extents[head..].chunks_exact(width) {
        let (len, flags) = extent.split_at(width / 2);
        let end = at + u128::from(number(len));
        let outside = end <= range.start.into() || at >= range.end.into();
        if !outside && number(flags) & 2 == 0 {
            return false;
        }
        at = end;
    }
    at >= range.end.into()
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}
