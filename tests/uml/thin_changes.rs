//! What changed between two thin volumes, on live pools and after they were deactivated: the older bytes and the
//! changes give the newer bytes.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use blkholefs::testing::map::{ExtentKind, HoleMap as _};
use blkholefs::testing::source::changes::{self, Changes};
use blkholefs::testing::source::thin::ThinId;
use blkholefs::testing::source::thin::offline::OfflinePool;
use blkholefs::testing::source::{BlockDevice, Context};
use blkholefs::testing::units::Bytes;

use crate::common::dm::{Dm, Pool};
use crate::common::image::{Image, discard, open_for_writing};
use crate::common::loop_device::Loop;
use crate::common::random::{Random, seeds};
use crate::common::{KIB, MIB};

/// A context for readings that change nothing in the pool.
fn context() -> Context {
    Context { no_metadata_snapshots: true, ..Context::default() }
}

fn between(older: &Path, newer: &Path) -> Result<Changes, String> {
    let [older, newer] = [older, newer].map(|path| BlockDevice::open(path).expect("the device opens"));
    changes::between(&older, &newer, &context()).map_err(|error| error.to_string())
}

/// What was found in one comparison, in bytes.
#[derive(Default)]
struct Totals {
    data: u64,
    zeros: u64,
    unchanged: u64,
}

/// Checks that the older bytes and the changes give the newer bytes, and adds up what was found.
fn check(older: &[u8], newer: &[u8], changes: &Changes, totals: &mut Totals) {
    let map = &changes.map;
    assert_eq!(map.len().get(), newer.len() as u64);
    let mut at = 0;
    while at < newer.len() {
        let extent = map.extent_at(Bytes::new(at as u64));
        let end = usize::try_from(extent.end.get()).expect("a length in memory");
        assert!(end > at && end <= newer.len());
        let len = (end - at) as u64;
        match extent.kind {
            ExtentKind::Data => totals.data += len,
            ExtentKind::Hole => {
                totals.zeros += len;
                // A comparison of slices is much faster than a loop, as tests are not optimized.
                assert!(newer[at..end] == vec![0; end - at], "{at}..{end} is no zeros");
            }
            ExtentKind::Free => panic!("{at}..{end} is free space"),
            ExtentKind::Unchanged => {
                totals.unchanged += len;
                assert!(end <= older.len() && older[at..end] == newer[at..end], "{at}..{end} is not the same");
            }
        }
        at = end;
    }
}

/// Writes and discards at random places. No two writes have the same bytes.
fn change(device: &Path, size: u64, random: &mut Random) {
    let file = open_for_writing(device);
    for _ in 0..random.within(0..12) {
        let start = random.within(0..size / 512) * 512;
        let most = if random.one_in(3) { MIB } else { 16 * KIB };
        let len = (random.within(1..most / 512) * 512).min(size - start);
        if random.one_in(3) {
            discard(device, start..start + len);
        } else {
            file.write_all_at(&random.bytes(len), start).expect("a write inside the device");
        }
    }
    if random.one_in(12) {
        discard(device, 0..size);
    }
    if random.one_in(3) {
        file.write_all_at(&random.bytes(512), size - 512).expect("a write inside the device");
    }
    // Some writes are still in the page cache when the devices are compared.
    if random.one_in(2) {
        file.sync_data().expect("data reaches the device");
    }
}

/// Snapshots of a volume that is changed in between, compared in both directions, live and offline.
fn stress(block: u64, size: u64, origin: Option<&Path>, features: Features, seed: u64) -> Totals {
    println!("seed {seed}, blocks of {block}, {size} bytes, external origin: {}", origin.is_some());
    let mut random = Random::new(seed);
    let pool = match features {
        Features::SkipZeroing => Pool::new(256 * MIB, block),
        Features::Default => Pool::with_zeroing(256 * MIB, block),
    };
    pool.dm().message("create_thin 0");
    let volume = pool.activate(0, size, origin);
    let mut totals = Totals::default();
    let mut kept: Vec<(Dm, Vec<u8>)> = Vec::new();
    for step in 1..8 {
        change(volume.path(), size, &mut random);
        volume.suspend();
        pool.dm().message(&format!("create_snap {step} 0"));
        volume.resume();
        let snapshot = pool.activate(step, size, origin);
        // A snapshot that is written too.
        if random.one_in(4) {
            change(snapshot.path(), size, &mut random);
        }
        let bytes = fs::read(snapshot.path()).expect("the snapshot can be read");
        if random.one_in(2) {
            change(volume.path(), size, &mut random);
        }
        let live = fs::read(volume.path()).expect("the volume can be read");
        for (older, newer, bytes) in
            [(snapshot.path(), volume.path(), [&bytes, &live]), (volume.path(), snapshot.path(), [&live, &bytes])]
        {
            let changes = between(older, newer).expect("both are active");
            check(bytes[0], bytes[1], &changes, &mut totals);
        }
        for (older, of_older) in &kept {
            let changes = between(older.path(), snapshot.path()).expect("both are active");
            check(of_older, &bytes, &changes, &mut totals);
        }
        kept.push((snapshot, bytes));
    }
    let kept: Vec<Vec<u8>> = kept.into_iter().map(|(device, bytes)| (drop(device), bytes).1).collect();
    drop(volume);
    if origin.is_none() {
        pool.offline(|metadata, data| offline(metadata, data, &kept, &mut totals));
    }
    totals
}

/// Which features a pool has.
#[derive(Clone, Copy)]
enum Features {
    /// New blocks are not zeroed.
    SkipZeroing,
    Default,
}

/// Compares all pairs of volumes, 1 and up, which have the bytes of `kept`, without an active pool.
fn offline(metadata: &Path, data: &Path, kept: &[Vec<u8>], totals: &mut Totals) {
    let pool = Arc::new(OfflinePool::open(metadata, data).expect("the pool is not active"));
    let bytes_of = |id: ThinId, live: &[u8]| {
        let volume = pool.volume(id).expect("a volume");
        let mut bytes = vec![0; usize::try_from(volume.len().get()).expect("small")];
        volume.fill(&mut bytes, Bytes::ZERO).expect("the volume can be read");
        let common = bytes.len().min(live.len());
        assert!(bytes[..common] == live[..common], "the bytes of the live volume {id}");
        bytes
    };
    let volumes: Vec<_> = (1..).map(|id| ThinId::new(id).expect("small")).zip(kept).collect();
    let volumes: Vec<_> = volumes.iter().map(|(id, live)| (*id, bytes_of(*id, live))).collect();
    for (older, of_older) in &volumes {
        for (newer, of_newer) in volumes.iter().filter(|(newer, _)| newer != older) {
            let changes = pool.changes(*older, *newer).expect("two volumes");
            check(of_older, of_newer, &changes, totals);
            assert!(changes.is_current());
        }
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn the_older_copy_and_the_changes_are_the_newer_volume() {
    let mut totals = Totals::default();
    let mut add = |more: Totals| {
        totals.data += more.data;
        totals.zeros += more.zeros;
        totals.unchanged += more.unchanged;
    };
    for seed in seeds(1, 2) {
        add(stress(64 * KIB, 8 * MIB, None, Features::SkipZeroing, seed));
        add(stress(64 * KIB, 8 * MIB + 5 * 512, None, Features::Default, seed));
        add(stress(192 * KIB, 8 * MIB, None, Features::SkipZeroing, seed));
        add(stress(MIB, 8 * MIB - 512, None, Features::Default, seed));
    }
    println!("{} of data, {} of zeros, {} unchanged", totals.data, totals.zeros, totals.unchanged);
    assert!(totals.data > 0 && totals.zeros > 0 && totals.unchanged > totals.data);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn over_an_external_origin_only_what_both_map_is_unchanged() {
    let mut random = Random::new(3);
    let image = Image::with_data(6 * MIB + 7 * 512, &[0..MIB, 2 * MIB..3 * MIB, 6 * MIB..6 * MIB + 7 * 512]);
    let origin = Loop::new(image.path());
    let mut unchanged = 0;
    for seed in seeds(1, 2) {
        for (block, size) in [(64 * KIB, 8 * MIB), (192 * KIB, 4 * MIB + 512)] {
            unchanged += stress(block, size, Some(origin.path()), Features::Default, seed).unchanged;
        }
    }
    assert!(unchanged > 0);
    // A volume without an origin beside one with it.
    let pool = Pool::new(64 * MIB, 64 * KIB);
    pool.dm().message("create_thin 0");
    let with = pool.activate(0, 4 * MIB, Some(origin.path()));
    change(with.path(), 4 * MIB, &mut random);
    with.suspend();
    pool.dm().message("create_snap 1 0");
    with.resume();
    let without = pool.activate(1, 4 * MIB, None);
    let [of_with, of_without] = [&with, &without].map(|device| fs::read(device.path()).expect("it can be read"));
    let mut totals = Totals::default();
    check(&of_with, &of_without, &between(with.path(), without.path()).expect("both are active"), &mut totals);
    check(&of_without, &of_with, &between(without.path(), with.path()).expect("both are active"), &mut totals);
    assert_eq!(totals.zeros, 0);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn volumes_of_different_length_are_compared_up_to_the_end_of_the_older_one() {
    let mut totals = Totals::default();
    for (block, size) in [(64 * KIB, 2 * MIB + 512), (192 * KIB, 3 * MIB)] {
        let pool = Pool::with_zeroing(64 * MIB, block);
        let mut random = Random::new(block);
        let volume = pool.thin(0, size);
        open_for_writing(volume.path()).write_all_at(&random.bytes(size), 0).expect("a write inside the device");
        let older = pool.snapshot(1, &volume, 0);
        let of_older = fs::read(older.path()).expect("it can be read");
        for new_size in [size + 512, size - 512, size + 5 * MIB, MIB, size + block, size - block] {
            volume.reload(&format!("0 {} thin {} 0", new_size / 512, pool.dm().path().display()));
            for written in [0, 1, 2] {
                let start = random.within(0..new_size / 512) * 512;
                let len = (written * 4096).min(new_size - start);
                let file = open_for_writing(volume.path());
                file.write_all_at(&random.bytes(len), start).expect("a write inside the device");
                drop(file);
                let of_newer = fs::read(volume.path()).expect("it can be read");
                let changes = between(older.path(), volume.path()).expect("both are active");
                check(&of_older, &of_newer, &changes, &mut totals);
                let changes = between(volume.path(), older.path()).expect("both are active");
                check(&of_newer, &of_older, &changes, &mut totals);
            }
        }
        discard(volume.path(), 0..size - block);
        let of_newer = fs::read(volume.path()).expect("it can be read");
        let changes = between(older.path(), volume.path()).expect("both are active");
        check(&of_older, &of_newer, &changes, &mut totals);
    }
    assert!(totals.data > 0 && totals.zeros > 0 && totals.unchanged > 0);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn what_is_no_certain_pair_is_refused() {
    let (pool, other) = (Pool::new(64 * MIB, 64 * KIB), Pool::new(64 * MIB, 64 * KIB));
    let (volume, foreign) = (pool.thin(0, 4 * MIB), other.thin(1, 4 * MIB));
    let snapshot = pool.snapshot(1, &volume, 0);
    let linear = Dm::linear(volume.path());
    let refused = |older: &Path, newer: &Path, why: &str| {
        let error = between(older, newer).expect_err("it must be refused");
        assert!(error.contains(why), "{error}");
    };
    refused(volume.path(), volume.path(), "cannot be compared with itself");
    refused(snapshot.path(), foreign.path(), "a volume of another pool");
    refused(snapshot.path(), linear.path(), "it is not a thin volume");
    refused(linear.path(), snapshot.path(), "it is not a thin volume");
    refused(pool.metadata(), snapshot.path(), "it is not a thin volume");
    // The same volume by two devices.
    let twice = pool.activate(0, 4 * MIB, None);
    refused(snapshot.path(), volume.path(), "active as another device too");
    refused(twice.path(), volume.path(), "active as another device too");
    drop(twice);
    volume.suspend();
    refused(snapshot.path(), volume.path(), "suspended");
    refused(volume.path(), snapshot.path(), "suspended");
    volume.resume();
    pool.dm().suspend();
    refused(snapshot.path(), volume.path(), "suspended");
    pool.dm().resume();
    let changes = between(snapshot.path(), volume.path()).expect("both are active");
    assert!(changes.is_current() || between(snapshot.path(), volume.path()).is_ok());
    open_for_writing(volume.path()).write_all_at(&[1; 512], 0).expect("a write inside the device");
    open_for_writing(volume.path()).sync_data().expect("data reaches the device");
    assert!(!changes.is_current(), "the newer volume was written");
}

/// A pool that commits all the time, and a volume that is written all the time: an answer is right, or there is none.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_pool_that_commits_too_fast_is_refused_or_right() {
    let pool = Pool::with_slow_metadata(64 * MIB, 64 * KIB);
    let (volume, noise) = (pool.thin(0, 4 * MIB), pool.thin(2, 16 * MIB));
    let mut random = Random::new(1);
    change(volume.path(), 4 * MIB, &mut random);
    let older = pool.snapshot(1, &volume, 0);
    change(volume.path(), 4 * MIB, &mut random);
    let [of_older, of_newer] = [&older, &volume].map(|device| fs::read(device.path()).expect("it can be read"));
    let done = AtomicBool::new(false);
    let (right, refused) = thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random::new(2);
            let file = open_for_writing(noise.path());
            while !done.load(Ordering::SeqCst) {
                let start = random.within(0..16 * MIB / 512) * 512;
                file.write_all_at(&[1; 512], start).expect("a write inside the device");
                file.sync_all().expect("a flush, and so a commit");
                if random.one_in(8) {
                    discard(noise.path(), 0..16 * MIB);
                }
            }
        });
        let results: Vec<_> = (0..3).map(|_| between(older.path(), volume.path())).collect();
        done.store(true, Ordering::SeqCst);
        let mut counts = (0, 0);
        for result in results {
            match result {
                Ok(changes) => {
                    check(&of_older, &of_newer, &changes, &mut Totals::default());
                    counts.0 += 1;
                }
                Err(error) => {
                    assert!(error.contains("commits faster") || error.contains("changes faster"), "{error}");
                    counts.1 += 1;
                }
            }
        }
        counts
    });
    println!("{right} right, {refused} refused");
    assert!(between(older.path(), volume.path()).is_ok(), "when the pool is quiet");
    // The volume itself is written all the time.
    done.store(false, Ordering::SeqCst);
    thread::scope(|scope| {
        scope.spawn(|| {
            let file = open_for_writing(volume.path());
            while !done.load(Ordering::SeqCst) {
                file.write_all_at(&[1; 512], 0).expect("a write inside the device");
                file.sync_data().expect("data reaches the device");
            }
        });
        let result = between(older.path(), volume.path());
        done.store(true, Ordering::SeqCst);
        let error = result.expect_err("it is written all the time");
        assert!(error.contains("faster"), "{error}");
    });
}
