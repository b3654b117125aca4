//! Targets that keep the same bytes in several places, and copy-on-write snapshots.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use crate::common::check::{Kind, check, map_holes, map_of};
use crate::common::dm::Dm;
use crate::common::image::{discard, open_for_writing, write, write_at};
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::common::{KIB, MIB, assert_becomes, needs, run, wait_until};
use crate::targets::{Disk, assert_dense, assert_map};

const SIZE: u64 = 4 * MIB;
const SECTORS: u64 = SIZE / 512;

/// Two legs with the same bytes, of which one stores zeros where the other has a hole.
fn legs() -> [Disk; 2] {
    let legs = [Disk::new(SIZE, &[MIB..MIB + 64 * KIB]), Disk::new(SIZE, &[MIB..MIB + 64 * KIB])];
    let second = open_for_writing(legs[1].device.path());
    second.write_all_at(&vec![0; 128 << 10], 2 * MIB).expect("a write inside the device");
    second.sync_data().expect("data reaches the device");
    legs
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn mirror_has_a_hole_where_all_legs_have_one() {
    needs!(modules["dm-mirror"]);
    let legs = legs();
    let table =
        |log: &str, second: &str| format!("0 {SECTORS} mirror {log} 2 {} 0 {second} 0 1 handle_errors", legs[0].path());
    let device = Dm::new(&table("core 2 1024 nosync", &legs[1].path().to_string()));
    let data = [MIB..MIB + 64 * KIB, 2 * MIB..2 * MIB + 128 * KIB];
    assert_map(&device, &data);
    let mount = Mount::new(device.path());
    write(device.path(), 3 * MIB..4 * MIB);
    let more = [data[0].clone(), data[1].clone(), 3 * MIB..4 * MIB];
    assert_eq!(map_holes(mount.file()), map_of(SIZE, &more), "a write while it is open");
    check(mount.file(), device.path());
    drop((mount, device));
    // A leg that cannot be written never comes in sync.
    let error = Dm::new(&format!("0 {SECTORS} error"));
    let degraded = Dm::new(&table("core 1 1024", &error.path().display().to_string()));
    assert_dense(&degraded);
    drop(degraded);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn raid1_has_a_hole_where_all_legs_have_one() {
    needs!(modules["dm-raid", "raid1"]);
    let legs = legs();
    let [first, second] = legs.each_ref().map(|leg| leg.path().to_string());
    let device = Dm::new(&format!("0 {SECTORS} raid raid1 2 0 nosync 2 - {first} - {second}"));
    assert_map(&device, &[MIB..MIB + 64 * KIB, 2 * MIB..2 * MIB + 128 * KIB]);
    discard(device.path(), MIB..MIB + 64 * KIB);
    check(Mount::new(device.path()).file(), device.path());
    drop(device);
    assert_dense(&Dm::new(&format!("0 {SECTORS} raid raid1 2 0 nosync 2 - {first} - -")));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn raid_with_parity_is_dense() {
    needs!(modules["dm-raid", "raid456"]);
    let legs = [0; 3].map(|_| Disk::new(SIZE, &[]));
    let [a, b, c] = legs.each_ref().map(|leg| leg.path().to_string());
    let device = Dm::new(&format!("0 {} raid raid5_ls 2 128 nosync 3 - {a} - {b} - {c}", 2 * SECTORS));
    assert_dense(&device);
}

struct SnapshotSet {
    snapshot: Dm,
    /// The snapshot-origin device: before a write to it, the kernel copies the old data to the store.
    origin: Dm,
    _store: Disk,
    disk: Disk,
}

impl SnapshotSet {
    fn new(data: &[std::ops::Range<u64>], store: u64, kind: &str, chunk: u64) -> Self {
        run("modprobe", ["dm-snapshot"]);
        let (disk, store) = (Disk::new(SIZE, data), Disk::new(store, &[]));
        let origin = Dm::new(&format!("0 {SECTORS} snapshot-origin {}", disk.path()));
        let table = format!("0 {SECTORS} snapshot {} {} {kind} {}", disk.path(), store.path(), chunk / 512);
        let snapshot = Dm::new(&table);
        // The kernel registers the snapshots of an origin when the origin is resumed.
        origin.suspend();
        origin.resume();
        Self { snapshot, origin, _store: store, disk }
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn snapshot_has_the_holes_of_its_origin_except_for_exceptions() {
    for kind in ["P", "PO"] {
        let set = SnapshotSet::new(&[MIB..2 * MIB], 8 * MIB, kind, 16 * KIB);
        assert_map(&set.snapshot, &[MIB..2 * MIB]);
        let mount = Mount::new(set.snapshot.path());
        write(set.snapshot.path(), 0..4 * KIB);
        assert_becomes(&map_of(SIZE, &[0..16 * KIB, MIB..2 * MIB]), || map_holes(mount.file()));
        write(set.origin.path(), 3 * MIB..3 * MIB + 4 * KIB);
        let expected = [0..16 * KIB, MIB..2 * MIB, 3 * MIB..3 * MIB + 16 * KIB];
        assert_becomes(&map_of(SIZE, &expected), || map_holes(mount.file()));
        check(mount.file(), set.snapshot.path());
        drop(mount);
        let mut expected = expected.to_vec();
        expected[2] = 3 * MIB..3 * MIB + 4 * KIB;
        assert_map(&set.origin, &expected[1..]);
    }
}

/// What was data when the snapshot was made stays data after the origin was written and discarded.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn data_of_a_snapshot_stays_data_when_its_origin_changes() {
    let set = SnapshotSet::new(&[MIB..2 * MIB], 8 * MIB, "P", 4 * KIB);
    let mount = Mount::new(set.snapshot.path());
    assert_eq!(map_holes(mount.file()), map_of(SIZE, &[MIB..2 * MIB]));
    write(set.origin.path(), MIB..2 * MIB);
    set.disk.punch(0..SIZE);
    assert_eq!(map_holes(mount.file()), map_of(SIZE, &[MIB..2 * MIB]));
    check(mount.file(), set.snapshot.path());
    drop(mount);
    assert_map(&set.origin, &[]);
}

/// Exception lists that fill metadata areas exactly, and that span several areas.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn exceptions_of_a_snapshot_are_read_from_all_areas() {
    // 32 entries in an area of one 512-byte chunk.
    let set = SnapshotSet::new(&[], 8 * MIB, "P", 512);
    let mount = Mount::new(set.snapshot.path());
    let file = open_for_writing(set.snapshot.path());
    let mut random = Random::new(Random::seed_or(7));
    for _ in 0..5 {
        let range = random.range(SIZE, 4 * KIB);
        let range = range.start..range.end.min(range.start + 32 * KIB);
        write_at(&file, range);
        file.sync_data().expect("data reaches the device");
        check(mount.file(), set.snapshot.path());
    }
    let map = map_holes(mount.file());
    assert!(map.iter().any(|extent| extent.0 == Kind::Hole), "{map:?}: {}", mount.log());
    assert!(map.iter().any(|extent| extent.0 == Kind::Data), "{map:?}");
    // Eight chunks are one block of 4 KiB, so this many blocks fill areas exactly.
    drop((file, mount));
    let set = SnapshotSet::new(&[], 8 * MIB, "P", 512);
    for blocks in [4, 4, 8] {
        let at = blocks * 64 * KIB;
        write(set.snapshot.path(), at..at + blocks * 4 * KIB);
        check(Mount::new(set.snapshot.path()).file(), set.snapshot.path());
    }
    assert_map(&set.snapshot, &[256 * KIB..272 * KIB, 512 * KIB..544 * KIB]);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn transient_and_invalid_snapshots_are_dense() {
    assert_dense(&SnapshotSet::new(&[], 8 * MIB, "N", 4 * KIB).snapshot);
    let overflown = SnapshotSet::new(&[], 64 * KIB, "P", 4 * KIB);
    assert_map(&overflown.snapshot, &[]);
    let file = open_for_writing(overflown.snapshot.path());
    write_at(&file, 0..MIB);
    let _ = file.sync_data();
    drop(file);
    assert!(overflown.snapshot.status().contains("Invalid"), "{}", overflown.snapshot.status());
    assert_dense(&overflown.snapshot);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn clone_has_the_holes_of_its_source_until_it_is_copied() {
    needs!(modules["dm-clone"]);
    let [metadata, destination, source] =
        [Disk::new(4 * MIB, &[]), Disk::new(SIZE, &[]), Disk::new(SIZE, &[MIB..2 * MIB])];
    let devices = format!("{} {} {}", metadata.path(), destination.path(), source.path());
    let device = Dm::new(&format!("0 {SECTORS} clone {devices} 8 1 no_hydration"));
    assert_map(&device, &[MIB..2 * MIB]);
    let mount = Mount::new(device.path());
    write(device.path(), 3 * MIB..3 * MIB + 64 * KIB);
    assert_eq!(map_holes(mount.file()), map_of(SIZE, &[MIB..2 * MIB, 3 * MIB..3 * MIB + 64 * KIB]));
    check(mount.file(), device.path());
    device.message("enable_hydration");
    assert!(wait_until(|| device.status().contains(" 1024/1024 0 ")), "{}", device.status());
    check(mount.file(), device.path());
    // All regions were copied, zeros too. A range that is discarded now is a hole even where the source has data.
    discard(device.path(), MIB..2 * MIB);
    drop(mount);
    let map = map_holes(Mount::new(device.path()).file());
    assert!(map.iter().any(|extent| extent.0 == Kind::Hole && extent.1.contains(&MIB)), "{map:?}");
    check(Mount::new(device.path()).file(), device.path());
    let mut bytes = [1; 4096];
    File::open(device.path()).expect("it opens").read_exact_at(&mut bytes, MIB).expect("it can be read");
    assert_eq!(bytes, [0; 4096]);
}
