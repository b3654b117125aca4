//! A server that violates the protocol can only make the export dense or unreadable. The client does not hang or
//! panic, and returns no zeros that the server did not send.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blkholefs::testing::map::ExtentKind;
use blkholefs::testing::source::nbd::{Client, Timeouts, Uri};

use crate::fake::{
    Action, BLOCK, CONTEXT, Dialect, FakeServer, Message, MessageHook, Step, chunk, option_reply, status_reply,
};
use crate::{equal_timeouts, read, runs_of};

const DIALECTS: [Dialect; 3] = [Dialect::Simple, Dialect::Structured, Dialect::Extended];
const WAIT: Duration = Duration::from_secs(1);
/// The upper bound of a session. Reading a map takes up to two seconds for each sixteenth of it if the server reports
/// tiny extents. A call takes up to twice its timeout and two steps of the clock. The rest is tolerance for a slow
/// machine.
const MAX_DURATION: Duration = Duration::from_secs(60);

/// The disk: data, zeros, data, zeros, and a last partial block of data.
fn disk() -> Vec<u8> {
    let mut disk = vec![0; 6 * BLOCK + 100];
    for block in [0, 3, 6] {
        let end = disk.len().min((block + 1) * BLOCK);
        for (at, byte) in disk[block * BLOCK..end].iter_mut().enumerate() {
            *byte = u8::try_from(at % 255 + 1).unwrap();
        }
    }
    disk
}

/// Timeouts with which a call fails at once when the server closes the connection.
fn no_outage_timeouts() -> Timeouts {
    Timeouts { outage: Duration::ZERO, ..equal_timeouts(WAIT) }
}

/// The result of a session.
#[derive(Debug)]
struct Outcome {
    opened: bool,
    bytes: Option<Vec<u8>>,
    runs: Vec<(u64, ExtentKind)>,
}

/// Opens the export, reads all bytes and requests the map. Panics if this takes longer than [`MAX_DURATION`].
fn session(dialect: Dialect, timeouts: Timeouts, hook: Arc<MessageHook>) -> Outcome {
    let fake = FakeServer::new(dialect, &disk(), hook);
    let start = Instant::now();
    let outcome = match Client::open_with_timeouts(&Uri::parse(&fake.uri).unwrap(), timeouts) {
        Err(_) => Outcome { opened: false, bytes: None, runs: Vec::new() },
        Ok(client) => {
            let client = Arc::new(client);
            let bytes = read(&client, 0, disk().len());
            assert!(bytes.is_ok() || bytes == Err(libc::EIO), "{bytes:?}");
            Outcome { opened: true, bytes: bytes.ok(), runs: runs_of(&client) }
        }
    };
    assert!(start.elapsed() < MAX_DURATION, "{:?}", start.elapsed());
    outcome
}

/// The runs that a correct server reports for the disk.
fn expected_runs(dialect: Dialect) -> Vec<(u64, ExtentKind)> {
    let size = disk().len() as u64;
    let runs = [(1, ExtentKind::Data), (3, ExtentKind::Hole), (4, ExtentKind::Data), (6, ExtentKind::Hole)];
    let block = BLOCK as u64;
    match dialect {
        Dialect::Simple => vec![(size, ExtentKind::Data)],
        _ => runs.into_iter().map(|(end, kind)| (end * block, kind)).chain([(size, ExtentKind::Data)]).collect(),
    }
}

/// Asserts that each hole contains only zeros and that the map ends at the end of the disk.
fn assert_no_false_hole(runs: &[(u64, ExtentKind)], about: &str) {
    let mut start = 0;
    for (end, kind) in runs {
        let (from, to) = (usize::try_from(start).unwrap(), usize::try_from(*end).unwrap());
        if *kind == ExtentKind::Hole {
            assert!(disk()[from..to].iter().all(|byte| *byte == 0), "{about}: the hole {start}..{end} contains data");
        }
        start = *end;
    }
    assert!(start == 0 || start == disk().len() as u64, "{about}: the map ends at {start}");
}

#[test]
fn a_correct_server_gives_its_bytes_and_holes() {
    for dialect in DIALECTS {
        let outcome = session(dialect, no_outage_timeouts(), Arc::new(|_: &mut Message| Action::Continue));
        assert_eq!(outcome.bytes, Some(disk()), "{dialect:?}");
        assert_eq!(outcome.runs, expected_runs(dialect), "{dialect:?}");
    }
}

/// Returns the number of bytes that a correct server sends in a session.
fn reply_stream_len(dialect: Dialect) -> usize {
    let total = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = Arc::clone(&total);
    session(
        dialect,
        no_outage_timeouts(),
        Arc::new(move |message: &mut Message| {
            counter.fetch_max(message.sent + message.bytes.len(), Ordering::Relaxed);
            Action::Continue
        }),
    );
    total.load(Ordering::Relaxed)
}

/// The byte positions to change: all in the negotiation and at the end, and a sample of those between.
fn positions(dialect: Dialect) -> impl Iterator<Item = usize> {
    let length = reply_stream_len(dialect);
    (0..length).filter(move |at| *at < 700 || *at % 509 == 0 || *at + 200 > length)
}

/// Cuts the stream at the byte `at` on the first `connections` connections.
fn cut_stream(at: usize, connections: usize, then: Action) -> Arc<MessageHook> {
    Arc::new(move |message: &mut Message| {
        let end = message.sent + message.bytes.len();
        if message.connection >= connections || end <= at {
            return Action::Continue;
        }
        message.bytes.truncate(at.saturating_sub(message.sent));
        then
    })
}

#[test]
fn a_stream_that_ends_at_any_byte_gives_no_wrong_bytes_or_holes() {
    for dialect in DIALECTS {
        for at in positions(dialect) {
            let outcome = session(dialect, no_outage_timeouts(), cut_stream(at, usize::MAX, Action::Close));
            assert!(outcome.bytes.is_none_or(|bytes| bytes == disk()), "{dialect:?} {at}: wrong bytes");
            assert_no_false_hole(&outcome.runs, &format!("{dialect:?} {at}"));
            // After one lost connection, the client repeats the requests that have no reply.
            let outcome = session(dialect, equal_timeouts(WAIT), cut_stream(at, 1, Action::Close));
            if outcome.opened {
                assert_eq!(outcome.bytes, Some(disk()), "{dialect:?} {at}");
                assert_eq!(outcome.runs, expected_runs(dialect), "{dialect:?} {at}");
            }
        }
    }
}

#[test]
fn a_stream_that_stalls_at_any_step_gives_no_wrong_bytes_or_holes() {
    let wait = Duration::from_millis(200);
    let short = equal_timeouts(wait);
    for dialect in DIALECTS {
        let length = reply_stream_len(dialect);
        std::thread::scope(|scope| {
            for at in (0..length).step_by(length / 24 + 1) {
                scope.spawn(move || {
                    let outcome = session(dialect, short, cut_stream(at, usize::MAX, Action::Stall));
                    assert!(outcome.bytes.is_none_or(|bytes| bytes == disk()), "{dialect:?} {at}: wrong bytes");
                    assert_no_false_hole(&outcome.runs, &format!("{dialect:?} {at}"));
                });
            }
        });
    }
}

#[test]
fn a_wrong_byte_of_the_server_changes_at_most_one_byte_read() {
    for dialect in DIALECTS {
        let positions: Vec<usize> = positions(dialect).collect();
        // The threads mostly wait, because the client waits for bytes that a wrong length announces.
        std::thread::scope(|scope| {
            for part in positions.chunks(positions.len() / 32 + 1) {
                scope.spawn(move || {
                    for at in part {
                        let masks = [0x01, 0x80, 0xff];
                        masks[..2 + usize::from(at % 16 == 0)].iter().for_each(|mask| flip_byte(dialect, *at, *mask));
                    }
                });
            }
        });
    }
}

/// Runs a session in which one byte from the server is wrong.
fn flip_byte(dialect: Dialect, at: usize, mask: u8) {
    let hook = move |message: &mut Message| {
        if let Some(byte) = at.checked_sub(message.sent).and_then(|at| message.bytes.get_mut(at)) {
            *byte ^= mask;
        }
        Action::Continue
    };
    let wait = Duration::from_millis(500);
    let outcome = session(dialect, Timeouts { outage: Duration::ZERO, ..equal_timeouts(wait) }, Arc::new(hook));
    // The client cannot detect a wrong byte of data. A wrong byte elsewhere must not change the data.
    if let Some(bytes) = outcome.bytes {
        let wrong = bytes.iter().zip(disk()).filter(|(got, wanted)| **got != *wanted).count();
        assert!(wrong <= 1, "{dialect:?} {at} {mask:#x}: {wrong} bytes are wrong");
    }
}

/// Runs a session in which the server sends another reply to one step.
fn session_with_answer(
    dialect: Dialect,
    step: Step,
    answer: impl Fn(&Message) -> Vec<u8> + Send + Sync + 'static,
) -> Outcome {
    session(
        dialect,
        no_outage_timeouts(),
        Arc::new(move |message: &mut Message| {
            if message.step == step {
                message.bytes = answer(message);
            }
            Action::Continue
        }),
    )
}

fn options(replies: &[Vec<u8>]) -> Vec<u8> {
    replies.concat()
}

#[test]
fn a_negotiation_that_breaks_the_rules_is_refused() {
    let export = |size: u64| [[0, 0].as_slice(), &size.to_be_bytes(), &[0, 1]].concat();
    let blocks = |min: u32, max: u32| {
        [[0, 3].as_slice(), &min.to_be_bytes(), &4096_u32.to_be_bytes(), &max.to_be_bytes()].concat()
    };
    let (info, ack) = (|data: &[u8]| option_reply(7, 3, data), option_reply(7, 1, &[]));
    let endless = vec![info(&export(100)); 1000].concat();
    let mut huge = option_reply(7, 3, &[]);
    huge[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    for (step, answer) in [
        (Step::Greeting, b"NBDMAGIC\0\0B\x02\x81\x86\x12S\0\0".to_vec()),
        (Step::Greeting, vec![0; 18]),
        (Step::Option(8), option_reply(7, 1, &[])),
        (Step::Option(8), option_reply(8, 1, b"data")),
        (Step::Option(8), option_reply(8, 3, &export(100))),
        (Step::Option(8), option_reply(8, 0x8000_0005, b"TLS\n\x1b[31m")),
        (Step::Option(7), ack.clone()),
        (Step::Option(7), options(&[info(&blocks(1, 4096)), ack.clone()])),
        (Step::Option(7), options(&[info(&export(1 << 63)), ack.clone()])),
        (Step::Option(7), options(&[info(&export(100)[..8]), ack.clone()])),
        (Step::Option(7), options(&[info(&export(100)), info(&blocks(0, 4096)), ack.clone()])),
        (Step::Option(7), options(&[info(&export(100)), info(&blocks(3000, 4096)), ack.clone()])),
        (Step::Option(7), options(&[info(&export(100)), info(&blocks(4096, 1)), ack.clone()])),
        (Step::Option(7), endless),
        (Step::Option(7), huge),
        (Step::Option(7), option_reply(7, 0x8000_0006, &[0xff; 4000])),
        (Step::Option(10), options(&[option_reply(10, 4, b"\0\0\0\x01base:allocatio")])),
        (Step::Option(10), options(&[option_reply(10, 4, b"\0"), option_reply(10, 1, &[])])),
        (
            Step::Option(10),
            options(&[
                option_reply(10, 4, b"\0\0\0\x01base:allocation"),
                option_reply(10, 4, b"\0\0\0\x02base:allocation"),
                option_reply(10, 1, &[]),
            ]),
        ),
    ] {
        let about = format!("{step:?} {answer:02x?}");
        let outcome = session_with_answer(Dialect::Structured, step, move |_| answer.clone());
        assert!(!outcome.opened, "{about}");
    }
    // A server may refuse the metadata context.
    for answer in [option_reply(10, 1, &[]), option_reply(10, 0x8000_0001, &[])] {
        let outcome = session_with_answer(Dialect::Extended, Step::Option(10), move |_| answer.clone());
        assert_eq!(outcome.bytes, Some(disk()));
        assert_eq!(outcome.runs, [(disk().len() as u64, ExtentKind::Data)]);
    }
}

#[test]
fn replies_that_break_the_rules_are_eio() {
    let data = |at: u64, bytes: &[u8]| [at.to_be_bytes().as_slice(), bytes].concat();
    let hole = |at: u64, len: u32| [at.to_be_bytes().as_slice(), &len.to_be_bytes()].concat();
    let size = disk().len();
    let all = data(0, &disk());
    let whole = u32::try_from(size).unwrap();
    for dialect in [Dialect::Structured, Dialect::Extended] {
        let done = |kind: u16, payload: Vec<u8>| vec![(1, kind, payload)];
        for chunks in [
            done(0, vec![]),
            done(1, vec![]),
            done(1, all[..8].to_vec()),
            done(1, all[..size].to_vec()),
            done(1, [all.clone(), vec![1]].concat()),
            done(1, data(1, &disk())),
            done(1, data(u64::MAX, &disk())),
            done(2, hole(0, whole - 1)),
            done(2, hole(0, whole + 1)),
            done(2, hole(0, 0)),
            done(2, hole(4096, whole)),
            done(2, vec![0; 11]),
            done(2, vec![0; 13]),
            done(3, all.clone()),
            done(5, vec![0; 12]),
            done(6, vec![0; 24]),
            done(0x7fff, vec![0; 12]),
            done(0x8001, vec![]),
            done(0x8001, vec![0; 6]),
            done(0x8001, vec![1; 6]),
            done(0x8002, vec![1; 14]),
            done(0xffff, vec![9; 4000]),
            done(0xffff, vec![9; 100_000]),
            vec![(0, 2, hole(0, whole)), (1, 1, all.clone())],
            vec![(0, 1, all.clone()), (1, 2, hole(5, 1))],
            vec![(0, 1, data(0, &disk()[..100])), (1, 2, hole(101, whole - 101))],
            vec![(0, 1, all.clone()), (1, 0x8001, vec![0, 0, 0, 5, 0, 0])],
            vec![(0, 0, vec![]), (1, 1, all.clone())],
            vec![(0, 2, hole(0, 1)); 3],
            vec![(0, 0x8001, vec![0, 0, 0, 5, 0, 0]); 10_000],
        ] {
            let outcome = session_with_answer(dialect, Step::Read, move |message| {
                let cookie = message.request.cookie;
                let chunks = chunks.iter();
                chunks.flat_map(|(flags, kind, payload)| chunk(dialect, *flags, *kind, cookie, payload)).collect()
            });
            assert!(outcome.opened);
            assert_eq!(outcome.bytes, None, "{dialect:?}");
            assert_eq!(outcome.runs, expected_runs(dialect));
        }
        // Replies with the cookie of no pending request, or in another dialect.
        for wrong in [u64::MAX, 1] {
            let outcome = session_with_answer(dialect, Step::Read, move |message| {
                chunk(dialect, 1, 0, message.request.cookie ^ wrong, &[])
            });
            assert_eq!(outcome.bytes, None);
        }
        let outcome = session_with_answer(dialect, Step::Read, |message| {
            [[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0].as_slice(), &message.request.cookie.to_be_bytes(), &disk()].concat()
        });
        assert_eq!(outcome.bytes, None);
    }
    let outcome = session_with_answer(Dialect::Simple, Step::Read, |message| {
        chunk(Dialect::Structured, 1, 2, message.request.cookie, &[0; 12])
    });
    assert_eq!(outcome.bytes, None);
}

#[test]
fn block_status_that_breaks_the_rules_is_data() {
    let size = disk().len() as u64;
    for dialect in [Dialect::Structured, Dialect::Extended] {
        let reply = move |context: u32, extents: Vec<(u64, bool)>| {
            move |message: &Message| status_reply(dialect, message.request, context, &extents)
        };
        for (context, extents) in [
            (CONTEXT + 1, vec![(size, true)]),
            (CONTEXT, vec![]),
            (CONTEXT, vec![(0, true)]),
            (CONTEXT, vec![(size, true), (1, true)]),
            (CONTEXT, vec![(4096, true), (0, false), (size - 4096, true)]),
        ] {
            let outcome = session_with_answer(dialect, Step::Status, reply(context, extents.clone()));
            assert_eq!(outcome.runs, [(size, ExtentKind::Data)], "{dialect:?} {extents:?}");
            assert_eq!(outcome.bytes, Some(disk()));
        }
        for answer in [
            |_: &Message| vec![],
            |message: &Message| chunk(Dialect::Structured, 1, 5, message.request.cookie, &[0; 11]),
            |message: &Message| chunk(Dialect::Extended, 1, 6, message.request.cookie, &[0; 23]),
            |message: &Message| chunk(Dialect::Extended, 1, 5, message.request.cookie, &[0; 12]),
            |message: &Message| chunk(Dialect::Structured, 1, 0, message.request.cookie, &[]),
            |message: &Message| [[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], message.request.cookie.to_be_bytes()].concat(),
            |message: &Message| chunk(Dialect::Structured, 1, 0x8001, message.request.cookie, &[0, 0, 0, 95, 0, 0]),
        ] {
            let outcome = session_with_answer(dialect, Step::Status, answer);
            assert_eq!(outcome.runs, [(size, ExtentKind::Data)], "{dialect:?}");
        }
        // The extents may cover less than the requested range, and the last one may exceed it.
        let outcome = session_with_answer(dialect, Step::Status, move |message| {
            let first = crate::fake::extents(&disk(), message.request)[0];
            status_reply(dialect, message.request, CONTEXT, &[(first.0.min(1000), first.1)])
        });
        assert_eq!(outcome.runs, expected_runs(dialect));
        let outcome = session_with_answer(dialect, Step::Status, reply(CONTEXT, vec![(1 << 31, true)]));
        assert_eq!(outcome.runs, [(size, ExtentKind::Hole)], "a hole that the server reports is used");
    }
}

#[test]
fn block_status_is_not_asked_for_again_after_a_broken_rule() {
    let fake = FakeServer::new(
        Dialect::Structured,
        &disk(),
        Arc::new(|message: &mut Message| {
            if message.step == Step::Status {
                message.bytes = status_reply(Dialect::Structured, message.request, 1, &[(4096, true)]);
            }
            Action::Continue
        }),
    );
    let client = Arc::new(Client::open_with_timeouts(&Uri::parse(&fake.uri).unwrap(), equal_timeouts(WAIT)).unwrap());
    for _ in 0..50 {
        assert_eq!(runs_of(&client), [(disk().len() as u64, ExtentKind::Data)]);
        assert_eq!(read(&client, 0, disk().len()), Ok(disk()));
    }
    assert!(client.no_status().unwrap().contains("metadata context"));
    assert_eq!(fake.connections.load(Ordering::Relaxed), 2, "one that failed, and one for all reads");
}

#[test]
fn a_map_in_extents_of_one_byte_takes_bounded_time() {
    // The server announces 2^62 bytes and reports extents of one byte of zeros.
    let hook = |message: &mut Message| {
        match message.step {
            Step::Option(7) => {
                let export = [[0, 0].as_slice(), &(1_u64 << 62).to_be_bytes(), &[0, 1]].concat();
                message.bytes = [option_reply(7, 3, &export), option_reply(7, 1, &[])].concat();
            }
            Step::Status => {
                message.bytes = status_reply(Dialect::Structured, message.request, CONTEXT, &[(1, true)]);
            }
            _ => {}
        }
        Action::Continue
    };
    let fake = FakeServer::new(Dialect::Structured, &disk(), Arc::new(hook));
    let client = Arc::new(Client::open_with_timeouts(&Uri::parse(&fake.uri).unwrap(), equal_timeouts(WAIT)).unwrap());
    let map =
        blkholefs::testing::source::nbd::layer(Arc::clone(&client), &blkholefs::testing::source::Context::default())
            .map;
    let start = Instant::now();
    let align = blkholefs::testing::units::Bytes::new(4096);
    let zero = blkholefs::testing::units::Bytes::ZERO;
    let data = blkholefs::testing::map::view::seek(&*map, align, zero, blkholefs::testing::map::view::Whence::Data);
    assert!(data.is_some());
    assert!(start.elapsed() < MAX_DURATION, "{:?}", start.elapsed());
}
