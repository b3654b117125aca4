//! What changed since a dirty bitmap was made, from exports of qemu-nbd.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blkholefs::testing::map::{ExtentKind, HoleMap as _};
use blkholefs::testing::source::changes::nbd::since_bitmap;
use blkholefs::testing::source::changes::{Changes, Identity, IdentityValue};
use blkholefs::testing::source::nbd::Uri;
use blkholefs::testing::units::Bytes;

use crate::common::nbd::{Server, directory, image};
use crate::common::random::Random;
use crate::common::{KIB, MIB, needs, run};
use crate::fake::{
    Action, BLOCK, CONTEXT, Dialect, FakeServer, Message, Step, chunk, option_reply, refusal, set_export,
};
use crate::runs;

const SIZE: u64 = 16 * MIB;

/// A qcow2 image with dirty bitmaps in it.
struct Disk {
    directory: tempfile::TempDir,
}

impl Disk {
    fn new(size: u64) -> Self {
        let disk = Self { directory: directory() };
        run("qemu-img", ["create", "-q", "-f", "qcow2", disk.text(), &size.to_string()]);
        disk
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    fn text(&self) -> &'static str {
        self.path().to_str().expect("temporary paths are text").to_owned().leak()
    }

    /// Adds a bitmap with this granularity.
    fn add_bitmap(&self, name: &str, granularity: &str) {
        run("qemu-img", ["bitmap", "--add", "-g", granularity, self.text(), name]);
    }

    fn io(&self, commands: &[String]) {
        let words: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
        run("qemu-io", [words.as_slice(), &["-f", "qcow2", "-d", "unmap", self.text()]].concat());
    }

    /// All bytes of the disk.
    fn content(&self) -> Vec<u8> {
        let raw = self.directory.path().join("raw");
        run("qemu-img", ["convert", "-f", "qcow2", "-O", "raw", self.text(), raw.to_str().expect("text")]);
        std::fs::read(raw).expect("qemu-img made it")
    }

    /// What changed since a bitmap was made, over a server that has the bitmap only now.
    fn since(&self, name: &str) -> Changes {
        let socket = self.directory.path().join("socket");
        let _server = Server::qemu(&socket, &["--read-only", "--format=qcow2", "--bitmap", name, self.text()]);
        since(&socket, name).unwrap_or_else(|error| panic!("{error}"))
    }
}

fn uri(socket: &Path) -> Uri {
    Uri::parse(&format!("nbd+unix:///?socket={}", socket.display())).expect("a URI")
}

fn since(socket: &Path, name: &str) -> Result<Changes, String> {
    since_bitmap(&uri(socket), name).map_err(|error| error.to_string())
}

/// Checks that the older bytes with the changes are the newer ones, and that no more than `most` bytes are changes.
fn check(older: &[u8], changes: &Changes, newer: &[u8], most: usize) {
    let mut rebuilt = older.to_vec();
    rebuilt.resize(newer.len(), 0);
    let (mut at, mut read) = (0, 0);
    assert_eq!(changes.map.len(), Bytes::new(newer.len() as u64));
    for (end, kind) in runs(&changes.map) {
        let range = at..usize::try_from(end).expect("a small device");
        match kind {
            ExtentKind::Data => rebuilt[range.clone()].copy_from_slice(&newer[range.clone()]),
            ExtentKind::Hole => rebuilt[range.clone()].fill(0),
            _ => {}
        }
        read += if kind == ExtentKind::Data { range.len() } else { 0 };
        at = range.end;
    }
    assert_eq!(at, newer.len());
    assert!(rebuilt == newer, "the older bytes with the changes are not the newer ones");
    assert!(read <= most, "{read} bytes are changes");
}

#[test]
fn dirty_ranges_are_data_and_cleared_ones_are_holes() {
    needs!(programs["qemu-nbd", "qemu-img", "qemu-io"]);
    let disk = Disk::new(SIZE);
    disk.io(&["write -P 1 0 8M".to_owned()]);
    let older = disk.content();
    disk.add_bitmap("monday", "64K");
    disk.io(&["write -P 2 1M 64k".to_owned(), "write -z -u 2M 1M".to_owned(), "write -P 3 16320k 64k".to_owned()]);
    let changes = disk.since("monday");
    let (data, hole, unchanged) = (ExtentKind::Data, ExtentKind::Hole, ExtentKind::Unchanged);
    let expected = [
        (MIB, unchanged),
        (MIB + 64 * KIB, data),
        (2 * MIB, unchanged),
        (3 * MIB, hole),
        (16320 * KIB, unchanged),
        (SIZE, data),
    ];
    assert_eq!(runs(&changes.map), expected);
    check(&older, &changes, &disk.content(), 128 << 10);
    let socket = disk.directory.path().join("socket");
    let text = IdentityValue::Text;
    let fields = vec![
        ("export", text(uri(&socket).to_string())),
        ("bitmap", text("monday".to_owned())),
        ("size", IdentityValue::Number(SIZE)),
    ];
    assert_eq!(changes.identity, Identity { kind: "nbd", fields });
}

/// Random writes and discards, of a disk whose last block is partial, since bitmaps of several units.
#[test]
fn the_older_bytes_with_the_changes_are_the_newer_ones() {
    needs!(programs["qemu-nbd", "qemu-img", "qemu-io"]);
    let mut random = Random::new(Random::seed_or(1));
    let size = SIZE - 512;
    let disk = Disk::new(size);
    let mut olders = Vec::new();
    for (step, unit) in ["512", "4096", "65536", "1048576"].into_iter().enumerate() {
        let name = format!("step{step}");
        disk.add_bitmap(&name, unit);
        olders.push((name, disk.content()));
        let commands: Vec<String> = (0..12)
            .map(|_| {
                let range = random.range(size, 512);
                let (start, len) = (range.start, range.end - range.start);
                match random.within(0..4) {
                    0 => format!("discard {start} {len}"),
                    1 => format!("write -z -u {start} {len}"),
                    _ => format!("write -P {} {start} {len}", random.within(1..256)),
                }
            })
            .collect();
        disk.io(&commands);
        let newer = disk.content();
        for (name, older) in &olders {
            check(older, &disk.since(name), &newer, newer.len());
        }
    }
}

#[test]
fn what_is_not_certain_is_refused() {
    needs!(programs["qemu-nbd", "qemu-img", "nbdkit"]);
    let disk = Disk::new(SIZE);
    disk.add_bitmap("monday", "64K");
    let socket = disk.directory.path().join("socket");
    let refused = |name: &str, reason: &str| {
        let error = since(&socket, name).expect_err("it is refused");
        assert!(error.contains(reason), "{error}");
    };
    {
        let _server = Server::qemu(&socket, &["--read-only", "--format=qcow2", "--bitmap=monday", disk.text()]);
        assert!(since(&socket, "monday").is_ok());
        refused("tuesday", "offers no bitmap 'tuesday'");
        refused("", "the name of a bitmap has 1 to 1023 bytes");
        refused(&"x".repeat(1024), "the name of a bitmap has 1 to 1023 bytes");
    }
    {
        // The bitmap would grow with each write.
        let _server = Server::qemu(&socket, &["--format=qcow2", "--bitmap=monday", disk.text()]);
        refused("monday", "the export is not read-only");
    }
    refused("monday", "cannot connect");
    let raw = disk.directory.path().join("raw");
    image(&raw, SIZE, &[0..1]);
    let kit = disk.directory.path().join("nbdkit");
    let _server = Server::nbdkit(&kit, &["--readonly", "file", raw.to_str().expect("text")]);
    let error = since(&kit, "monday").expect_err("nbdkit has no bitmaps");
    assert!(error.contains("offers no bitmap 'monday'"), "{error}");
}

/// The number of the bitmap's context.
const BITMAP: u32 = 5;

/// Makes the reply of the fake server one of a server with a bitmap, in which the second and the third block are dirty.
fn with_bitmap(dialect: Dialect, message: &mut Message) {
    match message.step {
        Step::Option(10) => {
            let context = |id: u32, name: &[u8]| option_reply(10, 4, &[id.to_be_bytes().as_slice(), name].concat());
            let contexts = [context(CONTEXT, b"base:allocation"), context(BITMAP, b"qemu:dirty-bitmap:b")].concat();
            message.bytes = [contexts, option_reply(10, 1, &[])].concat();
        }
        Step::Option(7) => set_export(message, 6 * BLOCK as u64, 3),
        Step::Status => {
            let block = BLOCK as u64;
            let ends = [(block, 0), (3 * block, 1), (6 * block, 0)];
            let mut at = message.request.offset;
            let mut extents = Vec::new();
            for (end, flags) in ends.into_iter().filter(|(end, _)| *end > message.request.offset) {
                extents.push((end - at, flags));
                at = end;
            }
            let payload = payload(dialect, &extents);
            let kind = if dialect == Dialect::Extended { 6 } else { 5 };
            message.bytes.splice(0..0, chunk(dialect, 0, kind, message.request.cookie, &payload));
        }
        _ => {}
    }
}

/// The payload of the bitmap's chunk: lengths and flags.
fn payload(dialect: Dialect, extents: &[(u64, u32)]) -> Vec<u8> {
    let mut payload = BITMAP.to_be_bytes().to_vec();
    if dialect == Dialect::Extended {
        payload.extend(u32::try_from(extents.len()).expect("few").to_be_bytes());
    }
    for (len, flags) in extents {
        match dialect {
            Dialect::Extended => payload.extend([len.to_be_bytes(), u64::from(*flags).to_be_bytes()].concat()),
            _ => payload.extend([u32::try_from(*len).expect("small").to_be_bytes(), flags.to_be_bytes()].concat()),
        }
    }
    payload
}

/// A change of the messages of a server.
type Change = fn(&mut Message) -> Action;

/// Changes of the messages of an honest server, and why there is no answer then.
const VIOLATIONS: [(Change, &str); 5] = [
    (cut, "cannot read the bitmap at byte 0"),
    (refuse, "the server reports error 22"),
    (without_bitmap, "answered a block status request without extents"),
    (with_one_number, "chose a metadata context twice"),
    (writable, "the export is not read-only"),
];

fn cut(message: &mut Message) -> Action {
    if message.step != Step::Status {
        return Action::Continue;
    }
    message.bytes.truncate(message.bytes.len() / 2);
    Action::Close
}

fn refuse(message: &mut Message) -> Action {
    if message.step == Step::Status {
        let dialect = if message.bytes[0] == 0x6e { Dialect::Extended } else { Dialect::Structured };
        message.bytes = refusal(dialect, message.request.cookie);
    }
    Action::Continue
}

/// Leaves the last chunk, which is that of `base:allocation`.
fn without_bitmap(message: &mut Message) -> Action {
    if message.step == Step::Status {
        let second = message.bytes[4..].windows(4).position(|bytes| bytes == &message.bytes[..4]);
        message.bytes.drain(..second.expect("two chunks") + 4);
    }
    Action::Continue
}

fn with_one_number(message: &mut Message) -> Action {
    if message.step == Step::Option(10) {
        let at = message.bytes.windows(4).rposition(|bytes| bytes == BITMAP.to_be_bytes()).expect("it is there");
        message.bytes[at..at + 4].copy_from_slice(&CONTEXT.to_be_bytes());
    }
    Action::Continue
}

fn writable(message: &mut Message) -> Action {
    set_export(message, 6 * BLOCK as u64, 1);
    Action::Continue
}

/// A server that breaks the protocol, or ends a connection, gets no second connection, and gives no answer.
#[test]
fn an_answer_is_whole_and_from_one_connection() {
    let mut disk = vec![1; 6 * BLOCK];
    disk[2 * BLOCK..4 * BLOCK].fill(0);
    for dialect in [Dialect::Structured, Dialect::Extended] {
        let fake = |change: Change| {
            let hook = move |message: &mut Message| {
                with_bitmap(dialect, message);
                change(message)
            };
            let fake = FakeServer::new(dialect, &disk, Arc::new(hook));
            let uri = Uri::parse(&fake.uri).expect("a URI");
            let answer = since_bitmap(&uri, "b").map_err(|error| error.to_string());
            assert_eq!(fake.connections.load(Ordering::Relaxed), 1);
            answer
        };
        let honest = fake(|_| Action::Continue).unwrap_or_else(|error| panic!("{error}"));
        let ends = [1, 2, 3, 6].map(|block| block * BLOCK as u64);
        let kinds = [ExtentKind::Unchanged, ExtentKind::Data, ExtentKind::Hole, ExtentKind::Unchanged];
        assert_eq!(runs(&honest.map), ends.into_iter().zip(kinds).collect::<Vec<_>>());
        for (change, reason) in VIOLATIONS {
            let error = fake(change).expect_err("it is refused");
            assert!(error.contains(reason), "{dialect:?}: {error}");
        }
    }
}
