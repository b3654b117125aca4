//! What differs between a dm-snapshot and its origin, and between two snapshots of one origin.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use blkholefs::testing::map::{ExtentKind, HoleMap as _};
use blkholefs::testing::source::changes::{Changes, IdentityValue, snapshot};
use blkholefs::testing::source::{BlockDevice, Context};
use blkholefs::testing::units::Bytes;

use crate::common::dm::Dm;
use crate::common::image::{open_for_writing, write, write_at};
use crate::common::random::Random;
use crate::common::{KIB, MIB, run};
use crate::lvm::Group;
use crate::targets::Disk;

const SIZE: u64 = 4 * MIB;
const SECTORS: u64 = SIZE / 512;
const STORE: u64 = 16 * MIB;

/// An origin, and the device over it that copies what is written.
struct Origin {
    device: Dm,
    raw: Disk,
}

impl Origin {
    fn new(size: u64) -> Self {
        run("modprobe", ["dm-snapshot"]);
        let raw = Disk::new(size, &[0..size]);
        let device = Dm::new(&format!("0 {} snapshot-origin {}", size / 512, raw.path()));
        Self { device, raw }
    }

    /// A snapshot of what is in it now.
    fn snapshot(&self, sectors: u64, kind: &str, chunk: u64, store: u64) -> Snapshot {
        let store = Disk::new(store, &[]);
        // LVM does it in this order too.
        self.device.suspend();
        let table = format!("0 {sectors} snapshot {} {} {kind} {}", self.raw.path(), store.path(), chunk / 512);
        let device = Dm::new(&table);
        self.device.resume();
        Snapshot { device, store }
    }
}

/// A snapshot, which is removed before its store.
struct Snapshot {
    device: Dm,
    store: Disk,
}

fn between(older: &Path, newer: &Path) -> Result<Option<Changes>, String> {
    let open = |path: &Path| BlockDevice::open(path).unwrap_or_else(|error| panic!("{error}"));
    snapshot::between(&open(older), &open(newer), &Context::default()).map_err(|error| error.to_string())
}

fn changes(older: &Path, newer: &Path) -> Changes {
    let changes = between(older, newer).unwrap_or_else(|error| panic!("{error}"));
    changes.expect("one of them is a snapshot")
}

fn assert_refused(older: &Path, newer: &Path, reason: &str) {
    for (older, newer) in [(older, newer), (newer, older)] {
        let error = between(older, newer).expect_err("it is refused");
        assert!(error.contains(reason), "{error}");
    }
}

/// All bytes of a device, past the page cache of this program's tests.
fn content(device: &Path) -> Vec<u8> {
    run("blockdev", ["--flushbufs".as_ref(), device.as_os_str()]);
    std::fs::read(device).expect("the device can be read")
}

/// The ranges of the map that are not unchanged.
fn ranges(changes: &Changes) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut at = Bytes::ZERO;
    while at < changes.map.len() {
        let extent = changes.map.extent_at(at);
        assert!(matches!(extent.kind, ExtentKind::Data | ExtentKind::Unchanged), "{:?}", extent.kind);
        match found.last_mut() {
            _ if extent.kind == ExtentKind::Unchanged => {}
            Some(last) if last.1 == at.get() => last.1 = extent.end.get(),
            _ => found.push((at.get(), extent.end.get())),
        }
        at = extent.end;
    }
    found
}

/// Checks that the older bytes with the changes are the newer ones. Returns the number of bytes that changed.
fn check(older: &Path, newer: &Path) -> u64 {
    let changes = changes(older, newer);
    let (mut rebuilt, expected) = (content(older), content(newer));
    assert_eq!(changes.map.len(), Bytes::new(expected.len() as u64));
    rebuilt.resize(expected.len(), 0xee);
    let ranges = ranges(&changes);
    for &(start, end) in &ranges {
        let range = usize::try_from(start).unwrap()..usize::try_from(end).unwrap();
        rebuilt[range.clone()].copy_from_slice(&expected[range]);
    }
    assert!(rebuilt == expected, "{} with the changes is not {}", older.display(), newer.display());
    ranges.iter().map(|(start, end)| end - start).sum()
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn chunks_with_an_exception_are_data_and_the_others_unchanged() {
    for kind in ["P", "PO"] {
        let origin = Origin::new(SIZE);
        let snapshot = origin.snapshot(SECTORS, kind, 16 * KIB, STORE);
        let path = snapshot.device.path();
        assert_eq!(ranges(&changes(path, origin.device.path())), []);
        // Open until the end: a close would write the pages back, and so make the exceptions.
        let files = [origin.device.path(), path].map(open_for_writing);
        write_at(&files[0], MIB..MIB + 512);
        write_at(&files[1], 2 * MIB + 4 * KIB..2 * MIB + 20 * KIB);
        let expected = [(MIB, MIB + 16 * KIB), (2 * MIB, 2 * MIB + 32 * KIB)];
        for base in [origin.device.path(), origin.raw.device.path()] {
            for (older, newer) in [(path, base), (base, path)] {
                let changes = changes(older, newer);
                assert_eq!(ranges(&changes), expected);
                let number = IdentityValue::Number;
                let fields = [
                    ("older-uuid", IdentityValue::None),
                    ("newer-uuid", IdentityValue::None),
                    ("exceptions", number(3)),
                    ("older-size", number(SIZE)),
                    ("newer-size", number(SIZE)),
                    ("chunk-size", number(16 * KIB)),
                ];
                assert_eq!((changes.identity.kind, &changes.identity.fields[..]), ("dm-snapshot", &fields[..]));
            }
        }
    }
}

/// Random writes to an origin and to its snapshots, of different chunk sizes, of which one is made later.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn the_older_bytes_with_the_changes_are_the_newer_ones() {
    let mut random = Random::new(Random::seed_or(1));
    // The last chunk is a partial one.
    let size = SIZE - 512;
    let origin = Origin::new(size);
    let mut snapshots: Vec<Snapshot> = Vec::new();
    for chunk in [4 * KIB, 64 * KIB, 512] {
        snapshots.push(origin.snapshot(size / 512, "P", chunk, STORE));
        for _ in 0..4 {
            let target = match random.within(0..3) {
                0 => &snapshots[usize::try_from(random.within(0..snapshots.len() as u64)).unwrap()].device,
                _ => &origin.device,
            };
            let range = random.range(size, 512);
            let bytes = random.bytes(range.end - range.start);
            let file = open_for_writing(target.path());
            file.write_all_at(&bytes, range.start).expect("a write inside the device");
            let paths = [origin.device.path(), origin.raw.device.path()].into_iter();
            let paths: Vec<&Path> = paths.chain(snapshots.iter().map(|snapshot| snapshot.device.path())).collect();
            for (index, older) in paths.iter().enumerate() {
                for newer in paths.iter().skip(index.max(1) + 1) {
                    let (there, back) = (check(older, newer), check(newer, older));
                    assert_eq!(there, back);
                }
            }
        }
    }
    let [first, .., last] = &snapshots[..] else { panic!("there are several") };
    let most = check(first.device.path(), origin.device.path());
    assert!(most < size && check(last.device.path(), origin.device.path()) <= most, "{most}");
}

/// The bytes of two snapshots stay the same, however their origin is written. Each comparison meets exceptions that are
/// allocated and not complete.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn snapshots_of_a_busy_origin_are_compared() {
    let origin = Origin::new(SIZE);
    let first = origin.snapshot(SECTORS, "P", 4 * KIB, STORE);
    write(origin.device.path(), MIB..MIB + 64 * KIB);
    run("blockdev", ["--flushbufs".as_ref(), origin.device.path().as_os_str()]);
    let second = origin.snapshot(SECTORS, "P", 4 * KIB, STORE);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let path = origin.device.path();
        let writer = scope.spawn(|| {
            let file = open_for_writing(path);
            let mut random = Random::new(2);
            while !stop.load(Ordering::Relaxed) {
                let at = random.within(0..SIZE / 4096) * 4096;
                file.write_all_at(&random.bytes(4096), at).expect("a write inside the device");
                file.sync_data().expect("data reaches the device");
            }
        });
        for _ in 0..10 {
            let _ = check(first.device.path(), second.device.path());
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().expect("the writer does not fail");
    });
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_snapshot_that_is_shorter_or_longer_is_unchanged_up_to_the_shorter_end() {
    let origin = Origin::new(SIZE);
    let short = origin.snapshot(SECTORS / 2 + 3, "P", 4 * KIB, STORE);
    write(short.device.path(), 0..512);
    let end = SIZE / 2 + 3 * 512;
    assert_eq!(ranges(&changes(origin.device.path(), short.device.path())), [(0, 4 * KIB)]);
    let longer = ranges(&changes(short.device.path(), origin.device.path()));
    assert_eq!(longer, [(0, 4 * KIB), (end / (4 * KIB) * 4 * KIB, SIZE)]);
    check(short.device.path(), origin.device.path());
    check(origin.device.path(), short.device.path());
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn what_is_not_certain_is_refused() {
    let (origin, other) = (Origin::new(SIZE), Origin::new(SIZE));
    let snapshot = origin.snapshot(SECTORS, "P", 4 * KIB, STORE);
    let path = snapshot.device.path();
    for unrelated in [other.device.path(), other.raw.device.path(), snapshot.store.device.path()] {
        assert_refused(path, unrelated, "nor its origin, nor another snapshot of its origin");
        assert!(matches!(between(origin.device.path(), unrelated), Ok(None)));
    }
    assert_refused(path, path, "it is the same device as the older one");
    let transient = origin.snapshot(SECTORS, "N", 4 * KIB, STORE);
    assert_refused(transient.device.path(), path, "in the kernel's memory only");
    assert_refused(transient.device.path(), origin.device.path(), "in the kernel's memory only");
    drop(transient);
    origin.device.suspend();
    assert_refused(path, origin.device.path(), "it is suspended");
    origin.device.resume();
    assert!(matches!(between(path, origin.device.path()), Ok(Some(_))));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_snapshot_that_has_overflowed_is_refused() {
    // A write to the origin that finds no space in the store makes the snapshot invalid. A write to the snapshot itself makes
    // one of kind PO overflow, which keeps its exceptions.
    for (kind, to_origin, state) in [("P", true, "Invalid"), ("PO", true, "Invalid"), ("PO", false, "Overflow")] {
        let origin = Origin::new(SIZE);
        let snapshot = origin.snapshot(SECTORS, kind, 4 * KIB, 128 * KIB);
        let device = if to_origin { &origin.device } else { &snapshot.device };
        let file = open_for_writing(device.path());
        let written = file.write_all_at(&vec![1; MIB as usize], 0).and_then(|()| file.sync_data());
        assert_eq!(written.is_ok(), to_origin);
        drop(file);
        assert!(snapshot.device.status().contains(state), "{}", snapshot.device.status());
        assert_refused(snapshot.device.path(), origin.device.path(), "the snapshot is not valid");
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_snapshot_that_is_being_merged_is_refused() {
    let origin = Origin::new(SIZE);
    let staying = origin.snapshot(SECTORS, "P", 4 * KIB, STORE);
    let merging = origin.snapshot(SECTORS, "P", 4 * KIB, STORE);
    write(origin.device.path(), 0..MIB);
    run("blockdev", ["--flushbufs".as_ref(), origin.device.path().as_os_str()]);
    let before = check(staying.device.path(), origin.device.path());
    assert!(before >= MIB);
    let Snapshot { device, store } = merging;
    let table = format!("0 {SECTORS} snapshot-merge {} {} P 8", origin.raw.path(), store.path());
    device.reload(&format!("0 {SECTORS} error"));
    origin.device.reload(&table);
    assert_refused(staying.device.path(), origin.device.path(), "a snapshot is being merged into it");
    assert_refused(staying.device.path(), origin.raw.device.path(), "a snapshot is being merged into the origin");
    drop(device);
    origin.device.reload(&format!("0 {SECTORS} snapshot-origin {}", origin.raw.path()));
    assert_eq!(check(staying.device.path(), origin.device.path()), before);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn volumes_of_lvm_are_compared_by_their_names() {
    run("modprobe", ["dm-snapshot"]);
    let group = Group::new("snapshots");
    group.lvm(&["lvcreate", "--quiet", "--yes", "--size=32m", "--name=lv", "snapshots"]);
    let lv = group.volume("lv");
    write(&lv, 0..8 * MIB);
    let snapshot = |name: &str| -> PathBuf {
        group.lvm(&["lvcreate", "--quiet", "--snapshot", "--size=16m", "--name", name, "snapshots/lv"]);
        group.volume(name)
    };
    let monday = snapshot("monday");
    write(&lv, 4 * MIB..5 * MIB);
    let tuesday = snapshot("tuesday");
    write(&lv, 12 * MIB..12 * MIB + 4 * KIB);
    for (older, newer) in [(&monday, &lv), (&monday, &tuesday), (&tuesday, &lv), (&tuesday, &monday)] {
        check(older, newer);
    }
    assert_eq!(ranges(&changes(&tuesday, &lv)), [(12 * MIB, 12 * MIB + 4 * KIB)]);
    let answer = changes(&monday, &tuesday);
    let uuid = |at: usize| match &answer.identity.fields[at].1 {
        IdentityValue::Text(uuid) => uuid.clone(),
        other => panic!("{other:?}"),
    };
    assert!(uuid(0).starts_with("LVM-") && uuid(1).starts_with("LVM-") && uuid(0) != uuid(1));
}
