//! Thin pools that are busy, full, or read by another program too: no hole is wrong, no metadata snapshot stays, and the
//! metadata passes `thin_check`.

use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::check::{Kind, check, check_holes, map_holes, open, seek_data, seek_hole};
use crate::common::dm::{Dm, Pool};
use crate::common::freshness::writers;
use crate::common::image::{discard, open_for_writing, write};
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::common::{MIB, assert_becomes, try_run};

const BLOCK: u64 = 64 * 1024;
const SIZE: u64 = 24 * MIB;
/// Writes by each writer.
const ROUNDS: u64 = 100;

/// Sets the flag that ends the loops of other threads when it is dropped, also by a panic.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Several volumes of one pool, all written at once, while snapshots are made and deleted and another tool takes
/// and releases the one metadata snapshot that a pool has.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn busy_volumes_and_snapshots_have_no_wrong_hole() {
    let pool = Pool::new(160 * MIB, BLOCK);
    let volumes: Vec<Dm> = (0..3).map(|id| pool.thin(id, SIZE)).collect();
    let mounts: Vec<Mount> = volumes.iter().map(|volume| Mount::new(volume.path())).collect();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writing: Vec<_> = mounts
            .iter()
            .zip(&volumes)
            .map(|(mount, volume)| scope.spawn(|| writers(mount.file(), volume.path(), SIZE, ROUNDS)))
            .collect();
        let snapshots = scope.spawn(|| snapshots(&pool, &volumes[0], &done));
        let other_tool = scope.spawn(|| metadata_snapshots(&pool, &done));
        let ends = Ends(&done);
        let results: Vec<_> = writing.into_iter().map(thread::ScopedJoinHandle::join).collect();
        drop(ends);
        let snapshots = snapshots.join().expect("snapshots are right");
        let taken = other_tool.join().expect("the other tool is not disturbed");
        let raced: Vec<_> = results.into_iter().map(|raced| raced.expect("no wrong hole")).collect();
        let (writes, walks) = raced.iter().fold((0, 0), |sum, raced| (sum.0 + raced.writes, sum.1 + raced.walks));
        println!("{writes} writes, {walks} walks, {snapshots} snapshots, {taken} metadata snapshots of another tool");
        assert!(snapshots > 0 && taken > 0);
    });
    for (mount, volume) in mounts.iter().zip(&volumes) {
        check(mount.file(), volume.path());
        // Not all of it has been written: when the pool is quiet its holes are seen again.
        assert_becomes(&true, || map_holes(mount.file()).iter().any(|extent| extent.0 == Kind::Hole));
    }
    drop(mounts);
    assert_eq!(pool.held_root(), None, "{}", pool.dm().status());
    drop(volumes);
    pool.thin_check();
}

/// Makes, checks and deletes snapshots of a volume that is written; returns how many.
fn snapshots(pool: &Pool, origin: &Dm, done: &AtomicBool) -> u32 {
    let mut made = 0;
    while !done.load(Ordering::SeqCst) {
        let snapshot = pool.snapshot(100 + made, origin, 0);
        let mount = Mount::new(snapshot.path());
        check(mount.file(), snapshot.path());
        write(snapshot.path(), 0..4096);
        check(mount.file(), snapshot.path());
        drop(mount);
        drop(snapshot);
        pool.delete(100 + made);
        made += 1;
    }
    made
}

/// Takes and releases the metadata snapshot, as another tool would; returns how often.
fn metadata_snapshots(pool: &Pool, done: &AtomicBool) -> u32 {
    let mut taken = 0;
    while !done.load(Ordering::SeqCst) {
        // The program under test may have it for a moment.
        if try_run("dmsetup", ["message", pool.dm().name(), "0", "reserve_metadata_snap"], "").is_ok() {
            assert!(pool.held_root().is_some(), "another program released this test's metadata snapshot");
            pool.dm().message("release_metadata_snap");
            taken += 1;
        }
        thread::sleep(Duration::from_millis(20));
    }
    taken
}

/// A daemon that is killed at any moment leaves nothing in the pool that the next daemon does not remove.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn killed_daemons_leave_nothing_in_the_pool() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let thin = pool.thin(0, SIZE);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let mut random = Random::new(1);
            while !done.load(Ordering::SeqCst) {
                let start = random.within(0..SIZE / BLOCK) * BLOCK;
                write(thin.path(), start..start + 4096);
            }
        });
        let ends = Ends(&done);
        let mut random = Random::new(2);
        for _ in 0..8 {
            let mut mount = Mount::new(thin.path());
            let file = mount.file().to_owned();
            let queries = scope.spawn(move || while std::fs::metadata(&file).is_ok() {});
            thread::sleep(Duration::from_millis(random.within(0..100)));
            mount.kill();
            queries.join().expect("the queries end with the daemon");
        }
        drop(ends);
        writing.join().expect("writes succeed");
    });
    let mount = Mount::new(thin.path());
    check(mount.file(), thin.path());
    drop(mount);
    assert_eq!(pool.held_root(), None, "{}", pool.dm().status());
    drop(thin);
    pool.thin_check();
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_pool_without_space_for_data_has_holes() {
    let pool = Pool::new(4 * MIB, BLOCK);
    let thin = pool.thin(0, 64 * MIB);
    let mount = Mount::new(thin.path());
    let full = (0..64).find(|n| {
        let file = open_for_writing(thin.path());
        file.write_all_at(&[1; 4096], n * MIB).and_then(|()| file.sync_data()).is_err()
            || (1..8).any(|m| {
                let within = file.write_all_at(&[1; 4096], n * MIB + m * BLOCK);
                within.and_then(|()| file.sync_data()).is_err()
            })
    });
    assert!(full.is_some(), "the pool takes more than it has: {}", pool.dm().status());
    assert!(pool.dm().status().contains("out_of_data_space"), "{}", pool.dm().status());
    check(mount.file(), thin.path());
    let map = map_holes(mount.file());
    assert!(map.len() > 1, "holes are known all the same: {map:?}, {}", mount.log());
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_pool_without_space_for_metadata_has_holes() {
    let pool = Pool::with_metadata(512 * MIB, BLOCK, 128 * 4096);
    let size = 256 * MIB;
    let thin = pool.thin(0, size);
    let mount = Mount::new(thin.path());
    // A snapshot makes the next write copy the path to its mapping.
    let mut snapshots = Vec::new();
    let mut random = Random::new(1);
    for id in 1..200 {
        let file = open_for_writing(thin.path());
        let start = random.within(0..size / BLOCK) * BLOCK;
        let written = file.write_all_at(&[1; 4096], start).and_then(|()| file.sync_data());
        let created = try_run("dmsetup", ["message", pool.dm().name(), "0", &format!("create_snap {id} 0")], "");
        if written.is_err() || created.is_err() {
            break;
        }
        snapshots.push(id);
    }
    let status = pool.dm().status();
    assert!(status.contains(" ro ") || status.contains("Fail"), "after {} snapshots: {status}", snapshots.len());
    check(mount.file(), thin.path());
    drop(mount);
    // A daemon that starts after the failure reads the map too.
    let mount = Mount::new(thin.path());
    check(mount.file(), thin.path());
    assert!(map_holes(mount.file()).len() > 1, "a pool that takes no writes can be read: {}", mount.log());
}

/// A pool that commits several times while its metadata is read, because that is slow: one device is written continuously
/// while the maps of the others are read.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn volumes_of_a_pool_that_commits_all_the_time_have_no_wrong_hole() {
    let pool = Pool::with_slow_metadata(192 * MIB, BLOCK);
    let (thin, quiet, noise) = (pool.thin(0, SIZE), pool.thin(1, 512 * MIB), pool.thin(2, SIZE));
    // Every other block, so that nodes hold few and there are many of them.
    let file = open_for_writing(quiet.path());
    for block in (0..2000).step_by(2) {
        file.write_all_at(&[1; 512], block * BLOCK).expect("a write inside the device");
    }
    drop(file);
    let (mount, quiet_mount) = (Mount::new(thin.path()), Mount::new(quiet.path()));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let committing = scope.spawn(|| commits(&pool, &noise, &done));
        let ends = Ends(&done);
        // This volume is not written, so its holes stay known.
        for _ in 0..3 {
            let file = open(quiet_mount.file());
            assert_becomes(&Some(BLOCK), || seek_hole(&file, 0));
            assert_eq!(seek_data(&file, 1001 * BLOCK), Some(1002 * BLOCK));
        }
        writers(mount.file(), thin.path(), SIZE, 15);
        drop(ends);
        assert!(committing.join().expect("the noise succeeds") > 0);
    });
    check(mount.file(), thin.path());
    check_holes(&map_holes(quiet_mount.file()), quiet.path());
    assert_eq!(map_holes(quiet_mount.file()).len(), 2000);
    drop((mount, quiet_mount));
    assert_eq!(pool.held_root(), None, "{}", pool.dm().status());
    drop((thin, quiet, noise));
    pool.thin_check();
}

/// Provisions and discards, each with a commit; returns how often.
fn commits(pool: &Pool, noise: &Dm, done: &AtomicBool) -> u32 {
    let file = open_for_writing(noise.path());
    let mut random = Random::new(3);
    let mut commits = 0;
    while !done.load(Ordering::SeqCst) {
        let start = random.within(0..SIZE / BLOCK) * BLOCK;
        file.write_all_at(&[1; 512], start).expect("a write inside the device");
        file.sync_all().expect("a flush, and so a commit");
        if random.one_in(8) {
            discard(noise.path(), 0..SIZE);
            pool.dm().status();
        }
        commits += 1;
    }
    commits
}
