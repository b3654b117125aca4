//! Loss of power at any moment while a file of a mount is written.
//!
//! Each test logs what is written to the disk below, and then makes the disk anew as it may be after a loss of power: with all
//! that was written before a flush, and any part of the rest.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use crate::common::dm::{Dm, sectors};
use crate::common::history::{Counts, History, Operation, SECTOR, pattern, write_unrelated};
use crate::common::image::{Image, open_for_writing, try_punch};
use crate::common::log_writes::{Entry, LoggedDevice, apply_some};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::random::{Length, Random};
use crate::common::{KIB, MIB, run};

/// The volume, or the image.
const SIZE: u64 = 4 * MIB;
const BLOCK: u64 = 64 * KIB;
const METADATA: u64 = MIB;
/// The data of a pool. A volume and its snapshot fit, and few blocks are left, so that freed blocks are used again.
const DATA: u64 = 9 * MIB;
/// The rounds of a test. Each ends with a flush, and with the record of what must be on the disk from then on.
const ROUNDS: u64 = 20;
const CUTS: u64 = 60;
/// One of so many disks is also examined by the kernel.
const BY_KERNEL: u64 = 10;
const WRITERS: u64 = 3;
const STRIPE: u64 = 6 * KIB;

/// A pool whose metadata and data are parts of one disk, so that one log has the order of all writes.
struct PoolOnDisk {
    pool: Dm,
    metadata: Dm,
    _data: Dm,
}

impl PoolOnDisk {
    fn new(disk: &Path, features: &str) -> Self {
        let part = |start: u64, size: u64| Dm::new(&format!("0 {size} linear {} {start}", disk.display()));
        let (metadata, data) = (part(0, METADATA / SECTOR), part(METADATA / SECTOR, DATA / SECTOR));
        let (from, to) = (metadata.path().display(), data.path().display());
        let pool =
            Dm::new(&format!("0 {} thin-pool {from} {to} {} 0 {features}", sectors(data.path()), BLOCK / SECTOR));
        Self { pool, metadata, _data: data }
    }

    fn volume(&self, id: u32) -> Dm {
        Dm::new(&format!("0 {} thin {} {id}", SIZE / SECTOR, self.pool.path().display()))
    }

    fn thin_check(self) {
        drop(self.pool);
        run("thin_check", ["--quiet".as_ref(), self.metadata.path().as_os_str()]);
    }
}

/// The operations of a test on one file, and the record of them.
struct Restore<'a> {
    file: &'a Path,
    disk: &'a LoggedDevice,
    history: Mutex<History>,
}

impl Restore<'_> {
    /// Begins an operation, and calls `work` with its bytes.
    fn operate(&self, file: &File, range: &Range<u64>, is_zero: bool) {
        let operation = self.history.lock().expect("no writer panics").begin(range, is_zero);
        let done =
            if is_zero { try_punch(file, range) } else { file.write_all_at(&pattern(range, operation), range.start) };
        done.unwrap_or_else(|error| panic!("{range:?}: {error}"));
    }

    /// Opens the file for writing. With `truncate`, all of it becomes zeros.
    fn open(&self, truncate: bool, flags: i32) -> File {
        if truncate {
            self.history.lock().expect("no writer panics").begin(&(0..SIZE), true);
        }
        OpenOptions::new().write(true).truncate(truncate).custom_flags(flags).open(self.file).expect("it opens")
    }

    /// Writes, in one of several ways, until all of it is flushed, and records that. The file is still open then, if it is flushed
    /// by something else than its last close.
    fn round(&self, random: &mut Random) {
        let truncate = random.one_in(8);
        let way = random.within(0..5);
        let file = self.open(truncate, if way == 0 { libc::O_DSYNC } else { 0 });
        match way {
            // Each write is on the disk when it returns.
            0 => {
                if truncate {
                    file.sync_all().expect("a flush");
                }
                for _ in 0..random.within(1..4) {
                    self.operate(&file, &random.range(SIZE, SECTOR), false);
                }
            }
            // Another open of the file flushes what this one has written.
            1 => {
                self.some_operations(&file, random);
                File::open(self.file).and_then(|reader| reader.sync_all()).expect("a flush");
            }
            // Another program flushes after the last close.
            2 => {
                self.some_operations(&file, random);
                drop(file);
                run("sync", ["--data".as_ref(), self.file.as_os_str()]);
                return self.settle();
            }
            3 => {
                self.some_operations(&file, random);
                file.sync_data().expect("a flush");
            }
            // Several writers write to the same blocks.
            _ => {
                let seed = random.next();
                thread::scope(|scope| {
                    for number in 0..WRITERS {
                        let file = &file;
                        scope.spawn(move || self.write_stripes(file, number, seed));
                    }
                });
                file.sync_all().expect("a flush");
            }
        }
        self.settle();
    }

    fn some_operations(&self, file: &File, random: &mut Random) {
        for _ in 0..random.within(1..8) {
            let is_zero = random.one_in(4);
            self.operate(file, &random.range(SIZE, SECTOR), is_zero);
        }
    }

    fn write_stripes(&self, file: &File, number: u64, seed: u64) {
        let mut random = Random::new(seed + number);
        for _ in 0..10 {
            let start = (random.within(0..SIZE / STRIPE / WRITERS) * WRITERS + number) * STRIPE;
            let range = random.range(STRIPE, SECTOR);
            self.operate(file, &(start + range.start..start + range.end), random.one_in(8));
        }
    }

    /// Records in the log that all operations that have begun are on the disk.
    fn settle(&self) {
        let last = self.history.lock().expect("no writer panics").last();
        self.disk.mark(&format!("settled-{last}"));
    }
}

/// A moment of a loss of power.
struct Cut<'a> {
    disk: &'a [u8],
    /// The last operation of which everything must be there.
    settled: Operation,
    /// The last operation of which something may be there.
    begun: Operation,
}

/// Calls `examine` with the disk as it may be after a loss of power, at `CUTS` moments after the first mark.
fn cut(log: &[Entry], mut disk: Vec<u8>, random: &mut Random, mut examine: impl FnMut(&Cut) -> Result<Counts, String>) {
    let settled = |entry: &Entry| match entry {
        Entry::Mark(text) => text.strip_prefix("settled-").map(|number| number.parse().expect("a number")),
        _ => None,
    };
    let first = log.iter().position(|entry| settled(entry).is_some()).expect("a mark");
    let cuts = Length::rounds(CUTS).numbers().map(|_| random.within(first as u64..log.len() as u64));
    let mut cuts: Vec<_> = cuts.map(|at| usize::try_from(at).expect("small")).collect();
    cuts.sort_unstable();
    let (mut flushed, mut sum) = (0, Counts::default());
    for &at in &cuts {
        // What is before the last flush is on the disk.
        let flush = log[..=at].iter().rposition(|entry| matches!(entry, Entry::Flush)).unwrap_or(0);
        for entry in &log[flushed..flush.max(flushed)] {
            entry.apply(&mut disk);
        }
        flushed = flush.max(flushed);
        let end = log[flushed + 1..].iter().position(|entry| matches!(entry, Entry::Flush));
        let end = end.map_or(log.len(), |end| flushed + 1 + end);
        let mut after = disk.clone();
        apply_some(&log[flushed..end], &mut after, random);
        // A write is in the log where the flush after it is, so those up to `end` may have begun after the marks before it. The
        // flush that a mark is about is before the mark.
        let before = log[..end].iter().rev().find_map(settled).unwrap_or(0);
        let begun = log[end..].iter().find_map(settled).unwrap_or(Operation::MAX);
        let counts = examine(&Cut { disk: &after, settled: before, begun });
        let counts = counts.unwrap_or_else(|error| panic!("entry {at}, after operation {before}: {error}"));
        sum.settled += counts.settled;
        sum.later += counts.later;
        sum.mixed += counts.mixed;
        sum.discarded += counts.discarded;
    }
    println!("{} losses of power, nothing lost that was flushed, no unrelated bytes: {sum:?}", cuts.len());
}

/// Writes to a thin volume with a snapshot, and cuts the power of the disk of the pool.
fn cut_pool(features: &str, seed: u64) {
    let mut random = Random::new(Random::seed_or(seed));
    let image = Image::new(METADATA + DATA);
    write_unrelated(&open_for_writing(image.path()), METADATA..METADATA + DATA);
    let before = std::fs::read(image.path()).expect("the image is there");
    let disk = LoggedDevice::new(&image);
    let pool = PoolOnDisk::new(disk.path(), features);
    pool.pool.message("create_thin 0");
    let thin = pool.volume(0);
    let mut history = History::new(SIZE);
    let old = File::options().write(true).open(thin.path()).expect("the device opens");
    // Whole blocks: a pool without zeroing leaves what was there before in the rest of a block.
    for _ in 0..6 {
        let range = random.range(SIZE, BLOCK);
        let operation = history.begin(&range, false);
        old.write_all_at(&pattern(&range, operation), range.start).expect("a write inside the device");
    }
    old.sync_all().expect("a flush");
    drop(old);
    let snapshot = history.clone();
    thin.suspend();
    pool.pool.message("create_snap 1 0");
    thin.resume();

    let mount = Mount::writable(thin.path());
    let restore = Restore { file: mount.file(), disk: &disk, history: Mutex::new(history) };
    // A message that changes the metadata is on the disk when it returns.
    restore.settle();
    for _ in 0..ROUNDS {
        restore.round(&mut random);
    }
    let history = restore.history.into_inner().expect("no writer panics");
    drop(mount);
    history.check(thin.path());
    drop(thin);
    pool.thin_check();
    let log = disk.into_log();

    let after = Image::new(METADATA + DATA);
    let device = Loop::new(after.path());
    let metadata = Loop::with_options(after.path(), &[&format!("--sizelimit={METADATA}")]);
    let mut cuts = 0;
    cut(&log, before, &mut random, |cut| {
        cuts += 1;
        let is_for_kernel = cuts % BY_KERNEL == 0;
        let needed = if is_for_kernel { cut.disk } else { &cut.disk[..usize::try_from(METADATA).expect("small")] };
        open_for_writing(after.path()).write_all_at(needed, 0).expect("the image is ours");
        if is_for_kernel {
            let pool = PoolOnDisk::new(device.path(), features);
            history.compare_device(pool.volume(0).path(), cut.settled, cut.begun)?;
            snapshot.check(pool.volume(1).path());
            pool.thin_check();
        }
        let [volume, snapshot_of_it] = volumes(cut.disk, &metadata);
        snapshot.compare(&snapshot_of_it, snapshot.last(), snapshot.last())?;
        history.compare(&volume, cut.settled, cut.begun)
    });
}

/// The bytes of the volumes 0 and 1 of a pool on a disk, of which `metadata` is the first part.
fn volumes(disk: &[u8], metadata: &Loop) -> [Vec<u8>; 2] {
    let dump = run("thin_dump", [metadata.path()]);
    let data = &disk[usize::try_from(METADATA).expect("small")..];
    let mut volumes = [(); 2].map(|()| vec![0; usize::try_from(SIZE).expect("small")]);
    let mut device = 0;
    for line in dump.lines() {
        let number = |name: &str| -> Option<usize> {
            let (_, value) = line.split_once(&format!(" {name}=\""))?;
            value.split_once('"')?.0.parse().ok()
        };
        device = number("dev_id").unwrap_or(device);
        let single = number("origin_block").zip(number("data_block")).zip(Some(1));
        let range = number("origin_begin").zip(number("data_begin")).zip(number("length"));
        let Some(((from, to), length)) = single.or(range) else { continue };
        let bytes = |block: usize| block * usize::try_from(BLOCK).expect("small");
        volumes[device][bytes(from)..bytes(from + length)].copy_from_slice(&data[bytes(to)..bytes(to + length)]);
    }
    volumes
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_thin_volume_has_what_was_flushed_after_a_loss_of_power() {
    cut_pool("1 error_if_no_space", 1);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_thin_volume_of_a_pool_without_zeroing_has_what_was_flushed_after_a_loss_of_power() {
    cut_pool("2 error_if_no_space skip_block_zeroing", 2);
}
