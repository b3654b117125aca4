//! How a live pool's metadata is read: as seldom as can be, and with nothing left behind.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::common::check::{assert_map, bytes_read, check, map_of, open, seek_data, seek_hole};
use crate::common::dm::Pool;
use crate::common::image::write;
use crate::common::mount::Mount;
use crate::common::{MIB, assert_becomes};

/// Our own snapshot is released by the next start, and nobody else's.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn the_next_start_releases_what_is_ours() {
    let pool = Pool::new(64 * MIB, 64 << 10);
    let thin = pool.thin(0, 64 * MIB);
    write(thin.path(), MIB..2 * MIB);
    let directory = Path::new("/run/blkholefs.thin");
    fs::create_dir_all(directory).expect("/run is ours");
    let record = directory.join(pool.dm().name());
    for (steps, ours) in [("wanted", false), ("wanted\nheld ROOT", true)] {
        for (offset, same) in [(0, true), (1, false)] {
            pool.dm().message("reserve_metadata_snap");
            let root = pool.held_root().expect("it was taken just now");
            // A pool made without LVM has no uuid: the first line is empty.
            let text = format!("\n{steps}\n").replace("ROOT", &(root + offset).to_string());
            fs::write(&record, &text).expect("/run is ours");
            let mount = Mount::new(thin.path());
            check(mount.file(), thin.path());
            drop(mount);
            assert!(!record.exists(), "the record of {text:?} is cleared away");
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

/// Writes to blocks that are mapped leave the map as it is. Where nothing can be discarded it is not read again for them.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn overwriting_costs_no_reading() {
    const BLOCK: u64 = 64 << 10;
    const ROUNDS: u64 = 20;
    let pool = Pool::without_discards(64 * MIB, BLOCK);
    let thin = pool.thin(0, 64 * MIB);
    write(thin.path(), 0..MIB);
    let mount = Mount::new(thin.path());
    let file = open(mount.file());
    assert_map(mount.file(), &map_of(64 * MIB, &[0..MIB]));
    let before = bytes_read(pool.metadata());
    for round in 0..ROUNDS {
        write(thin.path(), round * 4096..(round + 1) * 4096);
        assert_eq!(seek_hole(&file, 0), Some(MIB), "round {round}");
    }
    // Each reading would take the superblock twice, and the tree.
    let read = bytes_read(pool.metadata()) - before;
    assert!(read < ROUNDS * 8192, "{read} bytes of metadata read");

    write(thin.path(), 8 * MIB..8 * MIB + 4096);
    assert_eq!(seek_data(&file, 8 * MIB), Some(8 * MIB));
    assert_map(mount.file(), &map_of(64 * MIB, &[0..MIB, 8 * MIB..8 * MIB + BLOCK]));
    check(mount.file(), thin.path());
}

/// As many blocks as before, but others: a discard that is still at work has unmapped one, and a write that completed
/// has mapped another.
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
            .expect("it starts");
        // It has unmapped the block, and waits for the data device.
        let mapped = || thin.status().split(' ').nth(3).and_then(|sectors| sectors.parse::<u64>().ok());
        assert_becomes(&Some(7 * BLOCK / 512), mapped);
        assert!(discard.try_wait().expect("our own child").is_none(), "the discard is at work");
        write(thin.path(), to..to + 4096);
        assert_eq!(seek_data(&file, to), Some(to), "a write that completed");
        assert!(discard.wait().expect("our own child").success());
        assert_becomes(&Some(from * BLOCK), || seek_hole(&file, from * BLOCK));
    }
    check(mount.file(), thin.path());
}

/// Volumes of one pool that are asked at the same time are read together.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn questions_at_the_same_time_share_a_reading() {
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
    // Alone, each one takes the superblock twice, and a node of each of the three trees.
    let alone = u64::from(VOLUMES) * 5 * 4096;
    assert!(read < alone, "{read} bytes of metadata read, {alone} by one at a time");
    for (id, thin) in (0..VOLUMES).zip(&thins) {
        check(&file(id), thin.path());
    }
}
