//! The metadata snapshot of a pool: it is released however the daemon ends, and a slow pool does not keep the daemon from
//! ending.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::unistd::{Whence, lseek};

use crate::common::check::check;
use crate::common::dm::{Dm, Pool, sectors};
use crate::common::image::{discard, open_for_writing};
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::common::{MIB, assert_becomes, wait_until};

const BLOCK: u64 = 64 << 10;
const SIZE: u64 = 24 * MIB;
/// The directory of the records.
const RECORDS: &str = "/run/blkholefs.thin";

/// Sets the flag that ends the loops of other threads when it is dropped, also by a panic.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Runs `test` while a volume of the pool is written, with a commit for each write: the metadata can be read
/// only through the metadata snapshot.
pub fn while_it_commits(pool: &Pool, test: impl FnOnce(&Dm)) {
    let (thin, noise) = (pool.thin(0, SIZE), pool.thin(1, SIZE));
    open_for_writing(thin.path()).write_all_at(&[1; 4096], MIB).expect("a write inside the device");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let file = open_for_writing(noise.path());
            for number in 0.. {
                let block = number % (SIZE / BLOCK);
                if block == 0 {
                    discard(noise.path(), 0..SIZE);
                }
                file.write_all_at(&[1; 512], block * BLOCK).expect("a write inside the device");
                file.sync_all().expect("a flush, and so a commit: the block is new");
                if done.load(Ordering::SeqCst) {
                    return;
                }
            }
        });
        let _ends = Ends(&done);
        test(&thin);
    });
    let mount = Mount::new(thin.path());
    check(mount.file(), thin.path());
    drop(mount);
    assert_becomes(&None, || pool.held_root());
}

/// Opens the file and queries its map again and again until the daemon is gone.
fn query_until_gone(file: &Path) {
    while let Ok(file) = fs::File::open(file) {
        if lseek(&file, 0, Whence::SeekHole).is_err() {
            return;
        }
    }
}

fn query_in_background(mount: &Mount) -> thread::JoinHandle<()> {
    let file = mount.file().to_owned();
    thread::spawn(move || query_until_gone(&file))
}

pub fn record(pool: &Pool) -> String {
    fs::read_to_string(Path::new(RECORDS).join(pool.dm().name())).unwrap_or_default()
}

/// Waits for the record of a snapshot. The daemon tries reads without a snapshot first.
fn wait_for_record(pool: &Pool, mount: &Mount, is_it: impl Fn(&str) -> bool) {
    let found = (0..6).any(|_| wait_until(|| is_it(&record(pool))));
    assert!(found, "no snapshot is taken: {}", mount.log());
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_kill_at_any_moment_leaves_no_metadata_snapshot() {
    const KILLS: u32 = 48;
    let pool = Pool::with_slow_commits(64 * MIB, BLOCK, 20, 10);
    while_it_commits(&pool, |thin| {
        let mut random = Random::new(2);
        for kill in 0..KILLS {
            let mut mount = Mount::new(thin.path());
            let queries = query_in_background(&mount);
            // The kill comes at any time from the reserve message until after the release.
            wait_for_record(&pool, &mount, |record| !record.is_empty());
            thread::sleep(Duration::from_millis(random.within(0..120)));
            mount.kill();
            queries.join().expect("the queries end with the daemon");
            drop(mount);
            let released = wait_until(|| pool.held_root().is_none());
            assert!(released, "kill {kill} left a snapshot, with the record {:?}", record(&pool));
        }
    });
    pool.thin_check();
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_kill_during_the_reserve_message_leaves_no_metadata_snapshot() {
    let pool = Pool::with_slow_commits(64 * MIB, BLOCK, 1, 50);
    while_it_commits(&pool, |thin| {
        for _ in 0..6 {
            let mut mount = Mount::new(thin.path());
            let queries = query_in_background(&mount);
            wait_for_record(&pool, &mount, |record| record.ends_with("wanted\n"));
            mount.kill();
            queries.join().expect("the queries end with the daemon");
            drop(mount);
            assert_becomes(&None, || pool.held_root());
            assert_becomes(&String::new(), || record(&pool));
        }
    });
    pool.thin_check();
}

/// The daemon ends during a slow read of the metadata, and the snapshot is released after its end.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn slow_metadata_does_not_delay_the_end_of_the_daemon() {
    let pool = Pool::with_slow_commits(192 * MIB, BLOCK, 20, 20);
    let wide = pool.thin(2, 512 * MIB);
    // Every other block, so that nodes hold few and there are many of them.
    let file = open_for_writing(wide.path());
    for block in (0..2400).step_by(2) {
        file.write_all_at(&[1; 512], block * BLOCK).expect("a write inside the device");
    }
    drop(file);
    while_it_commits(&pool, |_| {
        let path = pool.metadata().display();
        let table = |reads: u32| format!("0 {} delay {path} 0 {reads} {path} 0 20", sectors(pool.metadata()));
        // The nodes of a path in the tree are read one after the other.
        pool.slow_metadata().reload(&table(3000));
        let mut mount = Mount::new(wide.path());
        let queries = query_in_background(&mount);
        wait_for_record(&pool, &mount, |record| record.contains("held "));
        mount.terminate();
        let ended = wait_until(|| !mount.is_running());
        pool.slow_metadata().reload(&table(0));
        assert!(ended, "the daemon waits for a read of the metadata: {}\n{}", mount.stacks(), mount.log());
        queries.join().expect("the queries end with the daemon");
        drop(mount);
        assert_becomes(&None, || pool.held_root());
    });
    drop(wide);
    pool.thin_check();
}
