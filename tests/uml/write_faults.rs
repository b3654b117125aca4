//! Faults of devices and pools while files of a mount are written: each error is reported, in bounded time, and what was
//! acknowledged is on the device.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::common::check::{check, seek_data, seek_hole};
use crate::common::dm::{Dm, Pool, sectors};
use crate::common::history::{History, SECTOR, pattern};
use crate::common::image::{Image, open_rw, try_punch};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::common::scsi::ScsiDisk;
use crate::common::{KIB, MIB, run, wait_until};

const SIZE: u64 = 8 * MIB;
const BLOCK: u64 = 64 * KIB;
const WRITERS: u64 = 8;

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// The record of the operations on one file, which several threads write.
struct Record {
    history: Mutex<History>,
    acknowledged: AtomicU64,
}

impl Record {
    fn new() -> Self {
        Self { history: Mutex::new(History::new(SIZE)), acknowledged: AtomicU64::new(0) }
    }

    fn write(&self, file: &File, range: &Range<u64>) -> io::Result<()> {
        let operation = self.history.lock().expect("no writer panics").begin(range, false);
        let written = file.write_all_at(&pattern(range, operation), range.start);
        match written {
            Ok(()) => _ = self.acknowledged.fetch_add(1, Ordering::SeqCst),
            Err(_) => self.history.lock().expect("no writer panics").fail(range, operation),
        }
        written
    }

    fn punch(&self, file: &File, range: &Range<u64>) -> io::Result<()> {
        let operation = self.history.lock().expect("no writer panics").begin(range, true);
        let punched = try_punch(file, range);
        if punched.is_err() {
            self.history.lock().expect("no writer panics").fail(range, operation);
        }
        punched
    }

    /// Writes to its part of the file, at random, until an error. Returns the error.
    fn write_until_error(&self, file: &File, number: u64) -> io::Error {
        let mut random = Random::new(number + 1);
        let start = SIZE / WRITERS * number;
        loop {
            let range = random.range(SIZE / WRITERS, SECTOR);
            if let Err(error) = self.write(file, &(start + range.start..start + range.end)) {
                return error;
            }
        }
    }

    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    fn check(&self, device: &Path) {
        self.history.lock().expect("no writer panics").check(device);
    }
}

/// Writes with several threads, calls `fault` after some writes, and returns the errors of all threads.
fn errors_after(record: &Record, file: &File, fault: impl FnOnce()) -> Vec<io::Error> {
    let enough = record.acknowledged() + 20;
    thread::scope(|scope| {
        let writers: Vec<_> =
            (0..WRITERS).map(|number| scope.spawn(move || record.write_until_error(file, number))).collect();
        assert!(wait_until(|| record.acknowledged() >= enough), "the writers do not go on");
        fault();
        assert!(wait_until(|| writers.iter().all(thread::ScopedJoinHandle::is_finished)), "a writer waits");
        writers.into_iter().map(|writer| writer.join().expect("no writer panics")).collect()
    })
}

/// A pool whose data device can be made longer.
struct GrowingPool {
    pool: Dm,
    data: Dm,
    disk: Loop,
    metadata: Loop,
    features: &'static str,
    _images: [Image; 2],
}

impl GrowingPool {
    /// A pool with `size` bytes of data.
    fn new(size: u64, features: &'static str) -> Self {
        let images = [Image::new(SIZE), Image::new(2 * MIB)];
        let (disk, metadata) = (Loop::new(images[0].path()), Loop::new(images[1].path()));
        let data = Dm::new(&Self::data_table(size, &disk));
        let pool = Dm::new(&Self::table(size, &metadata, &data, features));
        Self { pool, data, disk, metadata, features, _images: images }
    }

    fn data_table(size: u64, disk: &Loop) -> String {
        format!("0 {} linear {} 0", size / SECTOR, disk.path().display())
    }

    fn table(size: u64, metadata: &Loop, data: &Dm, features: &str) -> String {
        let (metadata, data) = (metadata.path().display(), data.path().display());
        format!("0 {} thin-pool {metadata} {data} {} 0 {features}", size / SECTOR, BLOCK / SECTOR)
    }

    fn grow(&self, size: u64) {
        self.data.reload(&Self::data_table(size, &self.disk));
        self.pool.reload(&Self::table(size, &self.metadata, &self.data, self.features));
    }

    fn volume(&self, id: u32) -> Dm {
        self.pool.message(&format!("create_thin {id}"));
        Dm::new(&format!("0 {} thin {} {id}", SIZE / SECTOR, self.pool.path().display()))
    }
}

/// A directory that shows the devices under the names `0`, `1` and so on.
fn directory_of(devices: &[&Path]) -> tempfile::TempDir {
    let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    for (number, device) in devices.iter().enumerate() {
        symlink(device, directory.path().join(number.to_string())).expect("the directory is ours");
    }
    directory
}

/// Writes whole blocks in order until an error. Returns the block that was not written, and the error.
fn fill_pool(record: &Record, file: &File) -> (u64, io::Error) {
    for block in 0..SIZE / BLOCK {
        if let Err(error) = record.write(file, &(block * BLOCK..(block + 1) * BLOCK)) {
            return (block, error);
        }
    }
    panic!("the pool has space for all of the volume");
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_full_pool_fails_writes_that_need_a_block_and_nothing_else() {
    let pool = GrowingPool::new(2 * MIB, "1 error_if_no_space");
    let (thin, other) = (pool.volume(0), pool.volume(1));
    let names = directory_of(&[thin.path(), other.path()]);
    let mount = Mount::writable(names.path());
    let [file, other_file] = ["0", "1"].map(|name| open_rw(&mount.directory().join(name)));
    let (record, of_other) = (Record::new(), Record::new());
    of_other.write(&other_file, &(0..BLOCK)).expect("the pool has space");
    let (full, error) = fill_pool(&record, &file);
    assert_eq!((full, error.raw_os_error()), (2 * MIB / BLOCK - 1, Some(libc::ENOSPC)));
    file.sync_all().expect("nothing that was acknowledged is lost");

    // What needs no new block works.
    record.write(&file, &(3 * BLOCK + 512..5 * BLOCK)).expect("the blocks are mapped");
    of_other.write(&other_file, &(0..BLOCK)).expect("the block is mapped");
    assert_eq!(seek_hole(&other_file, 0), Some(BLOCK));
    assert_eq!(seek_data(&file, full * BLOCK), None);
    assert_eq!(errno(of_other.write(&other_file, &(MIB..MIB + 512))), Some(libc::ENOSPC));
    record.punch(&file, &(full * BLOCK..SIZE)).expect("it is zero already");

    // Zeros give blocks back, which can be used again.
    record.punch(&file, &(BLOCK..3 * BLOCK)).expect("a full pool takes blocks back");
    let again = wait_until(|| record.write(&file, &(full * BLOCK..full * BLOCK + 512)).is_ok());
    assert!(again, "the freed blocks cannot be used: {}", pool.pool.status());
    file.sync_all().expect("a flush");
    record.check(thin.path());

    // A pool that was extended takes writes again.
    let (_, error) = fill_pool(&record, &file);
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    pool.grow(4 * MIB);
    record.write(&file, &(full * BLOCK..(full + 8) * BLOCK)).expect("the pool has space");
    file.sync_all().expect("a flush");
    record.check(thin.path());
    of_other.check(other.path());
    drop((file, other_file));
    check(&mount.directory().join("0"), thin.path());
}

/// The time after which a pool without space fails what waits for it, in seconds. Dropping this value sets the kernel's default.
struct NoSpaceTimeout;

impl NoSpaceTimeout {
    const PATH: &str = "/sys/module/dm_thin_pool/parameters/no_space_timeout";

    fn new(seconds: u32) -> Self {
        fs::write(Self::PATH, seconds.to_string()).expect("a parameter of the module");
        Self
    }
}

impl Drop for NoSpaceTimeout {
    fn drop(&mut self) {
        let _ = fs::write(Self::PATH, "60");
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn writes_to_a_full_pool_that_queues_wait_and_other_requests_do_not() {
    let timeout = NoSpaceTimeout::new(60);
    let pool = GrowingPool::new(2 * MIB, "0");
    let (thin, other) = (pool.volume(0), pool.volume(1));
    let names = directory_of(&[thin.path(), other.path()]);
    let mount = Mount::writable(names.path());
    let [file, other_file] = ["0", "1"].map(|name| open_rw(&mount.directory().join(name)));
    let (record, of_other) = (Record::new(), Record::new());
    of_other.write(&other_file, &(0..BLOCK)).expect("the pool has space");
    let mapped = 2 * MIB / BLOCK - 1;
    record.write(&file, &(0..mapped * BLOCK)).expect("the pool has space");
    // More writes than the mount has threads for.
    let waiting = |first: u64, extend: &dyn Fn()| -> Vec<Option<i32>> {
        thread::scope(|scope| {
            let (record, file) = (&record, &file);
            let writers: Vec<_> = (first..first + 12)
                .map(|block| scope.spawn(move || errno(record.write(file, &(block * BLOCK..block * BLOCK + 4096)))))
                .collect();
            let out_of_space = wait_until(|| pool.pool.status().contains("out_of_data_space"));
            assert!(out_of_space, "{}", pool.pool.status());
            of_other.write(&other_file, &(512..BLOCK)).expect("the block is mapped");
            assert_eq!(seek_hole(&other_file, 0), Some(BLOCK));
            extend();
            writers.into_iter().map(|writer| writer.join().expect("no writer panics")).collect()
        })
    };
    let done = waiting(mapped, &|| pool.grow(3 * MIB));
    assert_eq!(done, [None; 12], "writes that waited until the pool was extended");
    file.sync_all().expect("a flush");
    record.check(thin.path());

    drop(timeout);
    let _timeout = NoSpaceTimeout::new(2);
    let used = 3 * MIB / BLOCK - 1;
    record.write(&file, &(mapped * BLOCK..used * BLOCK)).expect("the pool has space");
    let failed = waiting(used, &|| {});
    assert_eq!(failed, [Some(libc::ENOSPC); 12], "writes that waited until the timeout");
    pool.grow(4 * MIB);
    record.write(&file, &(used * BLOCK..used * BLOCK + 4096)).expect("the pool has space");
    file.sync_all().expect("a flush");
    record.check(thin.path());
    of_other.check(other.path());
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn an_error_in_the_middle_of_a_write_is_reported_and_what_is_before_it_is_counted() {
    let image = Image::new(SIZE);
    let disk = Loop::new(image.path());
    let path = disk.path().display();
    let all = SIZE / SECTOR;
    let (bad, good) = (MIB / SECTOR + 1, MIB / SECTOR + 9);
    let broken = format!("0 {bad} linear {path} 0\n{bad} 8 error\n{good} {} linear {path} {good}", all - good);
    let device = Dm::new(&broken);
    let whole = format!("0 {all} linear {path} 0");
    let mount = Mount::writable(device.path());
    let file = open_rw(mount.file());
    // The errors are sectors of the second MiB, and the range ends in the third.
    for (start, end) in [(0, 3 * MIB), (MIB, 2 * MIB), (MIB - 512, MIB + 8192), (MIB + 512, MIB + 1024)] {
        let mut history = History::new(SIZE);
        device.reload(&whole);
        let old = history.begin(&(0..SIZE), false);
        file.write_all_at(&pattern(&(0..SIZE), old), 0).expect("the device works");
        device.reload(&broken);
        let operation = history.begin(&(start..end), false);
        let written = match file.write_at(&pattern(&(start..end), operation), start) {
            Ok(count) => count as u64,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EIO));
                0
            }
        };
        assert!(start + written <= bad * SECTOR, "{written} bytes of {start}..{end} were counted");
        history.fail(&(start..end), operation);
        // What was counted is certain.
        let counted = start..(start + written) / SECTOR * SECTOR;
        if counted.start < counted.end {
            history.succeed_in(&counted, operation);
        }
        device.reload(&whole);
        history.check(device.path());
    }
    device.reload(&broken);
    assert_eq!(errno(file.write_at(&[1; 512], MIB + 512)), Some(libc::EIO));
    assert_eq!(errno(try_punch(&file, &(MIB..2 * MIB))), Some(libc::EIO));
    file.write_all_at(&[1; 512], 4 * MIB).expect("the rest of the device works");
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_device_that_fails_for_a_while_fails_writes_and_loses_none_that_was_acknowledged() {
    let image = Image::new(SIZE);
    let disk = Loop::new(image.path());
    let device = Dm::linear(disk.path());
    let mount = Mount::writable(device.path());
    let file = open_rw(mount.file());
    let record = Record::new();
    for _ in 0..5 {
        let failed = errors_after(&record, &file, || device.reload(&format!("0 {} error", SIZE / SECTOR)));
        for error in failed {
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
        }
        assert_eq!(errno(record.punch(&file, &(0..MIB))), Some(libc::EIO));
        device.reload(&format!("0 {} linear {} 0", SIZE / SECTOR, disk.path().display()));
        record.write(&file, &(0..4096)).expect("the device works again");
        file.sync_all().expect("a flush");
        record.check(device.path());
    }
    println!("{} writes were acknowledged before the device failed, none of them lost", record.acknowledged());
    drop(file);
    check(mount.file(), device.path());
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn writes_to_a_suspended_device_wait_and_succeed() {
    const COUNT: u64 = 24;
    let images = [Image::new(SIZE), Image::new(SIZE)];
    let disks = [Loop::new(images[0].path()), Loop::new(images[1].path())];
    let (device, other) = (Dm::linear(disks[0].path()), Dm::linear(disks[1].path()));
    let names = directory_of(&[device.path(), other.path()]);
    let mount = Mount::writable(names.path());
    let [file, other_file] = ["0", "1"].map(|name| open_rw(&mount.directory().join(name)));
    let record = Record::new();
    record.write(&file, &(0..SIZE / 2)).expect("the device works");
    device.suspend();
    let (done, seeks_done) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for number in 0..COUNT {
            let (record, file, done) = (&record, &file, &done);
            scope.spawn(move || {
                let range = number * 300 * KIB..number * 300 * KIB + 8704;
                record.write(file, &range).expect("the device is resumed");
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        // The kernel lets a seek wait for the writes of the same file in progress (`fuse_file_llseek`).
        scope.spawn(|| {
            other_file.write_all_at(&[1; 4096], 0).expect("another device is written");
            assert_eq!(seek_hole(&other_file, 0), Some(4096));
            assert!(fs::metadata(mount.directory().join("0")).is_ok());
            seeks_done.store(true, Ordering::SeqCst);
        });
        let not_blocked = wait_until(|| seeks_done.load(Ordering::SeqCst));
        let done = done.load(Ordering::SeqCst);
        device.resume();
        assert!(not_blocked, "a request for another device waited for the resume");
        assert_eq!(done, 0, "writes that ended while the device was suspended");
    });
    assert_eq!(done.into_inner(), COUNT);
    record.check(device.path());
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_disk_that_is_pulled_out_fails_writes() {
    let disk = ScsiDisk::new(SIZE / MIB, &[]);
    let mount = Mount::writable(disk.path());
    let file = open_rw(mount.file());
    let record = Record::new();
    let failed = errors_after(&record, &file, || disk.pull_out());
    for error in failed {
        assert!(matches!(error.raw_os_error(), Some(libc::EIO | libc::ENODEV | libc::ENXIO)), "{error}");
    }
    assert!(matches!(errno(file.sync_all()), Some(libc::EIO | libc::ENODEV | libc::ENXIO)));
    drop(file);
    drop(mount);
}

/// Of each flush that fails, the error is reported, and a later flush that succeeds reports none.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_flush_that_fails_is_reported_each_time() {
    let image = Image::new(SIZE);
    let disk = Loop::new(image.path());
    let device = Dm::linear(disk.path());
    let mount = Mount::writable(device.path());
    let file = open_rw(mount.file());
    let record = Record::new();
    record.write(&file, &(0..MIB)).expect("the device works");
    let (size, path) = (sectors(disk.path()), disk.path().display());
    run("modprobe", ["dm-flakey"]);
    // It is never up: flushes are writes without bytes, and fail as all writes.
    device.reload(&format!("0 {size} flakey {path} 0 0 1 1 error_writes"));
    for _ in 0..2 {
        assert_eq!(errno(file.sync_all()), Some(libc::EIO));
        assert_eq!(errno(file.sync_data()), Some(libc::EIO));
    }
    assert_eq!(errno(record.write(&file, &(0..4096))), Some(libc::EIO));
    device.reload(&format!("0 {size} linear {path} 0"));
    file.sync_all().expect("the device works again");
    record.check(device.path());
}

/// The metadata snapshot of the daemon is released, and the volume has what was acknowledged.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_kill_during_writes_to_a_thin_volume_loses_nothing_that_was_acknowledged() {
    let pool = Pool::with_zeroing(2 * SIZE, BLOCK);
    let thin = pool.thin(0, SIZE);
    let record = Record::new();
    let mut random = Random::new(Random::seed_or(1));
    for _ in 0..6 {
        let mut mount = Mount::writable(thin.path());
        let file = open_rw(mount.file());
        let path = mount.file().to_owned();
        let enough = record.acknowledged() + random.within(1..40);
        let seeks = thread::spawn(move || {
            while let Ok(file) = File::open(&path) {
                if nix::unistd::lseek(&file, 0, nix::unistd::Whence::SeekHole).is_err() {
                    return;
                }
            }
        });
        let failed = errors_after(&record, &file, || {
            let _ = wait_until(|| record.acknowledged() >= enough);
            mount.kill();
        });
        seeks.join().expect("the seeks end with the daemon");
        for error in failed {
            // EIO is of a write of which a part was done (`fuse_get_res_by_io` of `fs/fuse/file.c`).
            assert!(matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::ENOTCONN | libc::EIO)), "{error}");
        }
        drop(file);
        drop(mount);
        assert!(wait_until(|| pool.held_root().is_none()), "the metadata snapshot is still held");
        record.check(thin.path());
    }
    println!("6 kills, {} acknowledged writes, none of them lost", record.acknowledged());
    let mount = Mount::writable(thin.path());
    check(mount.file(), thin.path());
    drop(mount);
    drop(thin);
    pool.thin_check();
}
