//! Whether a connection sees the writes of other connections, and what the flags of an export guarantee about that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blkholefs::testing::map::ExtentKind;
use blkholefs::testing::source::nbd::{self, FlushBeforeStatus};

use crate::fake::{Action, BLOCK, Dialect, FakeServer, Message, Step, refusal, set_export};
use crate::{client, equal_timeouts, read, runs};

const SIZE: u64 = 4 * BLOCK as u64;
const HAS_FLAGS: u16 = 1;
const READ_ONLY: u16 = 2;
const FLUSH: u16 = 4;
const MULTI_CONN: u16 = 256;

fn disk() -> Vec<u8> {
    vec![0; 4 * BLOCK]
}

/// `NBD_FLAG_CAN_MULTI_CONN` makes the writes of another connection visible only after a flush, so block status is
/// valid only after a flush.
#[test]
fn writes_over_another_connection_are_flushed_before_holes_are_asked_for() {
    for dialect in [Dialect::Structured, Dialect::Extended] {
        let (flushed, fails) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (seen, failing) = (Arc::clone(&flushed), Arc::clone(&fails));
        let hook = move |message: &mut Message| {
            set_export(message, SIZE, HAS_FLAGS | FLUSH | MULTI_CONN);
            match message.step {
                Step::Flush if failing.load(Ordering::Relaxed) => {
                    message.bytes = refusal(dialect, message.request.cookie);
                }
                Step::Flush => seen.store(true, Ordering::Relaxed),
                Step::Status => {
                    assert!(seen.swap(false, Ordering::Relaxed), "block status is requested before a flush");
                }
                _ => {}
            }
            Action::Continue
        };
        let fake = FakeServer::new(dialect, &disk(), Arc::new(hook));
        let client = client(&fake.uri, equal_timeouts(Duration::from_secs(5)));
        assert!(client.is_visible_elsewhere());
        let map = nbd::map(client, FlushBeforeStatus::Yes);
        for _ in 0..3 {
            assert_eq!(runs(&map), [(SIZE, ExtentKind::Hole)]);
        }
        fails.store(true, Ordering::Relaxed);
        assert_eq!(runs(&map), [(SIZE, ExtentKind::Data)], "the map is all data if a flush fails");
    }
}

#[test]
fn the_flags_of_an_export_decide_whether_other_connections_see_its_writes() {
    for (flags, visible) in [
        (HAS_FLAGS, false),
        (HAS_FLAGS | READ_ONLY, false),
        (HAS_FLAGS | FLUSH, false),
        (HAS_FLAGS | MULTI_CONN, false),
        (HAS_FLAGS | MULTI_CONN | FLUSH, true),
        (HAS_FLAGS | MULTI_CONN | READ_ONLY, true),
    ] {
        let hook = move |message: &mut Message| {
            set_export(message, SIZE, flags);
            Action::Continue
        };
        let fake = FakeServer::new(Dialect::Structured, &disk(), Arc::new(hook));
        let client = client(&fake.uri, equal_timeouts(Duration::from_secs(5)));
        assert_eq!(client.is_visible_elsewhere(), visible, "{flags:#x}");
    }
}

/// Reads and block status of a writable export use the same connection.
#[test]
fn an_export_that_can_be_written_has_one_connection() {
    for (flags, several) in [(HAS_FLAGS | MULTI_CONN | FLUSH, false), (HAS_FLAGS | MULTI_CONN | READ_ONLY, true)] {
        let hook = move |message: &mut Message| {
            set_export(message, SIZE, flags);
            if message.step == Step::Read {
                std::thread::sleep(Duration::from_millis(10));
            }
            Action::Continue
        };
        let fake = FakeServer::new(Dialect::Structured, &disk(), Arc::new(hook));
        let client = client(&fake.uri, equal_timeouts(Duration::from_secs(20)));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20).for_each(|_| assert_eq!(read(&client, 0, BLOCK), Ok(vec![0; BLOCK]))));
            }
        });
        assert_eq!(fake.connections.load(Ordering::Relaxed) > 1, several, "{flags:#x}");
    }
}

/// Conclusions from the flags of the first connection apply to a later connection only if its flags are equal.
#[test]
fn a_server_that_comes_back_with_other_flags_is_refused() {
    let hook = |message: &mut Message| {
        let flags = if message.connection == 0 { HAS_FLAGS | MULTI_CONN | READ_ONLY } else { HAS_FLAGS };
        set_export(message, SIZE, flags);
        match message.step {
            Step::Read if message.connection == 0 => {
                message.bytes.clear();
                Action::Close
            }
            _ => Action::Continue,
        }
    };
    let fake = FakeServer::new(Dialect::Structured, &disk(), Arc::new(hook));
    let client = client(&fake.uri, equal_timeouts(Duration::from_millis(500)));
    assert_eq!(read(&client, 0, 2 * BLOCK).map(drop), Err(libc::EIO));
}
