use super::*;

fn bytes(start: u64, end: u64) -> Range<Bytes> {
    Bytes::new(start)..Bytes::new(end)
}

/// A chunk as a server sends it: flags, type, payload.
type Sent<'a> = (u16, u16, Vec<u8>);

/// Feeds chunks of the structured dialect to an answer, as a connection does.
fn feed(mut answer: PartialReply, chunks: &[Sent<'_>]) -> std::result::Result<ReplyContent, RequestError> {
    for (flags, kind, payload) in chunks {
        let len = u32::try_from(payload.len()).unwrap();
        let chunk = answer.chunk(*flags, *kind, &len.to_be_bytes()).map_err(RequestError::violation)?;
        let (parsed, data) = payload.split_at(chunk.to_parse());
        if let Some(place) = answer.payload(chunk, parsed).map_err(RequestError::violation)? {
            place.copy_from_slice(data);
        }
    }
    answer.finish()
}

fn data(flags: u16, offset: u64, data: &[u8]) -> Sent<'_> {
    (flags, OFFSET_DATA, [offset.to_be_bytes().as_slice(), data].concat())
}

fn hole(flags: u16, offset: u64, len: u32) -> Sent<'static> {
    (flags, OFFSET_HOLE, [offset.to_be_bytes().as_slice(), len.to_be_bytes().as_slice()].concat())
}

fn status(flags: u16, context: u32, extents: &[(u32, u32)]) -> Sent<'static> {
    let mut payload = context.to_be_bytes().to_vec();
    for (len, state) in extents {
        payload.extend(len.to_be_bytes());
        payload.extend(state.to_be_bytes());
    }
    (flags, STATUS, payload)
}

fn read(start: u64, end: u64, chunks: &[Sent<'_>]) -> std::result::Result<Vec<u8>, RequestError> {
    feed(PartialReply::read(bytes(start, end)).unwrap(), chunks).map(|content| match content {
        ReplyContent::Bytes(bytes) => bytes.bytes().to_vec(),
        _ => panic!("a read has bytes"),
    })
}

fn only(allocation: u32) -> StatusContexts {
    StatusContexts { allocation, bitmap: None }
}

fn read_status(chunks: &[Sent<'_>]) -> std::result::Result<Vec<(u64, ExtentKind)>, RequestError> {
    let answer = PartialReply::status(bytes(4096, 16384), only(9), Dialect::Structured, Bytes::new(20000));
    feed(answer, chunks).map(|content| match content {
        ReplyContent::Extents(runs) => runs.iter().map(|run| (run.end.get(), run.kind)).collect(),
        _ => panic!("a status has runs"),
    })
}

#[test]
fn a_read_in_any_order() {
    let chunks = [data(0, 14, b"ef"), hole(0, 12, 2), data(0, 10, b"ab"), (FLAG_DONE, NONE, vec![])];
    assert_eq!(read(10, 16, &chunks), Ok(b"ab\0\0ef".to_vec()));
    assert_eq!(read(0, 2, &[data(FLAG_DONE, 0, b"xy")]), Ok(b"xy".to_vec()));
}

#[test]
fn a_read_that_is_not_covered_exactly_is_no_answer() {
    for chunks in [
        vec![(FLAG_DONE, NONE, vec![])],
        vec![data(FLAG_DONE, 10, b"abcde")],
        vec![data(FLAG_DONE, 11, b"bcdef")],
        vec![data(0, 10, b"abc"), data(FLAG_DONE, 14, b"ef")],
        vec![data(0, 10, b"abc"), data(FLAG_DONE, 12, b"cdef")],
        vec![hole(0, 10, 6), data(FLAG_DONE, 10, b"a")],
        vec![data(0, 10, b"abcdef"), hole(FLAG_DONE, 15, 1)],
        vec![data(FLAG_DONE, 9, b"abcdef")],
        vec![hole(FLAG_DONE, 10, 7)],
        vec![hole(FLAG_DONE, 10, 0)],
        vec![hole(FLAG_DONE, u64::MAX, 2)],
        vec![hole(0, 10, 6)],
        vec![data(FLAG_DONE, 10, b"")],
        vec![data(FLAG_DONE, 10, b"abcdefg")],
        vec![(0, NONE, vec![])],
        vec![(FLAG_DONE, NONE, vec![1])],
        vec![(FLAG_DONE, OFFSET_HOLE, vec![0; 11])],
        vec![(FLAG_DONE, 77, vec![0; 12])],
        vec![status(FLAG_DONE, 9, &[(6, 2)])],
    ] {
        assert!(matches!(read(10, 16, &chunks), Err(RequestError::Violation(_))), "{chunks:?}");
    }
}

#[test]
fn the_servers_own_error() {
    let error = |kind: u16, payload: &[u8]| vec![data(0, 10, b"ab"), (FLAG_DONE, kind, payload.to_vec())];
    assert_eq!(read(10, 16, &error(0x8001, b"\0\0\0\x05\0\x02no")), Err(RequestError::Server(5)));
    assert_eq!(read(10, 16, &error(0x8002, b"\0\0\0\x05\0\0\0\0\0\0\0\0\0\x0c")), Err(RequestError::Server(5)));
    assert_eq!(read(10, 16, &error(0xffff, b"\0\0\0\x16")), Err(RequestError::Server(22)));
    for (kind, payload) in [(0x8001, b"\0\0\0".as_slice()), (0x8001, b"\0\0\0\0\0\0"), (0x8001, &[1; 5000])] {
        assert!(matches!(read(10, 16, &error(kind, payload)), Err(RequestError::Violation(_))), "{payload:?}");
    }
}

#[test]
fn simple_replies() {
    let answer = || PartialReply::read(bytes(0, 4)).unwrap();
    let mut good = answer();
    good.simple(0, Dialect::Simple).unwrap().unwrap().copy_from_slice(b"good");
    assert!(matches!(good.finish(), Ok(ReplyContent::Bytes(bytes)) if bytes.bytes() == b"good"));
    let mut failed = answer();
    assert_eq!(failed.simple(5, Dialect::Structured).unwrap(), None);
    assert_eq!(failed.finish(), Err(RequestError::Server(5)));
    assert!(answer().simple(0, Dialect::Structured).is_err());
    let mut status = PartialReply::status(bytes(0, 4), only(1), Dialect::Structured, Bytes::new(4));
    assert!(status.simple(0, Dialect::Structured).is_err());
}

#[test]
fn a_hole_is_the_zero_bit_alone() {
    let done = |extents: &[(u32, u32)]| read_status(&[status(FLAG_DONE, 9, extents)]);
    assert_eq!(
        done(&[(4096, 0), (1024, 1), (1024, 2), (2048, 3), (4096, 0)]),
        Ok(vec![(9216, ExtentKind::Data), (12288, ExtentKind::Hole), (16384, ExtentKind::Data)])
    );
    assert_eq!(done(&[(512, 2)]), Ok(vec![(4608, ExtentKind::Hole)]), "shorter than requested");
    assert_eq!(
        done(&[(u32::MAX, 2)]),
        Ok(vec![(20000, ExtentKind::Hole)]),
        "longer than requested, up to the end of the export"
    );
    assert_eq!(done(&[(12288, 0xffff_fffc)]), Ok(vec![(16384, ExtentKind::Data)]), "bits of the future");
}

/// The ends and kinds of both contexts of a connection with a bitmap, whose numbers are 9 and 4.
type BothRuns = [Vec<(u64, ExtentKind)>; 2];

fn read_bitmap(chunks: &[Sent<'_>]) -> std::result::Result<BothRuns, RequestError> {
    let contexts = StatusContexts { allocation: 9, bitmap: Some(4) };
    let answer = PartialReply::status(bytes(4096, 16384), contexts, Dialect::Structured, Bytes::new(20000));
    let runs = |extents: Vec<Extent>| extents.iter().map(|run| (run.end.get(), run.kind)).collect();
    feed(answer, chunks).map(|content| match content {
        ReplyContent::Bitmap { allocation, bitmap } => [runs(allocation), runs(bitmap)],
        _ => panic!("a status with a bitmap has runs of both"),
    })
}

#[test]
fn only_an_extent_without_flags_is_unchanged() {
    let both = [status(0, 4, &[(4096, 1), (4096, 0), (512, 2)]), status(FLAG_DONE, 9, &[(12288, 3)])];
    let (data, unchanged) = (ExtentKind::Data, ExtentKind::Unchanged);
    let expected = [vec![(16384, ExtentKind::Hole)], vec![(8192, data), (12288, unchanged), (12800, data)]];
    assert_eq!(read_bitmap(&both), Ok(expected));
    for chunks in [
        vec![status(FLAG_DONE, 9, &[(4096, 0)])],
        vec![status(FLAG_DONE, 4, &[(4096, 0)])],
        vec![status(0, 4, &[(4096, 0)]), status(FLAG_DONE, 4, &[(4096, 0)])],
        vec![status(0, 4, &[(4096, 0)]), status(0, 9, &[(4096, 0)])],
        vec![status(0, 4, &[(4096, 0)]), status(0, 9, &[(4096, 0)]), status(FLAG_DONE, 5, &[(4096, 0)])],
        vec![status(0, 4, &[(0, 0)]), status(FLAG_DONE, 9, &[(4096, 0)])],
        vec![status(0, 4, &[(16384, 0), (4096, 0)]), status(FLAG_DONE, 9, &[(4096, 0)])],
    ] {
        assert!(matches!(read_bitmap(&chunks), Err(RequestError::Violation(_))), "{chunks:?}");
    }
}

#[test]
fn a_block_status_that_is_wrong_is_no_answer() {
    for chunks in [
        vec![(FLAG_DONE, NONE, vec![])],
        vec![status(FLAG_DONE, 8, &[(4096, 2)])],
        vec![status(FLAG_DONE, 9, &[])],
        vec![status(FLAG_DONE, 9, &[(0, 2)])],
        vec![status(FLAG_DONE, 9, &[(4096, 2), (0, 0)])],
        vec![status(FLAG_DONE, 9, &[(12288, 2), (4096, 2)])],
        vec![status(0, 9, &[(4096, 2)]), status(FLAG_DONE, 9, &[(4096, 2)])],
        vec![status(0, 9, &[(4096, 2)])],
        vec![(FLAG_DONE, STATUS, vec![0; 11])],
        vec![(FLAG_DONE, STATUS, [9_u32.to_be_bytes().as_slice(), &[1; 9]].concat())],
        vec![(FLAG_DONE, STATUS_EXT, vec![0; 24])],
        vec![data(FLAG_DONE, 4096, b"a")],
    ] {
        assert!(matches!(read_status(&chunks), Err(RequestError::Violation(_))), "{chunks:?}");
    }
    let failed = [status(0, 9, &[(4096, 2)]), (FLAG_DONE, 0x8001, b"\0\0\0\x05\0\0".to_vec())];
    assert_eq!(read_status(&failed), Err(RequestError::Server(5)), "an error makes the extents before it void");
}

#[test]
fn extended_headers() {
    let status_of = |count: u32, extents: &[(u64, u64)]| {
        let mut answer = PartialReply::status(bytes(0, 1 << 40), only(3), Dialect::Extended, Bytes::new(1 << 41));
        let mut payload = [3_u32.to_be_bytes(), count.to_be_bytes()].concat();
        for (len, state) in extents {
            payload.extend([len.to_be_bytes(), state.to_be_bytes()].concat());
        }
        let rest = [0_u64.to_be_bytes(), (payload.len() as u64).to_be_bytes()].concat();
        let chunk = answer.chunk(FLAG_DONE, STATUS_EXT, &rest).map_err(RequestError::violation)?;
        assert_eq!(chunk.to_parse(), payload.len());
        answer.payload(chunk, &payload).map_err(RequestError::violation)?;
        answer.finish()
    };
    let runs = |runs: &[(u64, ExtentKind)]| {
        Ok(ReplyContent::Extents(runs.iter().map(|&(end, kind)| Extent { end: Bytes::new(end), kind }).collect()))
    };
    assert_eq!(
        status_of(2, &[(1 << 39, 3), (1 << 39, 0)]),
        runs(&[(1 << 39, ExtentKind::Hole), (1 << 40, ExtentKind::Data)])
    );
    assert_eq!(status_of(1, &[(1 << 50, 2)]), runs(&[(1 << 41, ExtentKind::Hole)]));
    assert_eq!(status_of(1, &[(1 << 39, (1 << 63) | 1)]), runs(&[(1 << 39, ExtentKind::Data)]));
    assert!(status_of(3, &[(1 << 39, 3), (1 << 39, 0)]).is_err(), "count and length disagree");
    assert!(status_of(2, &[(1, 0), (u64::MAX, 0)]).is_err(), "beyond 2^64");
    assert!(status_of(1, &[(0, 0)]).is_err());
}

#[test]
fn gaps_are_bounded() {
    let mut covered = CoveredBytes::default();
    for gap in 0..MAX_PARTS {
        covered.add(gap * 2..gap * 2 + 1).unwrap();
    }
    assert!(covered.add(MAX_PARTS * 2..MAX_PARTS * 2 + 1).is_err());
    for gap in (0..MAX_PARTS).rev() {
        covered.add(gap * 2 + 1..gap * 2 + 2).unwrap();
    }
    assert!(covered.all(MAX_PARTS * 2));
}

proptest::proptest! {
    /// Any order of any cut of a read gives the bytes; the same cut without one piece gives nothing.
    #[test]
    fn every_cut_in_every_order(cuts in proptest::collection::btree_set(1..255_u64, 0..20), seed in 0..1000_usize, zero in 0..3_u64) {
        let source: Vec<u8> = (0..=255).collect();
        let edges: Vec<u64> = [0].into_iter().chain(cuts).chain([256]).collect();
        let mut pieces: Vec<(u64, u64)> = edges.windows(2).map(|edge| (edge[0], edge[1])).collect();
        pieces.rotate_left(seed % edges.len().saturating_sub(1).max(1));
        if seed % 2 == 0 {
            pieces.reverse();
        }
        let mut wanted = source.clone();
        let mut chunks: Vec<Sent<'_>> = Vec::new();
        for (start, end) in &pieces {
            let range = usize::try_from(*start).unwrap()..usize::try_from(*end).unwrap();
            if start % 3 == zero {
                wanted[range].fill(0);
                chunks.push(hole(0, *start, u32::try_from(end - start).unwrap()));
            } else {
                chunks.push(data(0, *start, &source[range]));
            }
        }
        chunks.push((FLAG_DONE, NONE, vec![]));
        proptest::prop_assert_eq!(read(0, 256, &chunks), Ok(wanted));
        chunks.remove(seed % pieces.len());
        proptest::prop_assert!(read(0, 256, &chunks).is_err());
    }

    /// Random chunks cause no panic, and bytes that were not sent are no part of a reply.
    #[test]
    fn noise_is_no_answer(kinds in proptest::collection::vec((0..2_u16, 0..8_u16, proptest::collection::vec(0..=255_u8, 0..40)), 0..6)) {
        let chunks: Vec<Sent<'_>> = kinds;
        // Feeding stops where a payload is shorter than its type demands, as a connection would break there.
        let well_formed = chunks.iter().all(|(_, kind, payload)| *kind != OFFSET_DATA || payload.len() >= 8);
        if well_formed {
            let carried: usize = chunks.iter().map(|(_, _, payload)| payload.len()).sum();
            if let Ok(bytes) = read(0, 4096, &chunks) {
                let hole = chunks.iter().any(|(_, kind, _)| *kind == OFFSET_HOLE);
                proptest::prop_assert!(hole || carried > bytes.len());
            }
            if let Ok(runs) = read_status(&chunks) {
                proptest::prop_assert!(!runs.is_empty());
                proptest::prop_assert!(runs.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 != pair[1].1));
            }
        }
    }
}

#[test]
fn a_flush_is_answered_without_data() {
    for (dialect, kind, len, answered) in [
        (Dialect::Structured, 0, 0_u32, true),
        (Dialect::Extended, 0, 0, true),
        (Dialect::Structured, 1, 20, false),
        (Dialect::Structured, 5, 12, false),
        (Dialect::Extended, 6, 24, false),
    ] {
        let rest = match dialect {
            Dialect::Extended => [[0; 8], u64::from(len).to_be_bytes()].concat(),
            _ => len.to_be_bytes().to_vec(),
        };
        let mut answer = PartialReply::without_content();
        assert_eq!(answer.chunk(1, kind, &rest).is_ok(), answered, "{dialect:?} {kind}");
    }
    let mut simple = PartialReply::without_content();
    assert_eq!(simple.simple(0, Dialect::Structured).unwrap(), None);
    assert_eq!(simple.finish(), Ok(ReplyContent::Done));
    let mut failed = PartialReply::without_content();
    assert_eq!(failed.simple(5, Dialect::Structured).unwrap(), None);
    assert_eq!(failed.finish(), Err(RequestError::Server(5)));
}
