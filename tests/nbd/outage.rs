//! Servers that end, and may or may not be started again.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blkholefs::testing::map::ExtentKind;
use blkholefs::testing::source::nbd::{NbdExport, Timeouts, Uri};

use crate::common::nbd::{Server, directory, image};
use crate::common::{MIB, needs, wait_until};
use crate::{client, default_client, equal_timeouts, read, runs_of};

/// The additional time for the steps of the client's clock and for a slow machine.
const TOLERANCE: Duration = Duration::from_secs(5);

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

#[test]
fn reads_continue_when_the_server_comes_back() {
    needs!(programs["nbdkit"]);
    let directory = directory();
    let (disk, socket) = (directory.path().join("disk"), directory.path().join("s"));
    image(&disk, 8 * MIB, &[0..2048]);
    let wanted = fs::read(&disk).unwrap();
    // The delay makes sure that requests are pending when the server is killed.
    let mut server = Server::nbdkit(&socket, &["--filter=delay", "file", disk.to_str().unwrap(), "delay-read=2ms"]);
    let client = default_client(&uri(&socket));
    let reads = AtomicUsize::new(0);
    let (reads, client, wanted) = (&reads, &client, &wanted);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for turn in 0..200 {
                    let at = (thread * 1_000_003 + turn * 50_021) % (wanted.len() - 9000);
                    let got = read(client, at as u64, 9000).unwrap();
                    assert!(got == wanted[at..at + 9000]);
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for kills in 1..4 {
            assert!(wait_until(|| reads.load(Ordering::Relaxed) > kills * 150));
            server.kill();
            server.restart();
        }
    });
    assert_eq!(reads.load(Ordering::Relaxed), 800);
    // A connection that is lost while it is idle does not cause an error.
    server.kill();
    server.restart();
    assert_eq!(runs_of(client), [(8 * MIB, ExtentKind::Data)]);
}

#[test]
fn a_server_that_stays_away_is_eio_and_data_after_the_outage_limit() {
    needs!(programs["nbdkit"]);
    let directory = directory();
    let socket = directory.path().join("s");
    let mut server = Server::nbdkit(&socket, &["memory", "1M"]);
    let client = client(&uri(&socket), equal_timeouts(Duration::from_secs(1)));
    assert_eq!(runs_of(&client), [(MIB, ExtentKind::Hole)]);
    server.kill();
    let start = Instant::now();
    assert_eq!(read(&client, 0, 4096), Err(libc::EIO));
    let took = start.elapsed();
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(2) + TOLERANCE, "{took:?}");
    // After that, requests fail without a long wait, and the map is all data.
    let start = Instant::now();
    assert_eq!(runs_of(&client), [(MIB, ExtentKind::Data)]);
    assert_eq!(read(&client, 0, 4096), Err(libc::EIO));
    assert!(start.elapsed() < TOLERANCE);
    server.restart();
    assert!(wait_until(|| read(&client, 0, 4096).is_ok()));
    assert!(wait_until(|| runs_of(&client) == [(MIB, ExtentKind::Hole)]));
}

#[test]
fn a_server_that_comes_back_with_another_size_is_refused() {
    needs!(programs["nbdkit"]);
    let directory = directory();
    let socket = directory.path().join("s");
    let mut server = Server::nbdkit(&socket, &["memory", "1M"]);
    let client = client(&uri(&socket), equal_timeouts(Duration::from_millis(500)));
    server.kill();
    server.restart_with("1M", "2M");
    assert_eq!(read(&client, 0, 4096), Err(libc::EIO));
    assert_eq!(runs_of(&client), [(MIB, ExtentKind::Data)]);
    server.kill();
    server.restart_with("2M", "1M");
    assert!(wait_until(|| read(&client, 0, 4096).is_ok()));
}

#[test]
fn a_server_that_hangs_is_eio_and_data_after_the_request_limit() {
    needs!(programs["nbdkit"]);
    let directory = directory();
    let socket = directory.path().join("s");
    let words = ["--filter=delay", "memory", "1M", "delay-read=60", "delay-extents=60"];
    let _server = Server::nbdkit(&socket, &words);
    let client = client(&uri(&socket), equal_timeouts(Duration::from_secs(1)));
    let start = Instant::now();
    std::thread::scope(|scope| {
        let reader = Arc::clone(&client);
        scope.spawn(move || assert_eq!(read(&reader, 0, 4096), Err(libc::EIO)));
        assert_eq!(runs_of(&client), [(MIB, ExtentKind::Data)]);
    });
    assert!(start.elapsed() < Duration::from_secs(2) + TOLERANCE, "{:?}", start.elapsed());
}

#[test]
fn concurrent_callers_share_one_failed_connect() {
    let directory = directory();
    let socket = directory.path().join("s");
    // Accepts connections and sends nothing, so each attempt lasts until the connect timeout.
    let _silent = UnixListener::bind(&socket).unwrap();
    let export = NbdExport::new(Uri::parse(&uri(&socket)).unwrap());
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert!(export.client().is_err()));
        }
    });
    let once = Timeouts::default().connect;
    assert!(start.elapsed() >= once && start.elapsed() < 2 * once + TOLERANCE, "{:?}", start.elapsed());
}
