//! Writes through a mount: the map of a thin volume follows them without being read anew.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::common::check::{assert_map, check, check_holes, check_same_bytes, map_holes, map_of, seek_data, sysfs};
use crate::common::dm::{Dm, Pool};
use crate::common::image::{discard, open_rw};
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::common::{MIB, assert_becomes, wait_until};

const BLOCK: u64 = 64 << 10;

/// Loads of a map that a test allows. Other tests make and remove devices at the same time, and each event of device-mapper
/// makes the maps of thin volumes void. A load for each write would be more.
const FEW: usize = 30;

/// The writes of a test that counts loads.
const WRITES: u64 = 2 * FEW as u64;

/// How often the daemon has read a map.
fn loads(mount: &Mount) -> usize {
    mount.log().matches(": new map").count()
}

/// The writes that a device has completed. Each commit of a pool writes to its metadata device.
fn writes(device: &Path) -> u64 {
    field(device, 4)
}

/// The sectors that were written to a device.
fn sectors_written(device: &Path) -> u64 {
    field(device, 6)
}

fn field(device: &Path, index: usize) -> u64 {
    let text = fs::read_to_string(sysfs(device).join("stat")).expect("the device has counters");
    text.split_whitespace().nth(index).and_then(|word| word.parse().ok()).expect("a counter")
}

/// A client that writes and asks in turn causes no load of the map for each write, and each answer is exact.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_client_that_writes_and_asks_in_turn_loads_the_map_a_few_times() {
    const WRITES: u64 = 1000;
    let pool = Pool::new(128 * MIB, BLOCK);
    let thin = pool.thin(0, 256 * MIB);
    let mount = Mount::writable(thin.path());
    let file = open_rw(mount.file());
    assert_eq!(seek_data(&file, 0), None);
    let commits = writes(pool.metadata());
    let (mut data, mut rough) = (Vec::new(), 0);
    for n in 0..WRITES {
        let block = n * 7 % 2003 * 2 * BLOCK % (256 * MIB);
        data.push(block..block + BLOCK);
        file.write_all_at(&[1; 4096], block + 8192).expect("the pool has room");
        assert_eq!(seek_data(&file, block), Some(block), "after {n} writes");
        // After an event of device-mapper the device may be all data for a while.
        rough += usize::from(seek_data(&file, block + BLOCK).is_some_and(|next| next < block + 2 * BLOCK));
    }
    assert!(rough <= FEW, "{rough} answers were not exact");
    let (loads, commits) = (loads(&mount), writes(pool.metadata()) - commits);
    assert!(loads <= FEW, "{loads} maps were read");
    // A pool commits once a second by itself, and each commit is some writes.
    assert!(commits < WRITES / 2, "{commits} writes of metadata");
    data.sort_by_key(|range| range.start);
    data.dedup();
    assert_map(mount.file(), &map_of(256 * MIB, &data));
    // Reading the metadata gives the same map.
    let again = Mount::new(thin.path());
    assert_map(again.file(), &map_of(256 * MIB, &data));
    check(mount.file(), thin.path());
}

/// The mapped size that stat(2) reports follows, too.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn the_allocated_size_follows_own_writes() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let thin = pool.thin(0, 16 * MIB);
    let mount = Mount::writable(thin.path());
    let file = open_rw(mount.file());
    let blocks = || fs::metadata(mount.file()).expect("attributes").blocks_of_64k();
    assert_eq!(seek_data(&file, 0), None);
    for n in 1..=WRITES {
        file.write_all_at(&[1; 512], n * 3 * BLOCK).expect("the pool has room");
        file.write_all_at(&[2; 512], n * 3 * BLOCK + 4096).expect("the block is mapped");
        assert_eq!(seek_data(&file, n * 3 * BLOCK), Some(n * 3 * BLOCK));
        assert_becomes(&n, blocks);
    }
    assert!(loads(&mount) <= FEW, "{}", mount.log());
}

trait BlocksOf64k {
    fn blocks_of_64k(&self) -> u64;
}

impl BlocksOf64k for fs::Metadata {
    fn blocks_of_64k(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(self) * 512 / BLOCK
    }
}

/// Writes of every size and position, some at the same time, are counted by the kernel as the daemon counts them: the
/// sectors that are written to the file are those that the device has counted, and no map is read for them.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn the_device_counts_each_sector_of_an_own_write_once() {
    let pool = Pool::with_zeroing(128 * MIB, BLOCK);
    // Two names of one device have one writer, and a lock each: so two writes go on at the same time.
    let thin = pool.thin(0, 96 * MIB + 4096);
    let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    for name in ["a", "b"] {
        std::os::unix::fs::symlink(thin.path(), directory.path().join(name)).expect("a new name");
    }
    let mount = Mount::writable(directory.path());
    let files = ["a", "b"].map(|name| open_rw(&mount.directory().join(name)));
    assert_eq!(seek_data(&files[0], 0), None);
    let before = sectors_written(thin.path());
    let written: u64 = std::thread::scope(|scope| {
        let threads = (0..).zip(&files).map(|(n, file)| {
            scope.spawn(move || {
                let mut random = Random::new(n + 1);
                let bytes = Aligned::new(8 * MIB);
                let mut sum = 0;
                for round in 0..60 {
                    // Large and small ones, each in its own half of the device.
                    let most = if round % 10 == 0 { 8 * MIB } else { 300 << 10 };
                    let size = if round == 0 { most } else { random.within(1..most / 512) * 512 };
                    let offset = n * 48 * MIB + random.within(0..(48 * MIB - size) / 512 + 1) * 512;
                    let bytes = &bytes.bytes()[..usize::try_from(size).expect("a size")];
                    file.write_all_at(bytes, offset).expect("the pool has room");
                    sum += size / 512;
                }
                sum
            })
        });
        threads.collect::<Vec<_>>().into_iter().map(|thread| thread.join().expect("it has written")).sum()
    });
    assert_eq!(sectors_written(thin.path()) - before, written);
    for file in &files {
        assert!(seek_data(file, 0).is_some());
    }
    assert!(loads(&mount) <= FEW, "{}", mount.log());
    // A part of a sector is a read of the sector and a write of all of it.
    let before = sectors_written(thin.path());
    files[0].write_all_at(&[9; 700], 95 * MIB + 300).expect("the pool has room");
    assert_eq!(sectors_written(thin.path()) - before, 2);
    assert_eq!(seek_data(&files[0], 95 * MIB), Some(95 * MIB));
    assert!(loads(&mount) <= FEW, "{}", mount.log());
    check_same_bytes(&mount.directory().join("a"), thin.path());
}

/// Another process writes to the device at the same time. After each of its writes the file shows data there.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_foreign_write_does_not_hide_among_own_ones() {
    let pool = Pool::new(128 * MIB, BLOCK);
    let thin = pool.thin(0, 64 * MIB);
    let mount = Mount::writable(thin.path());
    let file = open_rw(mount.file());
    let foreign = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(thin.path()).expect("not exclusive");
    let buffer = Aligned::new(4096);
    let check_foreign = |n: u64| {
        let offset = (n * 2 + 1) * BLOCK;
        foreign.write_all_at(buffer.bytes(), offset).expect("the pool has room");
        assert_eq!(seek_data(&file, offset), Some(offset), "foreign write {n}");
    };
    // Of the same size, so that sums would be equal easily.
    let write_own = |n: u64| file.write_all_at(&[5; 4096], n * 2 * BLOCK).expect("the pool has room");
    assert_eq!(seek_data(&file, 0), None);
    for n in 0..10 {
        write_own(n);
        check_foreign(n);
        write_own(n + 10);
    }
    let (done, count) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                write_own(count.fetch_add(1, Ordering::Relaxed) % 256);
            }
        });
        for n in 20..30 {
            let before = count.load(Ordering::Relaxed);
            assert!(wait_until(|| count.load(Ordering::Relaxed) > before));
            check_foreign(n);
        }
        done.store(true, Ordering::Relaxed);
    });
    check_holes(&map_holes(mount.file()), thin.path());
    assert!(wait_until(|| map_holes(mount.file()).len() > 1), "holes are found again");
    check(mount.file(), thin.path());
}

/// Memory that is aligned as O_DIRECT requires it, full of ones. FUSE divides what is not aligned into requests that begin inside
/// of sectors.
struct Aligned(Vec<u8>);

impl Aligned {
    const ALIGNMENT: usize = 4096;

    fn new(size: u64) -> Self {
        Self(vec![1; usize::try_from(size).expect("a size in memory") + Self::ALIGNMENT])
    }

    fn bytes(&self) -> &[u8] {
        &self.0[self.0.as_ptr().align_offset(Self::ALIGNMENT)..][..self.0.len() - Self::ALIGNMENT]
    }
}

/// Ranges that are made zero through the file are data until they are read as zeros, and never a false hole.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn own_zeros_and_foreign_discards_leave_true_holes() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let thin = pool.thin(0, 16 * MIB);
    let mount = Mount::writable(thin.path());
    let file = open_rw(mount.file());
    for n in 0..8 {
        file.write_all_at(&[1; 2 << 16], n * 2 * MIB).expect("the pool has room");
        assert_eq!(seek_data(&file, n * 2 * MIB), Some(n * 2 * MIB));
    }
    let mode = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(&file, mode, 2 * 1024 * 1024, 2 << 16).expect("the range is made zero");
    check_holes(&map_holes(mount.file()), thin.path());
    file.write_all_at(&[2; 4096], 2 * MIB).expect("the pool has room");
    assert_eq!(seek_data(&file, 2 * MIB), Some(2 * MIB));
    discard(thin.path(), 4 * MIB..4 * MIB + 2 * BLOCK);
    assert_becomes(&Some(6 * MIB), || seek_data(&file, 4 * MIB));
    file.write_all_at(&[3; 4096], 4 * MIB + BLOCK).expect("the pool has room");
    assert_eq!(seek_data(&file, 4 * MIB), Some(4 * MIB + BLOCK));
    check(mount.file(), thin.path());
}

/// A volume above an external origin: the origin's data stays data, and own writes are added to it.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_volume_above_an_origin_follows_own_writes() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let origin = pool.thin(0, 16 * MIB);
    crate::common::image::write(origin.path(), MIB..2 * MIB);
    pool.dm().message("create_thin 1");
    let thin: Dm = pool.activate(1, 16 * MIB, Some(origin.path()));
    let mount = Mount::writable(thin.path());
    let file = open_rw(mount.file());
    assert_map(mount.file(), &map_of(16 * MIB, &[MIB..2 * MIB]));
    let before = loads(&mount);
    for n in 0..WRITES {
        let offset = 4 * MIB + n * 2 * BLOCK;
        file.write_all_at(&[1; 4096], offset).expect("the pool has room");
        assert_eq!(seek_data(&file, 2 * MIB), Some(4 * MIB));
        assert_eq!(seek_data(&file, offset), Some(offset));
    }
    assert!(loads(&mount) - before <= FEW, "{}", mount.log());
    check(mount.file(), thin.path());
}
