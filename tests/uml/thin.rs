//! Thin volumes of a live pool: unmapped blocks are holes.

use std::os::unix::fs::MetadataExt as _;

use crate::common::check::{assert_map, check, map_of, open, seek_data, seek_hole};
use crate::common::dm::{Dm, Pool, without_events};
use crate::common::image::{Image, discard, open_for_writing, write, write_at};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::{GIB, KIB, MIB, assert_becomes, run};

/// Bytes in a block of most pools here.
const BLOCK: u64 = 64 * KIB;

/// The steps and results of the kernel series' `dm_thin.sh`.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn the_steps_of_the_kernel_series_give_its_maps() {
    let pool = Pool::new(GIB, BLOCK);
    let thin = pool.thin(0, GIB);
    let mount = Mount::new(thin.path());
    let dd = |block: u64| {
        let output = format!("of={}", thin.path().display());
        run("dd", ["if=/dev/urandom", &output, "bs=4k", "count=1", &format!("seek={block}"), "status=none"]);
    };
    assert_map(mount.file(), &map_of(GIB, &[]));
    dd(128 * MIB / 4096);
    assert_map(mount.file(), &map_of(GIB, &[134_217_728..134_283_264]));
    dd(0);
    assert_map(mount.file(), &map_of(GIB, &[0..BLOCK, 134_217_728..134_283_264]));
    dd(GIB / 4096 - 1);
    assert_map(mount.file(), &map_of(GIB, &[0..BLOCK, 134_217_728..134_283_264, 1_073_676_288..1_073_741_824]));
    check(mount.file(), thin.path());
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn st_blocks_is_the_number_of_mapped_sectors() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let thin = pool.thin(0, 16 * GIB);
    let mount = Mount::new(thin.path());
    for (offset, blocks) in [(0, 1), (GIB, 2), (2 * GIB, 3), (16 * GIB - 4096, 4)] {
        write(thin.path(), offset..offset + 4096);
        assert_eq!(std::fs::metadata(mount.file()).expect("stat").blocks(), blocks * BLOCK / 512);
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn an_open_file_follows_provisioning_and_discards() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let thin = pool.thin(0, GIB);
    let mount = Mount::new(thin.path());
    let file = open(mount.file());
    assert_eq!(seek_data(&file, 0), None);
    let writer = open_for_writing(thin.path());
    for offset in [512 * MIB, 64 * MIB + 4096, 0, GIB - 512] {
        // The write stays in the page cache: its block is provisioned at writeback.
        write_at(&writer, offset..offset + 512);
        let page = offset / 4096 * 4096;
        assert_eq!(seek_data(&file, page), Some(page), "{offset}");
    }
    drop(writer);
    let last = GIB - BLOCK..GIB;
    let block = |offset: u64| offset..offset + BLOCK;
    assert_map(mount.file(), &map_of(GIB, &[block(0), block(64 * MIB), block(512 * MIB), last.clone()]));
    discard(thin.path(), 0..GIB / 2);
    assert_map(mount.file(), &map_of(GIB, &[block(512 * MIB), last.clone()]));
    // A discard of less than a block does not unmap it.
    discard(thin.path(), 512 * MIB..512 * MIB + BLOCK / 2);
    assert_map(mount.file(), &map_of(GIB, &[block(512 * MIB), last]));
    check(mount.file(), thin.path());
    discard(thin.path(), 0..GIB);
    assert_map(mount.file(), &map_of(GIB, &[]));
}

/// A size that is no multiple of the pool's block: the mapped tail is data.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_partial_last_block_is_data_once_it_is_mapped() {
    for block in [64 * KIB, 192 * KIB, MIB] {
        let pool = Pool::new(96 * MIB, block);
        let size = 100 * block + 5 * 4096 + 512;
        let thin = pool.thin(0, size);
        let mount = Mount::new(thin.path());
        assert_map(mount.file(), &map_of(size, &[]));
        write(thin.path(), size - 512..size);
        assert_map(mount.file(), &map_of(size, &[100 * block..size]));
        write(thin.path(), 7 * block + 4096..7 * block + 8192);
        assert_map(mount.file(), &map_of(size, &[7 * block..8 * block, 100 * block..size]));
        check(mount.file(), thin.path());
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_snapshot_and_its_origin_have_their_own_maps() {
    let pool = Pool::new(96 * MIB, BLOCK);
    let thin = pool.thin(0, 256 * MIB);
    write(thin.path(), 0..MIB);
    let snapshot = pool.snapshot(1, &thin, 0);
    let (origin_mount, snapshot_mount) = (Mount::new(thin.path()), Mount::new(snapshot.path()));
    write(thin.path(), 2 * MIB..3 * MIB);
    write(snapshot.path(), 100 * MIB..100 * MIB + 4096);
    discard(thin.path(), 0..512 * KIB);
    let size = 256 * MIB;
    assert_map(origin_mount.file(), &map_of(size, &[512 * KIB..MIB, 2 * MIB..3 * MIB]));
    assert_map(snapshot_mount.file(), &map_of(size, &[0..MIB, 100 * MIB..100 * MIB + BLOCK]));
    check(origin_mount.file(), thin.path());
    check(snapshot_mount.file(), snapshot.path());
    let second = pool.snapshot(2, &snapshot, 1);
    write(second.path(), 50 * MIB..50 * MIB + 4096);
    let second_mount = Mount::new(second.path());
    let data = [0..MIB, 50 * MIB..50 * MIB + BLOCK, 100 * MIB..100 * MIB + BLOCK];
    assert_map(second_mount.file(), &map_of(size, &data));
    check(second_mount.file(), second.path());
}

/// Blocks that are not provisioned are read from an external origin. Behind its end they read as zeros if the origin was as
/// long when the volume was resumed, which the kernel does not show: that is data.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn unprovisioned_blocks_have_the_map_of_the_external_origin() {
    let image = Image::with_data(32 * MIB + 512, &[MIB..2 * MIB, 32 * MIB..32 * MIB + 512]);
    let origin = Loop::new(image.path());
    let pool = Pool::new(64 * MIB, BLOCK);
    pool.dm().message("create_thin 0");
    let thin = pool.activate(0, 128 * MIB, Some(origin.path()));
    let mount = Mount::new(thin.path());
    let behind = 32 * MIB..128 * MIB;
    assert_map(mount.file(), &map_of(128 * MIB, &[MIB..2 * MIB, behind.clone()]));
    check(mount.file(), thin.path());
    write(thin.path(), 8 * MIB..8 * MIB + 4096);
    write(thin.path(), 100 * MIB..100 * MIB + 4096);
    assert_map(mount.file(), &map_of(128 * MIB, &[MIB..2 * MIB, 8 * MIB..8 * MIB + BLOCK, behind]));
    check(mount.file(), thin.path());
}

/// Mappings behind the end of the table (a volume that was made smaller) are not shown.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn mappings_behind_the_end_of_the_table_are_not_shown() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let thin = pool.thin(0, 128 * MIB);
    write(thin.path(), MIB..2 * MIB);
    write(thin.path(), 64 * MIB - BLOCK..66 * MIB);
    drop(thin);
    for size in [64 * MIB, 64 * MIB + 4096, 32 * MIB, MIB] {
        let thin = pool.activate(0, size, None);
        let mount = Mount::new(thin.path());
        let inside: Vec<_> = [MIB..2 * MIB, 64 * MIB - BLOCK..66 * MIB]
            .into_iter()
            .filter(|range| range.start < size)
            .map(|range| range.start..range.end.min(size))
            .collect();
        assert_map(mount.file(), &map_of(size, &inside));
        check(mount.file(), thin.path());
    }
}

/// A device id that is deleted and created again is another volume.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_recreated_volume_has_its_own_map() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let nodes = tempfile::tempdir().expect("a temporary directory");
    let name = nodes.path().join("volume");
    let mount_of = |thin: &Dm| {
        let _ = std::fs::remove_file(&name);
        std::os::unix::fs::symlink(thin.path(), &name).expect("the temporary directory is writable");
    };
    let thin = pool.thin(0, 64 * MIB);
    mount_of(&thin);
    let mount = Mount::new(&name);
    write(thin.path(), 0..MIB);
    assert_map(mount.file(), &map_of(64 * MIB, &[0..MIB]));
    drop(thin);
    pool.delete(0);
    let thin = pool.thin(0, 64 * MIB);
    mount_of(&thin);
    write(thin.path(), 2 * MIB..3 * MIB);
    assert_map(mount.file(), &map_of(64 * MIB, &[2 * MIB..3 * MIB]));
    check(mount.file(), thin.path());
}

/// Reading a map does not change the pool: no metadata snapshot is held, and the metadata passes `thin_check`.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn reading_leaves_no_metadata_snapshot_in_the_pool() {
    let pool = Pool::new(64 * MIB, BLOCK);
    // Each check reads all of it.
    let size = 32 * MIB;
    let thin = pool.thin(0, size);
    let mut mount = Mount::new(thin.path());
    for offset in 0..20 {
        write(thin.path(), offset * MIB..offset * MIB + 4096);
        check(mount.file(), thin.path());
    }
    assert_eq!(pool.held_root(), None, "{}", pool.dm().status());
    mount.kill();
    drop(mount);
    assert_eq!(pool.held_root(), None, "{}", pool.dm().status());
    // A metadata snapshot of another program is not released.
    pool.dm().message("reserve_metadata_snap");
    let held = pool.held_root();
    assert!(held.is_some(), "{}", pool.dm().status());
    let mount = Mount::new(thin.path());
    write(thin.path(), size - 4096..size);
    check(mount.file(), thin.path());
    drop(mount);
    assert_eq!(pool.held_root(), held, "{}", pool.dm().status());
    pool.dm().message("release_metadata_snap");
    drop(thin);
    pool.thin_check();
}

/// A volume may be active as two devices. A write through one device is visible on the other.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_write_through_a_second_device_of_a_volume_is_seen() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let device = pool.thin(0, 16 * MIB);
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    assert_eq!(seek_data(&file, 0), None);
    let twin = pool.activate(0, 16 * MIB, None);
    write(twin.path(), MIB..MIB + 4096);
    assert_eq!(seek_data(&file, 0), Some(0), "all is data");
    assert_eq!(seek_hole(&file, 0), Some(16 * MIB), "all is data");
    let modified = || mount.file().metadata().and_then(|file| file.modified()).expect("stat");
    let before = modified();
    write(twin.path(), MIB..MIB + 4096);
    assert_ne!(modified(), before, "a write through the other device");
    check(mount.file(), device.path());
    // Activation of other volumes changes nothing.
    drop(twin);
    let _other = pool.thin(1, 16 * MIB);
    assert_becomes(&Some(MIB), || seek_data(&file, 0));
    assert_map(mount.file(), &map_of(16 * MIB, &[MIB..MIB + BLOCK]));
    write(device.path(), 3 * MIB..3 * MIB + 4096);
    assert_becomes(&Some(3 * MIB), || seek_data(&file, 2 * MIB));
    // A second device is activated, written to and removed between two queries.
    assert_becomes(&Some(3 * MIB + BLOCK), || seek_hole(&file, 3 * MIB));
    let twin = pool.activate(0, 16 * MIB, None);
    write(twin.path(), 5 * MIB..5 * MIB + 4096);
    drop(twin);
    assert_eq!(seek_data(&file, 5 * MIB), Some(5 * MIB));
}

/// A second device is activated, written to and removed between two calls of stat. The counters of the first device do not
/// move.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_write_through_a_second_device_that_is_gone_changes_the_times() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let device = pool.thin(0, 16 * MIB);
    write(device.path(), 0..BLOCK);
    let mount = Mount::new(device.path());
    let modified = || mount.file().metadata().and_then(|file| file.modified()).expect("stat");
    let (before, same) = without_events(|| (modified(), modified()));
    assert_eq!(same, before, "nothing happened");
    let twin = pool.activate(0, 16 * MIB, None);
    write(twin.path(), 0..4096);
    drop(twin);
    let after = modified();
    assert_ne!(after, before, "a write through the other device");
    let (after, same) = without_events(|| (modified(), modified()));
    assert_eq!(same, after, "nothing happened since");
}
