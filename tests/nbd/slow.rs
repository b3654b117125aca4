//! Servers that are slow: a request waits for a bounded time, and requests that do not need the server do not wait.

use std::io::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blkholefs::testing::deadline;
use blkholefs::testing::map::ExtentKind;
use blkholefs::testing::source::nbd::{NbdExport, Timeouts, Uri, layer};
use blkholefs::testing::units::Bytes;

use crate::common::nbd::directory;
use crate::common::wait_until;
use crate::fake::{BLOCK, Dialect, Fake, Message, Step, Then, chunk, set_export};
use crate::{client, patience, read, runs_of};

const SECOND: Duration = Duration::from_secs(1);
/// For a machine with other work.
const SLACK: Duration = Duration::from_millis(1500);

fn disk() -> Vec<u8> {
    vec![0; 4 * BLOCK]
}

/// A server that sends the answers of `step` at one byte a second, from the moment on that `slow` is set. For greetings to
/// be needed, it closes its first connection at the first read.
fn dribbling(step: Step, slow: &Arc<AtomicBool>) -> Fake {
    let slow = Arc::clone(slow);
    let spoil = move |message: &mut Message| match message.step {
        now if now == step && slow.load(Ordering::Relaxed) => Then::Dribble(SECOND),
        Step::Read if step == Step::Greeting && message.connection == 0 => {
            message.bytes.clear();
            Then::Close
        }
        _ => Then::Go,
    };
    Fake::new(Dialect::Structured, &disk(), Arc::new(spoil))
}

/// All waits of a call share one deadline, whatever happens in it.
#[test]
fn a_call_ends_at_its_deadline_when_the_server_sends_slowly() {
    let wait = 3 * SECOND;
    for step in [Step::Read, Step::Status, Step::Greeting] {
        let slow = Arc::new(AtomicBool::new(false));
        let fake = dribbling(step, &slow);
        let client = client(&fake.uri, patience(wait));
        slow.store(true, Ordering::Relaxed);
        let begin = Instant::now();
        if step == Step::Status {
            assert_eq!(runs_of(&client), [(disk().len() as u64, ExtentKind::Data)], "{step:?}");
        } else {
            assert_eq!(read(&client, 0, disk().len()).map(drop), Err(libc::EIO), "{step:?}");
        }
        let took = begin.elapsed();
        assert!(took < wait + SLACK, "{step:?}: {took:?}");
    }
}

/// A request of the kernel may need several calls. They share its deadline.
#[test]
fn the_calls_of_a_request_share_its_deadline() {
    let slow = Arc::new(AtomicBool::new(true));
    let fake = dribbling(Step::Read, &slow);
    let client = client(&fake.uri, patience(20 * SECOND));
    let begin = Instant::now();
    deadline::within(SECOND, || {
        for _ in 0..3 {
            assert_eq!(read(&client, 0, BLOCK).map(drop), Err(libc::EIO));
        }
    });
    assert!(begin.elapsed() < SECOND + SLACK, "{:?}", begin.elapsed());
}

/// An open, a look at the attributes and an lseek ask one after the other. Only the first of them waits for nothing.
#[test]
fn a_block_status_that_was_too_slow_is_not_asked_for_again_at_once() {
    let slow = Arc::new(AtomicBool::new(true));
    let fake = dribbling(Step::Status, &slow);
    let client = client(&fake.uri, patience(2 * SECOND));
    let all_data = [(disk().len() as u64, ExtentKind::Data)];
    assert_eq!(runs_of(&client), all_data);
    let begin = Instant::now();
    assert_eq!(runs_of(&client), all_data);
    assert!(begin.elapsed() < SECOND, "{:?}", begin.elapsed());
    slow.store(false, Ordering::Relaxed);
    assert!(wait_until(|| runs_of(&client) == [(disk().len() as u64, ExtentKind::Hole)]), "but after a while it is");
}

#[test]
fn waiting_for_the_connect_of_another_thread_ends_at_the_deadline() {
    let directory = directory();
    let socket = directory.path().join("s");
    let _silent = UnixListener::bind(&socket).unwrap();
    let uri = Uri::parse(&format!("nbd+unix:///?socket={}", socket.display())).unwrap();
    let export = NbdExport::new(uri);
    let connects = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            connects.store(true, Ordering::Relaxed);
            deadline::within(5 * SECOND, || assert!(export.client().is_err()));
        });
        assert!(wait_until(|| connects.load(Ordering::Relaxed)));
        let begin = Instant::now();
        deadline::within(SECOND, || assert!(export.client().is_err()));
        assert!(begin.elapsed() < SECOND + SLACK, "{:?}", begin.elapsed());
    });
}

/// A server may be at the limit of its clients for a moment.
#[test]
fn a_connection_that_failed_once_is_tried_again_later() {
    let spoil = |message: &mut Message| {
        set_export(message, (4 * BLOCK) as u64, 0x107);
        match message.step {
            Step::Greeting if message.connection == 1 => return Then::Close,
            // Others find the connection busy.
            Step::Read => std::thread::sleep(Duration::from_millis(20)),
            _ => {}
        }
        Then::Go
    };
    let fake = Fake::new(Dialect::Structured, &disk(), Arc::new(spoil));
    let patience = Timeouts { connect: 10 * SECOND, request: 10 * SECOND, outage: SECOND / 2 };
    let client = client(&fake.uri, patience);
    let enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !enough.load(Ordering::Relaxed) {
                    assert_eq!(read(&client, 0, BLOCK), Ok(vec![0; BLOCK]));
                }
            });
        }
        let more = wait_until(|| fake.connections.load(Ordering::Relaxed) > 2);
        enough.store(true, Ordering::Relaxed);
        assert!(more, "one failure, and no connection was added ever after");
    });
}

/// A failure says nothing of the length of runs.
#[test]
fn the_window_does_not_grow_when_block_status_fails() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    let spoil = move |message: &mut Message| {
        set_export(message, 1 << 40, 3);
        if message.step == Step::Outside {
            seen.lock().unwrap().push(message.request.len);
            message.bytes = chunk(Dialect::Structured, 1, 0x8001, message.request.cookie, &[0, 0, 0, 5, 0, 0]);
        }
        Then::Go
    };
    let fake = Fake::new(Dialect::Structured, &disk(), Arc::new(spoil));
    let client = client(&fake.uri, patience(5 * SECOND));
    let map = layer(client).map;
    let mut at = Bytes::ZERO;
    for _ in 0..4 {
        at = map.extent_at(at).end;
    }
    let asked = asked.lock().unwrap();
    assert!(asked.len() >= 4 && asked.iter().all(|len| *len == asked[0]), "{asked:?}");
}

/// A map is dropped where others wait for a lock.
#[test]
fn dropping_a_client_does_not_wait_for_the_server() {
    let ahead = |message: &mut Message| match message.step {
        Step::Option(7) => Then::AnswerAhead,
        _ => Then::Go,
    };
    let fake = Fake::new(Dialect::Structured, &disk(), Arc::new(ahead));
    let client = client(&fake.uri, patience(20 * SECOND));
    // The server reads nothing. Each request takes room, until there is none for the last words.
    for _ in 0..requests_that_fit() {
        assert_eq!(read(&client, 0, BLOCK), Ok(vec![0; BLOCK]));
    }
    let begin = Instant::now();
    drop(client);
    assert!(begin.elapsed() < SECOND / 2, "{:?}", begin.elapsed());
}

/// How many requests a Unix socket takes that nobody reads.
fn requests_that_fit() -> usize {
    let (mut near, _far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let mut count = 0;
    while near.write(&[0; 28]).is_ok_and(|written| written == 28) {
        count += 1;
    }
    count
}
