//! Random writes, zeros, reads and flushes of several threads, compared with a model, and at the end with the server's disk.

use std::path::Path;
use std::sync::Arc;

use blkholefs::testing::export::{Export as _, NbdExportFile, Zeroed};
use blkholefs::testing::source::nbd::{Client, NbdExport, Uri};
use blkholefs::testing::units::Bytes;

use crate::common::nbd::{Server, directory, image};
use crate::common::random::{Length, Random};
use crate::common::{KIB, MIB, needs};
use crate::fake::{Action, Dialect, FakeServer, Message, set_blocks, set_export};
use crate::tls::server_certificates;
use crate::{default_client, read};

const THREADS: u64 = 4;
const SIZE: u64 = 4 * MIB + 4 * KIB;

/// The range of a thread. It begins and ends inside of a block, which another thread writes to as well.
fn share(thread: u64) -> std::ops::Range<u64> {
    let edge = |thread: u64| if thread == THREADS { SIZE } else { thread * (SIZE / THREADS) / 512 * 512 + thread * 77 };
    edge(thread)..edge(thread + 1)
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

/// Writes through an export, and returns what its disk must be then.
fn write_randomly(uri: &str, rounds: u64) -> Vec<u8> {
    let seed = Random::seed_or(1);
    println!("{uri}: BLKHOLEFS_SEED={seed}");
    let export = NbdExportFile::open(&NbdExport::new(Uri::parse(uri).unwrap())).unwrap();
    let writer = export.writer().unwrap();
    let client = default_client(uri);
    let before = read(&client, 0, index(SIZE)).unwrap();
    drop(client);
    let mut parts: Vec<Vec<u8>> = Vec::new();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (export, writer, before) = (&export, &writer, &before);
                scope.spawn(move || {
                    let own = share(thread);
                    let mut model = before[index(own.start)..index(own.end)].to_vec();
                    let mut random = Random::new(seed * 100 + thread);
                    for _ in Length::rounds(rounds).numbers() {
                        let unit = [1, 512, 4096][index(random.within(0..3))];
                        let place = random.range(own.end - own.start, unit);
                        let at = Bytes::new(own.start + place.start);
                        let end = Bytes::new(own.start + place.end);
                        let place = index(place.start)..index(place.end);
                        match random.within(0..8) {
                            0..4 => {
                                let bytes = random.bytes(place.len() as u64);
                                writer.write_at(&bytes, at).unwrap();
                                model[place].copy_from_slice(&bytes);
                            }
                            4..6 => {
                                if writer.make_zero(&(at..end)).unwrap() == Zeroed::Unproven {
                                    writer.write_at(&vec![0; place.len()], at).unwrap();
                                }
                                model[place].fill(0);
                            }
                            6 => writer.flush().unwrap(),
                            _ => {
                                let mut buffer = Default::default();
                                let found = export.read_at(&mut buffer, at, place.len()).unwrap();
                                assert!(buffer.bytes()[found] == model[place.clone()], "{at} {place:?}");
                            }
                        }
                    }
                    model
                })
            })
            .collect();
        parts.extend(threads.into_iter().map(|thread| thread.join().unwrap()));
    });
    writer.flush().unwrap();
    parts.concat()
}

/// Compares the disk at `path`, after its export was written to.
fn check(uri: &str, path: &Path) {
    let model = write_randomly(uri, 150);
    assert!(std::fs::read(path).unwrap() == model, "{uri}");
}

#[test]
fn random_writes_to_a_fake_server() {
    for dialect in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
        for (flags, minimum, maximum) in [(0x45, 1, 1 << 20), (0x45, 4096, 8192), (0x145, 512, 70_000), (1, 4096, 4096)]
        {
            let hook = move |message: &mut Message| {
                set_export(message, SIZE, flags);
                set_blocks(message, minimum, maximum);
                Action::Continue
            };
            let fake = FakeServer::new(dialect, &vec![9; index(SIZE)], Arc::new(hook));
            let model = write_randomly(&fake.uri, 40);
            assert!(*fake.disk() == model, "{dialect:?} {flags:#x} {minimum} {maximum}");
        }
    }
}

#[test]
fn random_writes_to_qemu_nbd() {
    needs!(programs["qemu-nbd"]);
    let directory = directory();
    let path = directory.path().join("disk");
    image(&path, SIZE, &[0..100, 300..301, 900..1025]);
    for (name, words) in [
        ("plain", vec![]),
        ("unmap", vec!["--discard=unmap"]),
        ("detect", vec!["--discard=unmap", "--detect-zeroes=unmap"]),
    ] {
        let socket = directory.path().join(name);
        let words: Vec<_> = ["--format=raw"].into_iter().chain(words).chain([path.to_str().unwrap()]).collect();
        let _server = Server::qemu(&socket, &words);
        check(&format!("nbd+unix:///?socket={}", socket.display()), &path);
    }
}

#[test]
fn random_writes_to_nbdkit() {
    needs!(programs["nbdkit"]);
    let directory = directory();
    let path = directory.path().join("disk");
    image(&path, SIZE, &[0..100, 300..301, 900..1025]);
    let file = path.to_str().unwrap();
    let large = ["blocksize-minimum=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"];
    for (name, words) in [
        ("structured", vec!["file", file]),
        ("simple", vec!["--no-sr", "file", file]),
        ("no-flags", vec!["--mask-handshake=1", "file", file]),
        ("large-blocks", [&["--filter=blocksize-policy", "file", file][..], &large].concat()),
        ("no-zeroes", vec!["--filter=nozero", "file", file]),
        ("one-thread", vec!["--threads=1", "file", file]),
    ] {
        let socket = directory.path().join(name);
        let _server = Server::nbdkit(&socket, &words);
        check(&format!("nbd+unix:///?socket={}", socket.display()), &path);
    }
}

#[test]
fn random_writes_over_tls() {
    needs!(programs["nbdkit", "certtool"]);
    let directory = directory();
    server_certificates(directory.path());
    let (path, socket) = (directory.path().join("disk"), directory.path().join("s"));
    image(&path, SIZE, &[0..100]);
    let certificates = format!("--tls-certificates={}", directory.path().display());
    // With one thread, the server receives nothing while it sends.
    for threads in ["--threads=1", "--threads=16"] {
        let server = ["--tls=require", &certificates, threads, "file", path.to_str().unwrap()];
        let _ = std::fs::remove_file(&socket);
        let _server = Server::nbdkit(&socket, &server);
        check(&format!("nbds+unix:///?socket={}&tls-verify-peer=0", socket.display()), &path);
    }
}

/// Zeros become holes of the server's disk.
#[test]
fn zeros_are_holes_of_the_disk() {
    needs!(programs["nbdkit"]);
    let directory = directory();
    let (path, socket) = (directory.path().join("disk"), directory.path().join("s"));
    image(&path, SIZE, &[0..1025]);
    let _server = Server::nbdkit(&socket, &["file", path.to_str().unwrap()]);
    let client: Arc<Client> = default_client(&format!("nbd+unix:///?socket={}", socket.display()));
    let writer = client.writer().unwrap();
    assert!(writer.make_zero(&(Bytes::ZERO..Bytes::new(SIZE))).unwrap());
    writer.flush().unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&metadata), 0);
    let end = blkholefs::testing::map::ExtentKind::Hole;
    assert_eq!(crate::runs_of(&client), [(SIZE, end)]);
}
