//! NBD exports that are mounted.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blkholefs::testing::deadline;
use blkholefs::testing::map::ExtentKind;

use crate::common::check::{self, check_same_bytes, map_holes};
use crate::common::mount::Mount;
use crate::common::nbd::{Server, directory, image, nbdinfo_map};
use crate::common::{GIB, MIB, needs, run, wait_until};
use crate::fake::{Action, BLOCK, Dialect, FakeServer, Message, Step};

/// Returns the map of a mounted file in the form of [`nbdinfo_map`].
fn map(file: &Path) -> Vec<(u64, ExtentKind)> {
    let kind = |kind| if kind == check::Kind::Hole { ExtentKind::Hole } else { ExtentKind::Data };
    map_holes(file).into_iter().map(|extent| (extent.1.end, kind(extent.0))).collect()
}

#[test]
fn an_export_is_a_sparse_file() {
    needs!(root, programs["nbdkit", "nbdinfo"]);
    let directory = directory();
    let (disk, socket) = (directory.path().join("disk"), directory.path().join("s"));
    image(&disk, GIB, &[0..16, 1024..1500, 1501..1502, 200_000..200_001]);
    let _server = Server::nbdkit(&socket, &["file", disk.to_str().unwrap()]);
    let uri = format!("nbd+unix:///a/disk.img?socket={}", socket.display());
    let mount = Mount::new(uri.as_ref());
    let file = mount.directory().join("disk.img");
    assert_eq!(map(&file), nbdinfo_map(&uri));
    check_same_bytes(&file, &disk);
    let attributes = fs::metadata(&file).unwrap();
    assert_eq!(attributes.len(), GIB);
    assert!(attributes.blocks() < GIB / 512);
    let copy = directory.path().join("copy");
    run("cp", ["--sparse=auto".as_ref(), file.as_os_str(), copy.as_os_str()]);
    assert!(fs::metadata(&copy).unwrap().blocks() * 512 < 8 * MIB);
}

/// A program that opens a file causes several requests of the kernel, and each of them several requests to the server.
#[test]
fn an_open_and_a_seek_on_a_slow_server_end_at_the_request_deadline() {
    needs!(root);
    let slow = Arc::new(AtomicBool::new(false));
    let is_slow = Arc::clone(&slow);
    let hook = move |message: &mut Message| match message.step == Step::Status && is_slow.load(Ordering::Relaxed) {
        true => Action::SendSlowly(Duration::from_secs(1)),
        false => Action::Continue,
    };
    let fake = FakeServer::new(Dialect::Structured, &[0; 4 * BLOCK], Arc::new(hook));
    let mount = Mount::new(fake.uri.as_ref());
    let path = mount.directory().join("nbd");
    assert_eq!(map(&path), [(4 * BLOCK as u64, ExtentKind::Hole)]);
    slow.store(true, Ordering::Relaxed);
    let begin = Instant::now();
    let file = fs::File::open(&path).unwrap();
    assert_eq!(check::seek_data(&file, 0), Some(0), "a range without block status in time is data");
    let took = begin.elapsed();
    assert!(took < deadline::REQUEST + Duration::from_secs(10), "{took:?}");
}

#[test]
fn root_can_mount_over_the_socket_of_another_user() {
    needs!(root, programs["nbdkit"]);
    let directory = directory();
    let socket = directory.path().join("s");
    let _server = Server::nbdkit(&socket, &["memory", "1M"]);
    let nobody = Some(65_534);
    std::os::unix::fs::chown(&socket, nobody, nobody).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o755)).unwrap();
    let mount = Mount::new(format!("nbd+unix:///disk?socket={}", socket.display()).as_ref());
    assert_eq!(map(&mount.directory().join("disk")), [(MIB, ExtentKind::Hole)], "{}", mount.log());
}

#[test]
fn a_copy_continues_when_the_server_is_restarted() {
    needs!(root, programs["nbdkit"]);
    let directory = directory();
    let (disk, socket) = (directory.path().join("disk"), directory.path().join("s"));
    image(&disk, 64 * MIB, &[0..1000, 4000..9000, 16_000..16_384]);
    let slow = ["--filter=delay", "file", disk.to_str().unwrap(), "delay-read=20ms"];
    let mut server = Server::nbdkit(&socket, &slow);
    let mount = Mount::new(format!("nbd+unix:///disk?socket={}", socket.display()).as_ref());
    let copy = directory.path().join("copy");
    let mut cp = Command::new("cp");
    let mut cp = cp.arg("--sparse=auto").arg(mount.directory().join("disk")).arg(&copy).spawn().unwrap();
    for wanted in [MIB, 8 * MIB] {
        assert!(wait_until(|| fs::metadata(&copy).is_ok_and(|copy| copy.blocks() * 512 > wanted)));
        server.kill();
        server.restart();
    }
    assert!(cp.wait().unwrap().success(), "{}", mount.log());
    check_same_bytes(&copy, &disk);
}

/// A program that reads a file, and looks for no holes, needs no block status.
#[test]
fn a_read_does_not_wait_for_block_status() {
    needs!(root);
    let (silent, closing) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (is_silent, is_closing) = (Arc::clone(&silent), Arc::clone(&closing));
    let hook = move |message: &mut Message| match message.step {
        Step::Status if is_silent.load(Ordering::Relaxed) => {
            message.bytes.clear();
            Action::Continue
        }
        Step::Read if is_closing.swap(false, Ordering::Relaxed) => Action::Close,
        _ => Action::Continue,
    };
    let disk = vec![7; 8 << 20];
    let fake = FakeServer::new(Dialect::Structured, &disk, Arc::new(hook));
    let mount = Mount::new(fake.uri.as_ref());
    let file = fs::File::open(mount.directory().join("nbd")).unwrap();
    silent.store(true, Ordering::Relaxed);
    let begin = Instant::now();
    let (mut buffer, mut at) = (vec![0; 64 << 10], 0);
    while at < disk.len() {
        let count = file.read_at(&mut buffer, at as u64).unwrap_or_else(|error| panic!("at {at}: {error}"));
        assert!(count > 0 && buffer[..count].iter().all(|byte| *byte == 7), "at {at}");
        at += count;
    }
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    // The query for reading ahead ends with its connection, so that the daemon can end.
    silent.store(false, Ordering::Relaxed);
    closing.store(true, Ordering::Relaxed);
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    assert_eq!(file.read_at(&mut buffer[..BLOCK], 0).unwrap(), BLOCK);
}
