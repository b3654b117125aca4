//! How a live pool's metadata is read: as seldom as can be, and with nothing left behind.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::check::{assert_map, bytes_read, check, map_of, open, seek_data, seek_hole, sysfs};
use crate::common::dm::Pool;
use crate::common::image::{discard, write};
use crate::common::mount::Mount;
use crate::common::scsi::ScsiDisk;
use crate::common::{MIB, assert_becomes, wait_until};

/// The next start releases the daemon's own snapshot, and no other program's.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn the_next_start_releases_only_our_metadata_snapshot() {
    let pool = Pool::new(64 * MIB, 64 << 10);
    let thin = pool.thin(0, 64 * MIB);
    write(thin.path(), MIB..2 * MIB);
    let directory = Path::new("/run/blkholefs.thin");
    fs::create_dir_all(directory).expect("/run is writable");
    let record = directory.join(pool.dm().name());
    for (steps, ours) in [("wanted", false), ("wanted\nheld ROOT", true)] {
        for (offset, same) in [(0, true), (1, false)] {
            pool.dm().message("reserve_metadata_snap");
            let root = pool.held_root().expect("the snapshot was just taken");
            // A pool made without LVM has no uuid: the first line is empty.
            let text = format!("\n{steps}\n").replace("ROOT", &(root + offset).to_string());
            fs::write(&record, &text).expect("/run is writable");
            let mount = Mount::new(thin.path());
            check(mount.file(), thin.path());
            drop(mount);
            assert!(!record.exists(), "the record {text:?} still exists");
            let released = ours && (same || !steps.contains("ROOT"));
            assert_eq!(pool.held_root(), (!released).then_some(root), "after {text:?}");
            if !released {
                pool.dm().message("release_metadata_snap");
            }
        }
    }
    drop(thin);
    pool.thin_check();
}

/// A discard unmaps one block and a write maps another, so the count of mapped blocks is the same. The pool's data device
/// supports no discards, and on Linux 5.10 and 6.1 the volume's `discard_max_hw_bytes` is 0 then.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn an_equal_count_of_mapped_blocks_is_no_proof_of_an_equal_map() {
    const BLOCK: u64 = 64 << 10;
    let disk = ScsiDisk::new(64, &["lbpu=0", "lbpws=0"]);
    let limit = fs::read_to_string(sysfs(disk.path()).join("queue/discard_max_bytes")).expect("a limit");
    assert_eq!(limit, "0\n", "the disk supports discards");
    let pool = Pool::over(disk.path(), BLOCK);
    let thin = pool.thin(0, 64 * MIB);
    write(thin.path(), 0..8 * BLOCK);
    let mount = Mount::new(thin.path());
    let file = open(mount.file());
    assert_map(mount.file(), &map_of(64 * MIB, &[0..8 * BLOCK]));
    assert_eq!(seek_data(&file, 8 * BLOCK), None);
    for round in 0..4 {
        let to = (16 + round) * MIB;
        discard(thin.path(), round * BLOCK..(round + 1) * BLOCK);
        write(thin.path(), to..to + 4096);
        assert_eq!(seek_data(&file, to), Some(to), "a write that completed, round {round}");
        assert_becomes(&Some(0), || seek_hole(&file, 0));
    }
    check(mount.file(), thin.path());
}

/// The status of each volume has what stat(2) reports.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_listing_of_volumes_with_their_attributes_reads_no_metadata() {
    const COUNT: u32 = 20;
    let pool = Pool::new(64 * MIB, 64 << 10);
    let volumes: Vec<_> = (0..COUNT).map(|id| pool.thin(id, 8 * MIB)).collect();
    let directory = tempfile::tempdir().expect("a temporary directory");
    for (id, volume) in volumes.iter().enumerate() {
        write(volume.path(), MIB..2 * MIB);
        symlink(volume.path(), directory.path().join(id.to_string())).expect("a link");
    }
    let mount = Mount::new(directory.path());
    let before = bytes_read(pool.metadata());
    for _ in 0..2 {
        let entries = fs::read_dir(mount.directory()).expect("the directory can be read").map(|entry| {
            let attributes = entry.and_then(|entry| entry.metadata()).expect("attributes");
            (attributes.len(), attributes.blocks() * 512)
        });
        assert_eq!(entries.collect::<Vec<_>>(), vec![(8 * MIB, MIB); COUNT as usize]);
    }
    assert_eq!(bytes_read(pool.metadata()) - before, 0);
    assert_eq!(seek_data(&open(&mount.directory().join("0")), 0), Some(MIB));
    assert!(bytes_read(pool.metadata()) > before, "the reads of a seek are counted");
}

/// A discard in flight has unmapped one block and a completed write has mapped another, so the count of mapped blocks is
/// the same.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_write_during_a_discard_is_seen() {
    const BLOCK: u64 = 64 << 10;
    let pool = Pool::with_slow_data(64 * MIB, BLOCK, 8 * BLOCK);
    let thin = pool.thin(0, 64 * MIB);
    write(thin.path(), 0..8 * BLOCK);
    let mount = Mount::new(thin.path());
    let file = open(mount.file());
    assert_map(mount.file(), &map_of(64 * MIB, &[0..8 * BLOCK]));
    for from in 0..2 {
        let to = (16 + from) * MIB;
        let path = thin.path().to_str().expect("text");
        let offset = (from * BLOCK).to_string();
        let mut discard = Command::new("blkdiscard")
            .args(["--offset", &offset, "--length", &BLOCK.to_string(), path])
            .spawn()
            .expect("the program starts");
        // The discard has unmapped the block and waits for the slow data device.
        let mapped = || thin.status().split(' ').nth(3).and_then(|sectors| sectors.parse::<u64>().ok());
        assert_becomes(&Some(7 * BLOCK / 512), mapped);
        assert!(discard.try_wait().expect("our own child").is_none(), "the discard has ended too early");
        write(thin.path(), to..to + 4096);
        assert_eq!(seek_data(&file, to), Some(to), "a write that completed");
        assert!(discard.wait().expect("our own child").success());
        assert_becomes(&Some(from * BLOCK), || seek_hole(&file, from * BLOCK));
    }
    check(mount.file(), thin.path());
}

/// Simultaneous seeks on volumes of one pool share one read of the metadata.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn seeks_at_the_same_time_share_one_read_of_the_metadata() {
    const VOLUMES: u32 = 8;
    let pool = Pool::with_slow_metadata(64 * MIB, 64 << 10);
    let thins: Vec<_> = (0..VOLUMES).map(|id| pool.thin(id, 16 * MIB)).collect();
    let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    for (id, thin) in thins.iter().enumerate() {
        let start = id as u64 * MIB;
        write(thin.path(), start..start + MIB);
        symlink(thin.path(), directory.path().join(id.to_string())).expect("a new name");
    }
    let mount = Mount::new(directory.path());
    let file = |id: u32| mount.directory().join(id.to_string());
    let files: Vec<_> = (0..VOLUMES).map(|id| open(&file(id))).collect();
    let before = bytes_read(pool.metadata());
    std::thread::scope(|scope| {
        for (id, file) in files.iter().enumerate() {
            scope.spawn(move || assert_eq!(seek_data(file, 0), Some(id as u64 * MIB)));
        }
    });
    let read = bytes_read(pool.metadata()) - before;
    // A separate read takes the superblock twice, and one node of each of the three trees.
    let alone = u64::from(VOLUMES) * 5 * 4096;
    assert!(read < alone, "{read} bytes of metadata read, {alone} by one at a time");
    for (id, thin) in (0..VOLUMES).zip(&thins) {
        check(&file(id), thin.path());
    }
}

/// Seeks on a device that is written continuously still find holes: they wait until the metadata can be read.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_volume_that_is_written_all_the_time_has_holes() {
    const BLOCK: u64 = 64 << 10;
    const WALKS: u32 = 20;
    let pool = Pool::new(256 * MIB, BLOCK);
    let thin = pool.thin(0, 64 * MIB);
    for n in 0..8 {
        write(thin.path(), n * 4 * MIB..n * 4 * MIB + BLOCK);
    }
    let mount = Mount::new(thin.path());
    let file = open(mount.file());
    let start = Instant::now();
    assert_eq!(seek_hole(&file, 0), Some(BLOCK));
    let first = start.elapsed();
    let mut slowest = Duration::ZERO;
    let (done, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let dense = std::thread::scope(|scope| {
        scope.spawn(|| {
            let device = fs::OpenOptions::new().write(true).open(thin.path()).expect("the device opens");
            while !done.load(Ordering::Relaxed) {
                let offset = writes.load(Ordering::Relaxed) % 8 * 4 * MIB;
                device.write_all_at(&[1; 4096], offset).expect("a write inside the device");
                device.sync_data().expect("data reaches the device");
                writes.fetch_add(1, Ordering::Relaxed);
                // The rate of the writes is what is tested.
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        let is_dense = |_: &u32| {
            let before = writes.load(Ordering::Relaxed);
            let went_on = wait_until(|| writes.load(Ordering::Relaxed) > before);
            let start = Instant::now();
            let is_dense = !went_on || seek_hole(&file, 0) == Some(64 * MIB);
            slowest = slowest.max(start.elapsed());
            is_dense
        };
        let dense = (0..WALKS).filter(is_dense).count();
        done.store(true, Ordering::Relaxed);
        dense
    });
    // A request waits for ten times as long as a reading took, and for three seconds at most.
    if dense > 0 && (first > Duration::from_millis(100) || slowest > Duration::from_secs(1)) {
        println!("skipped: this machine reads maps too slowly now: {first:?}, a walk {slowest:?}");
        return;
    }
    assert_eq!(dense, 0, "of {WALKS} walks");
    check(mount.file(), thin.path());
}
