//! Writing to thin volumes through a mount: what is made zero is unmapped, and no byte is lost.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::common::check::check;
use crate::common::dm::{Dm, Pool, sectors};
use crate::common::image::{Image, write};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::common::written::Written;
use crate::common::{GIB, KIB, MIB, needs, run};

/// Bytes in a block of most pools here.
const BLOCK: u64 = 64 * KIB;
const SIZE: u64 = 8 * MIB;

/// Blocks of the pool that a volume has mapped.
fn mapped(thin: &Dm, block: u64) -> u64 {
    let status = thin.status();
    // start, length, target, mapped sectors, highest mapped sector
    let sectors: u64 = status.split_ascii_whitespace().nth(3).and_then(|word| word.parse().ok()).expect("a number");
    sectors * 512 / block
}

/// Makes ranges of a full volume zero. `slack` is the number of blocks that a discard may leave.
fn make_ranges_zero(block: u64, slack: u64) {
    let pool = Pool::with_zeroing(64 * MIB, block);
    let size = 40 * block + 5 * 512;
    let thin = pool.thin(0, size);
    let mut file = Written::new(thin.path());
    file.write(0..size);
    file.check();
    let mut expected = 41;
    assert_eq!(mapped(&thin, block), expected);
    for (range, blocks) in [
        // Inside of a block.
        (block / 4..block / 2, 0),
        // One byte more than whole blocks, exactly these, and one byte less.
        (2 * block - 1..4 * block + 1, 2),
        (5 * block..7 * block, 2),
        (8 * block + 1..11 * block - 1, 1),
        // Edges in blocks that are not mapped.
        (2 * block + 7..4 * block - 9, 0),
        (5 * block + 512..5 * block + 1024, 0),
        (5 * block + 5..5 * block + 6, 0),
    ] {
        file.zero(range.clone());
        expected -= blocks;
        let now = mapped(&thin, block);
        assert!((expected..=expected + slack).contains(&now), "{now} blocks, and not {expected}: {range:?}");
        expected = now;
    }
    file.check();
    // The last block is shorter than the others.
    file.zero(39 * block..size);
    assert!(mapped(&thin, block) <= expected - 1 + slack, "block 39");
    file.check();
    file.truncate();
    assert!(mapped(&thin, block) <= 1 + slack, "at most the last block, of which the volume has a part");
    file.check();
    drop(file);
    drop(thin);
    pool.thin_check();
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn what_is_made_zero_is_unmapped_and_edges_allocate_nothing() {
    needs!(root, programs["dmsetup", "thin_check"]);
    make_ranges_zero(BLOCK, 0);
    // The kernel divides a discard at a wrong place where the size of a block is no power of two (`bio_discard_limit`).
    make_ranges_zero(192 * KIB, 2);
}

/// The time does not depend on the length of the volume, but on what is mapped.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_large_volume_is_truncated_by_its_map() {
    needs!(root, programs["dmsetup"]);
    let pool = Pool::with_zeroing(64 * MIB, BLOCK);
    let thin = pool.thin(0, 1024 * GIB);
    for offset in [0, 5 * GIB, 700 * GIB, 1024 * GIB - 4096] {
        write(thin.path(), offset..offset + 4096);
    }
    let mount = Mount::writable(thin.path());
    let before = crate::common::check::bytes_read(thin.path());
    let start = std::time::Instant::now();
    drop(File::create(mount.file()).expect("it can be truncated"));
    println!("1 TiB: {:?}", start.elapsed());
    assert_eq!(mapped(&thin, BLOCK), 0);
    let read = crate::common::check::bytes_read(thin.path()) - before;
    assert!(read < 64 * MIB, "holes are not read: {read}");
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn snapshots_keep_the_bytes_that_are_made_zero() {
    needs!(root, programs["dmsetup"]);
    for pool in [Pool::with_zeroing(64 * MIB, BLOCK), Pool::new(64 * MIB, BLOCK)] {
        let thin = pool.thin(0, SIZE);
        write(thin.path(), 0..SIZE);
        let snapshot = pool.snapshot(1, &thin, 0);
        let before = std::fs::read(snapshot.path()).expect("it can be read");
        let mut file = Written::new(thin.path());
        file.zero(BLOCK - 1..5 * BLOCK + 1);
        file.write(10 * BLOCK + 100..10 * BLOCK + 200);
        file.zero(MIB..3 * MIB);
        file.check();
        file.truncate();
        assert_eq!(mapped(&thin, BLOCK), 0);
        assert_eq!(mapped(&snapshot, BLOCK), SIZE / BLOCK);
        file.check();
        let other = Mount::new(snapshot.path());
        check(other.file(), snapshot.path());
        assert!(std::fs::read(other.file()).expect("it can be read") == before, "the snapshot has changed");
    }
}

/// Unmapped blocks have the bytes of the origin: zeros are written, and only where the origin has other bytes.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn above_an_external_origin_zeros_are_written() {
    needs!(root, programs["dmsetup"]);
    let image = Image::with_data(4 * MIB, &[MIB..2 * MIB]);
    let origin = Loop::new(image.path());
    let before = std::fs::read(origin.path()).expect("it can be read");
    for pool in [Pool::with_zeroing(64 * MIB, BLOCK), Pool::new(64 * MIB, BLOCK)] {
        pool.dm().message("create_thin 0");
        let thin = pool.activate(0, SIZE, Some(origin.path()));
        let mut file = Written::new(thin.path());
        file.write(MIB + 5..MIB + 100);
        file.check();
        file.zero(512 * KIB..MIB + 512 * KIB);
        file.check();
        assert_eq!(mapped(&thin, BLOCK), 8);
        file.truncate();
        file.check();
        assert_eq!(mapped(&thin, BLOCK), 16);
        assert!(std::fs::read(origin.path()).expect("it can be read") == before, "the origin has changed");
    }
}

/// A volume of a pool in which every block has been used.
fn used_pool(block: u64, features: &'static [&'static str]) -> Pool {
    let size = 16 * MIB / block * block;
    let pool = Pool::with_features(size, block, features);
    let old = pool.thin(9, size);
    write(old.path(), 0..size);
    drop(old);
    pool.delete(9);
    pool
}

/// Writes of any size and offset, and checks that all other bytes are zeros.
fn write_here_and_there(file: &mut Written, size: u64, seed: u64) {
    let mut random = Random::new(Random::seed_or(seed));
    for _ in 0..60 {
        let start = random.within(0..size);
        let longest = [100, 5000, 200_000][usize::try_from(random.within(0..3)).expect("small")];
        let length = 1 + random.within(0..longest);
        let range = start..(start + length).min(size);
        if random.one_in(4) {
            file.zero(range);
        } else {
            file.write(range);
        }
        if random.one_in(5) {
            file.check_bytes();
        }
    }
    file.check();
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn old_bytes_of_a_pool_without_zeroing_are_never_visible() {
    needs!(root, programs["dmsetup"]);
    for block in [BLOCK, 192 * KIB, MIB] {
        let pool = used_pool(block, &["skip_block_zeroing", "error_if_no_space"]);
        let size = 8 * MIB + 3 * 512;
        let thin = pool.thin(0, size);
        let mut file = Written::new(thin.path());
        file.write(5 * block + 10..5 * block + 20);
        file.check();
        assert_eq!(mapped(&thin, block), 1);
        // The same block again, after it was discarded.
        file.zero(4 * block..7 * block);
        assert!(mapped(&thin, block) == 0 || !block.is_power_of_two());
        file.write(5 * block + 1000..5 * block + 3000);
        file.check();
        file.write(size - 100..size);
        file.check();
        write_here_and_there(&mut file, size, block);
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn old_bytes_are_not_visible_through_layers_above() {
    needs!(root, programs["dmsetup"]);
    let features = &["skip_block_zeroing", "error_if_no_space"];
    let pool = used_pool(BLOCK, features);
    let (first, second) = (pool.thin(0, 4 * MIB), pool.thin(1, 4 * MIB));
    let (one, two) = (first.path().display(), second.path().display());
    let half = 4 * MIB / 512;
    for table in [
        format!("0 {} linear {one} 72", half - 72),
        format!("0 {half} linear {one} 0\n{half} {half} linear {two} 0"),
        format!("0 {} striped 2 64 {one} 0 {two} 0", 2 * half),
        format!("0 {} striped 2 384 {one} 0 {two} 0", 2 * half / 768 * 768),
    ] {
        // The volumes are empty again.
        for thin in [&first, &second] {
            run("blkdiscard", [thin.path()]);
            assert_eq!(mapped(thin, BLOCK), 0);
        }
        let device = Dm::new(&table);
        let size = sectors(device.path()) * 512;
        let mut file = Written::new(device.path());
        file.write(700 * KIB + 5..700 * KIB + 10);
        file.check();
        assert_eq!(mapped(&first, BLOCK) + mapped(&second, BLOCK), 1, "{table}");
        write_here_and_there(&mut file, size, size);
        file.truncate();
        file.check();
        let left = mapped(&first, BLOCK) + mapped(&second, BLOCK);
        assert!(left <= 2, "{left} blocks that the device has only a part of: {table}");
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn discards_that_are_ignored_are_noticed() {
    needs!(root, programs["dmsetup"]);
    let ignoring = Pool::with_features(64 * MIB, BLOCK, &["ignore_discard", "error_if_no_space"]);
    let thin = ignoring.thin(0, SIZE);
    let mut file = Written::new(thin.path());
    file.write(MIB..2 * MIB);
    file.zero(0..MIB + 512 * KIB);
    file.check();
    file.truncate();
    file.check();
    assert_eq!(mapped(&thin, BLOCK), 16, "zeros were written to what was mapped, and to nothing else");
    drop(file);
    let keeping = Pool::with_features(64 * MIB, BLOCK, &["no_discard_passdown", "error_if_no_space"]);
    let thin = keeping.thin(0, SIZE);
    let mut file = Written::new(thin.path());
    file.write(MIB..2 * MIB);
    file.truncate();
    assert_eq!(mapped(&thin, BLOCK), 0);
    file.check();
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn layers_above_a_volume_unmap_its_blocks() {
    needs!(root, programs["dmsetup", "addpart"]);
    let pool = Pool::with_zeroing(64 * MIB, BLOCK);
    let (first, second) = (pool.thin(0, 4 * MIB), pool.thin(1, 4 * MIB));
    let (one, two) = (first.path().display(), second.path().display());
    let half = 4 * MIB / 512;
    for table in [
        format!("0 {half} linear {one} 0"),
        format!("0 {half} linear {one} 0\n{half} {half} linear {two} 0"),
        format!("0 {} striped 2 128 {one} 0 {two} 0", 2 * half),
    ] {
        let device = Dm::new(&table);
        let size = sectors(device.path()) * 512;
        let mut file = Written::new(device.path());
        file.write(0..size);
        file.check();
        assert_eq!(mapped(&first, BLOCK) + mapped(&second, BLOCK), size / BLOCK);
        file.zero(MIB - 1..2 * MIB + 1);
        file.check();
        assert_eq!(mapped(&first, BLOCK) + mapped(&second, BLOCK), size / BLOCK - 16, "{table}");
        file.truncate();
        file.check();
        assert_eq!(mapped(&first, BLOCK) + mapped(&second, BLOCK), 0, "{table}");
    }
}

/// A part of a discard is given up while the pool copies one of its blocks for a snapshot (`break_up_discard_bio`): what that leaves
/// is found, and the neighbours keep their bytes.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn ranges_are_zeros_although_their_blocks_are_in_use() {
    needs!(root, programs["dmsetup"]);
    let pool = Pool::with_zeroing(64 * MIB, BLOCK);
    let thin = pool.thin(0, SIZE);
    let mut file = Written::new(thin.path());
    for round in 0..8 {
        file.write(0..SIZE);
        // Odd rounds: a snapshot shares the blocks, and is written.
        let snapshot = (round % 2 == 1).then(|| pool.snapshot(1, &thin, 0));
        let busy = Busy::new(snapshot.as_ref().unwrap_or(&thin).path(), 0..SIZE, snapshot.is_some());
        file.zero(MIB + round..3 * MIB - round);
        file.zero(4 * MIB..6 * MIB);
        drop(busy);
        file.check_bytes();
        if snapshot.is_some() {
            drop(snapshot);
            pool.delete(1);
        }
    }
    file.check();
}

/// A thread that reads or writes blocks of a device all the time.
struct Busy {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Busy {
    fn new(device: &Path, range: std::ops::Range<u64>, writes: bool) -> Self {
        use std::os::unix::fs::OpenOptionsExt as _;
        let device = std::fs::OpenOptions::new()
            .read(true)
            .write(writes)
            .custom_flags(libc::O_DIRECT)
            .open(device)
            .expect("it opens");
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut memory = vec![0; 8192];
            let skipped = memory.as_ptr().align_offset(4096);
            let mut random = Random::new(1);
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                let at = range.start + random.within(0..(range.end - range.start) / 4096) * 4096;
                let block = &mut memory[skipped..skipped + 4096];
                if writes {
                    device.write_all_at(block, at).expect("the device can be written");
                } else {
                    device.read_exact_at(block, at).expect("the device can be read");
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let ended = self.thread.take().expect("it runs").join();
        assert!(ended.is_ok() || std::thread::panicking(), "a read or write failed");
    }
}

/// A counter of `/sys/dev/block/*/stat`.
fn counter(device: &Path, index: usize) -> u64 {
    let text = std::fs::read_to_string(crate::common::check::sysfs(device).join("stat")).expect("it has counters");
    text.split_whitespace().nth(index).and_then(|word| word.parse().ok()).expect("a counter")
}

/// The discards of a device so far, and how often its map was read.
fn discards_and_loads(thin: &Dm, mount: &Mount) -> (u64, usize) {
    (counter(thin.path(), 11), mount.log().matches(": new map").count())
}

/// What a program does that restores a sparse image: it empties the file, writes data, and makes the holes between.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn holes_of_an_empty_volume_are_not_made_again() {
    needs!(root, programs["dmsetup", "cp"]);
    let pool = Pool::with_zeroing(64 * MIB, BLOCK);
    let size = 64 * GIB;
    let thin = pool.thin(0, size);
    let mut data = Vec::new();
    for n in 0..100 {
        // Most of them begin and end inside of a block.
        let start = n * 640 * MIB + n * 4 * KIB;
        data.push(start..start + 4 * KIB * (1 + n % 20));
    }
    let image = Image::with_data(size, &data);
    write(thin.path(), 0..4096);
    let mount = Mount::writable(thin.path());
    // The map is kept as long as the file is open.
    let _emptied = File::create(mount.file()).expect("it can be truncated");
    assert_eq!(mapped(&thin, BLOCK), 0);
    let before = discards_and_loads(&thin, &mount);
    let start = std::time::Instant::now();
    run("cp", ["--sparse=always".as_ref(), image.path().as_os_str(), mount.file().as_os_str()]);
    println!("64 GiB: {:?}", start.elapsed());
    let after = discards_and_loads(&thin, &mount);
    let blocks: u64 = data.iter().map(|range| range.end.div_ceil(BLOCK) - range.start / BLOCK).sum();
    assert_eq!(mapped(&thin, BLOCK), blocks);
    let (shown, original) = (File::open(mount.file()).expect("it opens"), File::open(image.path()).expect("it opens"));
    for range in &data {
        let around = range.start.saturating_sub(BLOCK)..(range.end + BLOCK).min(size);
        let [mut bytes, mut expected] =
            [(); 2].map(|()| vec![0; usize::try_from(around.end - around.start).expect("small")]);
        shown.read_exact_at(&mut bytes, around.start).expect("it can be read");
        original.read_exact_at(&mut expected, around.start).expect("it can be read");
        assert!(bytes == expected, "{range:?}");
    }
    assert_eq!(after.0 - before.0, 0, "discards");
    assert!(after.1 - before.1 <= 3, "{} loads of the map", after.1 - before.1);
}
