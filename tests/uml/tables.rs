//! Tables that are replaced and restored. The text of a table, and a status, are no proof that the contents are the same.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};

use crate::common::check::{check, open, seek_data, seek_hole, sysfs};
use crate::common::dm::{Dm, Pool, without_events};
use crate::common::image::{discard, write};
use crate::common::mount::Mount;
use crate::common::{KIB, MIB, needs, run, wait_until};
use crate::targets::Disk;

const SIZE: u64 = 4 * MIB;
const SECTORS: u64 = SIZE / 512;

/// Copies a device to another one with direct I/O.
fn copy(from: &Path, to: &Path) {
    let words = [format!("if={}", from.display()), format!("of={}", to.display())];
    let more = ["bs=64k", "iflag=direct", "oflag=direct", "status=none"].map(str::to_owned);
    run("dd", words.into_iter().chain(more));
}

/// Runs `work` while a zero table replaces the device's own table.
fn while_replaced(device: &Dm, own: &str, work: impl FnOnce()) {
    let status = device.status();
    device.reload(&format!("0 {SECTORS} zero"));
    work();
    device.reload(own);
    assert_eq!(device.status().split(' ').nth(2), status.split(' ').nth(2), "the target is not restored");
}

/// The store of a snapshot gets other exceptions, as many as before, while the snapshot's table is replaced.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_snapshot_store_that_was_replaced_is_read_again() {
    run("modprobe", ["dm-snapshot"]);
    let [origin, store, other] = [Disk::new(SIZE, &[]), Disk::new(8 * MIB, &[]), Disk::new(8 * MIB, &[])];
    let table = |store: &Disk| format!("0 {SECTORS} snapshot {} {} P 32", origin.path(), store.path());
    let made = Dm::new(&table(&other));
    write(made.path(), 2 * MIB..2 * MIB + 16 * KIB);
    drop(made);
    let device = Dm::new(&table(&store));
    write(device.path(), 0..16 * KIB);
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    assert_eq!((seek_data(&file, 0), seek_data(&file, 16 * KIB)), (Some(0), None));
    let status = device.status();
    while_replaced(&device, &table(&store), || copy(other.device.path(), store.device.path()));
    assert_eq!(device.status(), status, "the status is the same");
    assert_eq!(seek_data(&file, 2 * MIB), Some(2 * MIB), "what the other store has");
    check(mount.file(), device.path());
}

/// The times of a snapshot change when its store may have been replaced.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_snapshot_table_that_was_replaced_changes_the_times() {
    run("modprobe", ["dm-snapshot"]);
    let [origin, store] = [Disk::new(SIZE, &[]), Disk::new(8 * MIB, &[])];
    let table = format!("0 {SECTORS} snapshot {} {} P 32", origin.path(), store.path());
    let device = Dm::new(&table);
    let mount = Mount::new(device.path());
    let times = || {
        let metadata = mount.file().metadata().expect("the file has attributes");
        (metadata.mtime(), metadata.mtime_nsec())
    };
    let (before, same) = without_events(|| (times(), times()));
    assert_eq!(same, before, "nothing happened");
    while_replaced(&device, &table, || ());
    assert_ne!(times(), before);
}

/// All of a clone was copied. While its table is replaced, it gets new metadata, in which no region is copied.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn clone_metadata_that_was_replaced_is_read_again() {
    needs!(modules["dm-clone"]);
    let [metadata, destination, source] =
        [Disk::new(4 * MIB, &[]), Disk::new(SIZE, &[]), Disk::new(SIZE, &[MIB..2 * MIB])];
    let devices = format!("{} {} {}", metadata.path(), destination.path(), source.path());
    let table = format!("0 {SECTORS} clone {devices} 8 1 no_hydration");
    let device = Dm::new(&table);
    device.message("enable_hydration");
    assert!(wait_until(|| device.status().contains(" 1024/1024 0 ")), "{}", device.status());
    discard(device.path(), 0..SIZE);
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    assert_eq!(seek_data(&file, 0), None, "all of it was copied and discarded");
    while_replaced(&device, &table, || {
        let output = format!("of={}", metadata.path());
        run("dd", ["if=/dev/zero", &output, "bs=1M", "count=4", "oflag=direct", "status=none"]);
    });
    assert_eq!(seek_data(&file, 0), Some(MIB), "the source is read again");
    check(mount.file(), device.path());
}

/// A volume is deleted and made again with other blocks, as many as before, while the table of its device is replaced.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_thin_volume_that_was_recreated_is_read_again() {
    const BLOCK: u64 = 64 * KIB;
    let pool = Pool::new(64 * MIB, BLOCK);
    let device = pool.thin(0, SIZE);
    write(device.path(), 0..BLOCK);
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    assert_eq!((seek_data(&file, 0), seek_data(&file, BLOCK)), (Some(0), None));
    let table = format!("0 {SECTORS} thin {} 0", pool.dm().path().display());
    while_replaced(&device, &table, || {
        pool.delete(0);
        let other = pool.thin(0, SIZE);
        write(other.path(), 2 * MIB..2 * MIB + BLOCK);
    });
    assert_eq!(seek_data(&file, 2 * MIB), Some(2 * MIB), "what the new volume has");
    check(mount.file(), device.path());
}

/// A map that depends only on its lower devices stays valid when tables of other devices change, and the times stay too.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn tables_of_other_devices_change_nothing() {
    let disk = Disk::new(SIZE, &[MIB..2 * MIB]);
    let device = Dm::linear(disk.device.path());
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    let times = || {
        let metadata = file.metadata().expect("the file has attributes");
        (metadata.mtime(), metadata.mtime_nsec())
    };
    let before = times();
    for _ in 0..20 {
        drop(Dm::new(&format!("0 {SECTORS} zero")));
        assert_eq!((seek_data(&file, 0), seek_hole(&file, MIB)), (Some(MIB), Some(2 * MIB)));
        assert_eq!(times(), before);
    }
}

/// Where /dev/mapper/control cannot be opened at the first query, the next query tries again.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_control_device_that_appears_later_is_used() {
    let disk = Disk::new(SIZE, &[MIB..2 * MIB]);
    let device = Dm::linear(disk.device.path());
    let node = std::fs::canonicalize(sysfs(device.path())).expect("sysfs");
    let node = Path::new("/dev").join(node.file_name().expect("a name"));
    // In a mount namespace of its own, so that other tests keep their /dev/mapper.
    let shown = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("root may");
        run("mount", ["--make-rprivate", "/"]);
        run("mount", ["-t", "tmpfs", "none", "/dev/mapper"]);
        let mount = Mount::new(&node);
        let file = open(mount.file());
        assert_eq!((seek_data(&file, 0), seek_hole(&file, 0)), (Some(0), Some(SIZE)), "all data");
        run("umount", ["/dev/mapper"]);
        crate::common::assert_becomes(&Some(MIB), || seek_data(&file, 0));
        check(mount.file(), &node);
    });
    shown.join().expect("the device is shown with its holes");
}
