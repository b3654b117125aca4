//! Slow servers: each request takes bounded time, and a request that does not need the server does not wait for it.

use std::io::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blkholefs::testing::deadline;
use blkholefs::testing::map::ExtentKind;
use blkholefs::testing::source::Context;
use blkholefs::testing::source::nbd::{NbdExport, Timeouts, Uri, layer};
use blkholefs::testing::units::Bytes;

use crate::common::nbd::directory;
use crate::common::wait_until;
use crate::fake::{Action, BLOCK, Dialect, FakeServer, Message, Step, chunk, set_export};
use crate::{client, equal_timeouts, read, runs_of};

const SECOND: Duration = Duration::from_secs(1);
/// The additional time that a loaded machine may need.
const TOLERANCE: Duration = Duration::from_millis(1500);

fn disk() -> Vec<u8> {
    vec![0; 4 * BLOCK]
}

/// Starts a server that sends the replies to `step` at one byte per second while `slow` is set. If `step` is the
/// greeting, the server closes the first connection at the first read, so that the client connects again.
fn slow_server(step: Step, slow: &Arc<AtomicBool>) -> FakeServer {
    let slow = Arc::clone(slow);
    let hook = move |message: &mut Message| match message.step {
        current if current == step && slow.load(Ordering::Relaxed) => Action::SendSlowly(SECOND),
        Step::Read if step == Step::Greeting && message.connection == 0 => {
            message.bytes.clear();
            Action::Close
        }
        _ => Action::Continue,
    };
    FakeServer::new(Dialect::Structured, &disk(), Arc::new(hook))
}

/// All waits of a call share one deadline.
#[test]
fn a_call_ends_at_its_deadline_when_the_server_sends_slowly() {
    let wait = 3 * SECOND;
    for step in [Step::Read, Step::Status, Step::Greeting] {
        let slow = Arc::new(AtomicBool::new(false));
        let fake = slow_server(step, &slow);
        let client = client(&fake.uri, equal_timeouts(wait));
        slow.store(true, Ordering::Relaxed);
        let begin = Instant::now();
        if step == Step::Status {
            assert_eq!(runs_of(&client), [(disk().len() as u64, ExtentKind::Data)], "{step:?}");
        } else {
            assert_eq!(read(&client, 0, disk().len()).map(drop), Err(libc::EIO), "{step:?}");
        }
        let took = begin.elapsed();
        assert!(took < wait + TOLERANCE, "{step:?}: {took:?}");
    }
}

/// A request of the kernel may need several calls. They share the deadline of the request.
#[test]
fn the_calls_of_a_request_share_its_deadline() {
    let slow = Arc::new(AtomicBool::new(true));
    let fake = slow_server(Step::Read, &slow);
    let client = client(&fake.uri, equal_timeouts(20 * SECOND));
    let begin = Instant::now();
    deadline::within(SECOND, || {
        for _ in 0..3 {
            assert_eq!(read(&client, 0, BLOCK).map(drop), Err(libc::EIO));
        }
    });
    assert!(begin.elapsed() < SECOND + TOLERANCE, "{:?}", begin.elapsed());
}

/// An open, a getattr and an lseek each request block status. Only the first one waits until the timeout.
#[test]
fn a_block_status_that_was_too_slow_is_not_asked_for_again_at_once() {
    let slow = Arc::new(AtomicBool::new(true));
    let fake = slow_server(Step::Status, &slow);
    let client = client(&fake.uri, equal_timeouts(2 * SECOND));
    let all_data = [(disk().len() as u64, ExtentKind::Data)];
    assert_eq!(runs_of(&client), all_data);
    let begin = Instant::now();
    assert_eq!(runs_of(&client), all_data);
    assert!(begin.elapsed() < SECOND, "{:?}", begin.elapsed());
    slow.store(false, Ordering::Relaxed);
    assert!(
        wait_until(|| runs_of(&client) == [(disk().len() as u64, ExtentKind::Hole)]),
        "block status is requested again later"
    );
}

#[test]
fn waiting_for_the_connect_of_another_thread_ends_at_the_deadline() {
    let directory = directory();
    let socket = directory.path().join("s");
    let _silent = UnixListener::bind(&socket).unwrap();
    let uri = Uri::parse(&format!("nbd+unix:///?socket={}", socket.display())).unwrap();
    let export = NbdExport::new(uri);
    let connecting = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            connecting.store(true, Ordering::Relaxed);
            deadline::within(5 * SECOND, || assert!(export.client().is_err()));
        });
        assert!(wait_until(|| connecting.load(Ordering::Relaxed)));
        let begin = Instant::now();
        deadline::within(SECOND, || assert!(export.client().is_err()));
        assert!(begin.elapsed() < SECOND + TOLERANCE, "{:?}", begin.elapsed());
    });
}

/// A server may refuse a connection because it has too many clients at that moment.
#[test]
fn a_connection_that_failed_once_is_tried_again_later() {
    let hook = |message: &mut Message| {
        set_export(message, (4 * BLOCK) as u64, 0x107);
        match message.step {
            Step::Greeting if message.connection == 1 => return Action::Close,
            // The pause keeps the connection busy, so that the other threads need another one.
            Step::Read => std::thread::sleep(Duration::from_millis(20)),
            _ => {}
        }
        Action::Continue
    };
    let fake = FakeServer::new(Dialect::Structured, &disk(), Arc::new(hook));
    let timeouts = Timeouts { outage: SECOND / 2, ..equal_timeouts(10 * SECOND) };
    let client = client(&fake.uri, timeouts);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(read(&client, 0, BLOCK), Ok(vec![0; BLOCK]));
                }
            });
        }
        let more = wait_until(|| fake.connections.load(Ordering::Relaxed) > 2);
        stop.store(true, Ordering::Relaxed);
        assert!(more, "no connection is added after one failure");
    });
}

/// A failed request gives no information about the length of runs, so the window keeps its size.
#[test]
fn the_window_does_not_grow_when_block_status_fails() {
    let requested = Arc::new(Mutex::new(Vec::new()));
    let recorded = Arc::clone(&requested);
    let hook = move |message: &mut Message| {
        set_export(message, 1 << 40, 3);
        if message.step == Step::Outside {
            recorded.lock().unwrap().push(message.request.len);
            message.bytes = chunk(Dialect::Structured, 1, 0x8001, message.request.cookie, &[0, 0, 0, 5, 0, 0]);
        }
        Action::Continue
    };
    let fake = FakeServer::new(Dialect::Structured, &disk(), Arc::new(hook));
    let client = client(&fake.uri, equal_timeouts(5 * SECOND));
    let map = layer(client, &Context::default()).map;
    let mut at = Bytes::ZERO;
    for _ in 0..4 {
        at = map.extent_at(at).end;
    }
    let lengths = requested.lock().unwrap();
    assert!(lengths.len() >= 4 && lengths.iter().all(|len| *len == lengths[0]), "{lengths:?}");
}

/// A map can be dropped while a lock is held that other threads need.
#[test]
fn dropping_a_client_does_not_wait_for_the_server() {
    let ahead = |message: &mut Message| match message.step {
        Step::Option(7) => Action::AnswerAhead,
        _ => Action::Continue,
    };
    let fake = FakeServer::new(Dialect::Structured, &disk(), Arc::new(ahead));
    let client = client(&fake.uri, equal_timeouts(20 * SECOND));
    // The server reads nothing. Each request fills the socket buffer, until the disconnect request does not fit.
    for _ in 0..requests_that_fit() {
        assert_eq!(read(&client, 0, BLOCK), Ok(vec![0; BLOCK]));
    }
    let begin = Instant::now();
    drop(client);
    assert!(begin.elapsed() < SECOND / 2, "{:?}", begin.elapsed());
}

/// Returns the number of requests that fit into the buffer of a Unix socket whose peer does not read.
fn requests_that_fit() -> usize {
    let (mut near, _far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let mut count = 0;
    while near.write(&[0; 28]).is_ok_and(|written| written == 28) {
        count += 1;
    }
    count
}
