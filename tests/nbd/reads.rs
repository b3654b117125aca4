//! Reads from nbdkit and qemu-nbd.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkholefs::testing::sys::buffer::AlignedBuffer;
use blkholefs::testing::units::Bytes;

use crate::common::nbd::{Server, directory, image};
use crate::common::{KIB, MIB, needs};
use crate::fake::{Action, Dialect, FakeServer, Message};
use crate::{default_client, read};

const SIZE: u64 = 8 * MIB + 4 * KIB;
const LEN: usize = 8 * 1024 * 1024 + 4096;

/// Reads unaligned ranges in several threads and compares them with the image.
fn check(uri: &str, wanted: &[u8]) {
    let client = default_client(uri);
    let end = wanted.len();
    assert_eq!(client.size().get(), end as u64);
    assert_eq!(read(&client, end as u64, 10), Ok(vec![]));
    assert_eq!(read(&client, u64::MAX, 10), Ok(vec![]));
    assert_eq!(read(&client, 0, 0), Ok(vec![]));
    assert_eq!(read(&client, end as u64 - 3, 10), Ok(wanted[end - 3..].to_vec()));
    assert_eq!(read(&client, 0, end).as_deref(), Ok(wanted));
    std::thread::scope(|scope| {
        for thread in 0..8_usize {
            let client = Arc::clone(&client);
            scope.spawn(move || {
                for turn in 0..40_usize {
                    let (start, len) = ((thread * 99_991 + turn * 70_001) % end, turn * 7919 % 300_000);
                    let stop = end.min(start + len);
                    let got = read(&client, start as u64, len).unwrap();
                    assert!(got == wanted[start..stop], "{uri}: {start}..{stop}");
                }
            });
        }
    });
}

#[test]
fn reads_from_nbdkit_equal_the_image() {
    needs!(programs["nbdkit"]);
    let directory = directory();
    let disk = directory.path().join("disk");
    image(&disk, SIZE, &[0..100, 300..301, 900..2049]);
    let wanted = fs::read(&disk).unwrap();
    assert_eq!(wanted.len(), LEN);
    let disk = disk.to_str().unwrap();
    for (name, words) in [
        ("structured", vec!["file", disk]),
        ("simple", vec!["--no-sr", "file", disk]),
        ("one-connection", vec!["--filter=multi-conn", "file", disk, "multi-conn-mode=disable"]),
        (
            "large-blocks",
            vec![
                "--filter=blocksize-policy",
                "file",
                disk,
                "blocksize-minimum=4096",
                "blocksize-maximum=64K",
                "blocksize-error-policy=error",
            ],
        ),
        ("old-style", vec!["--mask-handshake=0", "file", disk]),
        ("no-flags", vec!["--mask-handshake=1", "file", disk]),
    ] {
        let socket = directory.path().join(name);
        let _server = Server::nbdkit(&socket, &words);
        check(&format!("nbd+unix:///?socket={}", socket.display()), &wanted);
    }
    let (_server, port) = Server::nbdkit_tcp(&["file", disk]);
    check(&format!("nbd://127.0.0.1:{port}"), &wanted);
}

#[test]
fn reads_from_qemu_nbd_equal_the_image() {
    needs!(programs["qemu-nbd"]);
    let directory = directory();
    let (disk, socket) = (directory.path().join("disk"), directory.path().join("s"));
    image(&disk, SIZE, &[0..100, 300..301, 900..2049]);
    let _server = Server::qemu(&socket, &["--format=raw", "--read-only", disk.to_str().unwrap()]);
    check(&format!("nbd+unix:///?socket={}", socket.display()), &fs::read(&disk).unwrap());
}

#[test]
fn an_error_of_the_server_is_eio() {
    needs!(programs["nbdkit"]);
    let directory = directory();
    let (disk, always, often) =
        (directory.path().join("disk"), directory.path().join("always"), directory.path().join("often"));
    image(&disk, SIZE, &[0..2049]);
    let wanted = fs::read(&disk).unwrap();
    let uri = |socket: &std::path::Path| format!("nbd+unix:///?socket={}", socket.display());
    let disk = disk.to_str().unwrap();
    let _always = Server::nbdkit(&always, &["--filter=error", "file", disk, "error-pread-rate=100%", "error=ENOSPC"]);
    assert_eq!(read(&default_client(&uri(&always)), 0, 4096), Err(libc::EIO));
    let _often = Server::nbdkit(&often, &["--filter=error", "file", disk, "error-pread-rate=50%"]);
    let client = default_client(&uri(&often));
    let results: Vec<_> = (0..64).map(|turn| read(&client, turn * 1000, 5000)).collect();
    assert!(results.iter().any(Result::is_ok) && results.iter().any(Result::is_err));
    for (turn, result) in results.into_iter().enumerate() {
        assert!(result == Err(libc::EIO) || result.as_deref() == Ok(&wanted[turn * 1000..turn * 1000 + 5000]));
    }
}

#[test]
fn a_missing_export_is_an_error_with_exit_code_32() {
    needs!(programs["qemu-nbd"]);
    let directory = directory();
    let (disk, socket) = (directory.path().join("disk"), directory.path().join("s"));
    image(&disk, MIB, &[]);
    let _server = Server::qemu(&socket, &["--format=raw", "--export-name=this", disk.to_str().unwrap()]);
    let uri =
        blkholefs::testing::source::nbd::Uri::parse(&format!("nbd+unix:///that?socket={}", socket.display())).unwrap();
    let error = blkholefs::testing::source::nbd::Client::open(&uri).unwrap_err();
    assert!(error.to_string().contains("no such export"), "{error}");
    assert_eq!(error.exit_code(), 32);
}

/// A server that handles one request at a time receives none while it sends a reply, and the client receives no reply
/// while it sends requests.
#[test]
fn reads_that_are_begun_do_not_fill_the_connection() {
    let disk = vec![7; 1 << 20];
    let fake = FakeServer::new(Dialect::Structured, &disk, Arc::new(|_: &mut Message| Action::Continue));
    let client = default_client(&fake.uri);
    let begin = Instant::now();
    let reads = (0..2000).map(|_| {
        let mut buffer = AlignedBuffer::new();
        buffer.resize(64 << 10);
        (Bytes::ZERO, buffer)
    });
    let begun = client.begin_reads(reads.collect());
    assert!(!begun.is_empty() && begin.elapsed() < Duration::from_millis(900), "{:?}", begin.elapsed());
    assert!(!client.has_lost_connection());
    for read in begun {
        assert!(read.wait().unwrap().bytes() == &disk[..64 << 10]);
    }
    assert_eq!(read(&client, 0, 4096), Ok(disk[..4096].to_vec()));
    assert!(!client.has_lost_connection());
}
