//! The times of devices from one mount to the next, for what the kernel of `tests/times.rs` may not have.

#[path = "times/below.rs"]
mod below;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::common::dm::{Dm, Pool, sectors};
use crate::common::image::{discard, write};
use crate::common::mount::Mount;
use crate::common::scsi::ScsiDisk;
use crate::common::{KIB, MIB, needs, run, run_with_input, try_run, wait_until};
use crate::lvm::Group;

/// Seconds and nanoseconds of the modification time and of the change time.
type Times = [(i64, i64); 2];

fn times(file: &Path) -> Times {
    let metadata = fs::metadata(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    [(metadata.mtime(), metadata.mtime_nsec()), (metadata.ctime(), metadata.ctime_nsec())]
}

/// Mounts a device, and returns the times of its file after the unmount.
fn mounted(device: &Path) -> Times {
    let mount = Mount::new(device);
    times(mount.file())
}

/// The same of a daemon that is killed.
fn mounted_and_killed(device: &Path) -> Times {
    let mut mount = Mount::new(device);
    let times = times(mount.file());
    mount.kill();
    times
}

fn assert_later(after: Times, before: Times, what: &str) {
    assert!(after[0] > before[0] && after[1] > before[1], "{what}: {before:?}, {after:?}");
}

/// Checks that the times of a device are the same in each mount, and later after each change.
fn assert_follows(device: &Path, changes: &[(&str, &dyn Fn())]) {
    let mut before = mounted_and_killed(device);
    for (what, change) in changes {
        assert_eq!([mounted(device), mounted_and_killed(device)], [before; 2], "before: {what}");
        change();
        let after = mounted(device);
        assert_later(after, before, what);
        before = after;
    }
    assert_eq!(mounted(device), before);
}

/// Two devices of dm-linear on one disk, of 4 MiB each.
fn halves(disk: &ScsiDisk) -> [Dm; 2] {
    [0, 8192].map(|start| Dm::new(&format!("0 8192 linear {} {start}", disk.path().display())))
}

#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn disks_partitions_and_linear_devices_keep_their_times() {
    let disk = ScsiDisk::new(16, &["lbprz=1"]);
    let path = disk.path();
    assert_follows(
        path,
        &[
            ("an overwrite in place", &|| write(path, 0..4096)),
            ("the same write", &|| write(path, 0..4096)),
            ("a discard", &|| discard(path, MIB..2 * MIB)),
        ],
    );
    run("addpart", [path.as_os_str(), "1".as_ref(), "2048".as_ref(), "2048".as_ref()]);
    let partition = format!("{}1", path.display());
    let partition = Path::new(&partition);
    assert!(wait_until(|| partition.exists()));
    assert_follows(partition, &[("a write", &|| write(partition, 0..4096))]);
    run("delpart", [path.as_os_str(), "1".as_ref()]);

    let [device, _] = halves(&disk);
    let part = |start: u64| format!("0 8192 linear {} {start}", path.display());
    assert_follows(
        device.path(),
        &[
            ("a write", &|| write(device.path(), 0..4096)),
            ("another table", &|| device.reload(&part(4096))),
            ("the table from before", &|| device.reload(&part(0))),
        ],
    );
    let before = mounted(device.path());
    device.reload(&part(0));
    assert_eq!(mounted(device.path()), before, "the same table");
}

/// A device with the name and the table of one that was removed, on the same disk.
#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn a_device_that_is_made_again_has_new_times() {
    let disk = ScsiDisk::new(16, &["lbprz=1"]);
    let table = format!("0 8192 linear {} 0", disk.path().display());
    let create = || run_with_input("dmsetup", ["create", "test-again"], &table);
    let path = Path::new("/dev/mapper/test-again");
    let mut before = None;
    for _ in 0..3 {
        create();
        let after = mounted(path);
        if let Some(before) = before {
            assert_later(after, before, "it was made again");
        }
        assert_eq!(mounted(path), after);
        before = Some(after);
        run("dmsetup", ["remove", "--retry", "test-again"]);
    }
}

/// LVM activates a volume as one device. Events of other devices, such as new snapshots, are no change.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_thin_volume_of_lvm_keeps_its_times() {
    let group = Group::new("testtimes");
    let name = group.name();
    group.lvm(&["lvcreate", "--quiet", "-T", "-L", "256M", "-c", "64k", &format!("{name}/pool")]);
    group.lvm(&["lvcreate", "--quiet", "-T", "-V", "1G", "-n", "data", &format!("{name}/pool")]);
    let data = group.volume("data");
    write(&data, 0..MIB);
    let table = run("dmsetup", ["table".as_ref(), data.as_os_str()]);
    assert_follows(
        &data,
        &[
            ("an overwrite in place", &|| write(&data, 0..4096)),
            ("the same write", &|| write(&data, 0..4096)),
            ("a new block", &|| write(&data, 2 * MIB..2 * MIB + 4096)),
            ("a discard", &|| discard(&data, 0..MIB)),
        ],
    );
    let before = mounted(&data);
    let mount = Mount::new(&data);
    group.lvm(&["lvcreate", "--quiet", "-s", "-n", "snap", &format!("{name}/data")]);
    drop(Dm::new("0 8192 zero"));
    assert_eq!(times(mount.file()), before, "a snapshot, while it is mounted");
    drop(mount);
    assert_eq!(mounted(&data), before, "a snapshot");
    // While another device is the same volume, each call gives other times.
    let second = Dm::new(&table);
    let mount = Mount::new(&data);
    let first = times(mount.file());
    assert_later(first, before, "two devices");
    assert_later(times(mount.file()), first, "two devices");
    drop(mount);
    drop(second);
    let before = mounted(&data);
    group.lvm(&["lvchange", "--quiet", "-an", &format!("{name}/data")]);
    group.lvm(&["lvchange", "--quiet", "-ay", &format!("{name}/data")]);
    assert_later(mounted(&data), before, "another activation");
}

/// Other thin volumes may have been written through a second device, or replaced, while nobody looked.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_thin_volume_without_lvm_has_new_times_in_each_mount() {
    let pool = Pool::new(64 * MIB, 64 * KIB);
    let thin = pool.thin(0, 16 * MIB);
    write(thin.path(), 0..MIB);
    let mut before = mounted(thin.path());
    let second = || drop(pool.activate(0, 16 * MIB, None));
    let written = || write(pool.activate(0, 16 * MIB, None).path(), 0..4096);
    let changes: [(&str, &dyn Fn()); 3] = [("nothing", &|| ()), ("a second device", &second), ("its write", &written)];
    for (what, change) in changes {
        change();
        let after = mounted(thin.path());
        assert_later(after, before, what);
        before = after;
    }
}

/// A snapshot finds its exceptions in its store when its table is loaded, which LVM does once.
#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn a_snapshot_keeps_its_times_with_lvm_only() {
    run("modprobe", ["dm-snapshot"]);
    let disk = ScsiDisk::new(16, &["lbprz=1"]);
    let [origin, store] = halves(&disk);
    let table = format!("0 8192 snapshot {} {} P 8", origin.path().display(), store.path().display());
    let device = Dm::with_uuid(&table, "LVM-times");
    assert_follows(
        device.path(),
        &[
            ("a new exception", &|| write(device.path(), 0..4096)),
            ("an overwrite in place", &|| write(device.path(), 0..4096)),
            ("another table", &|| device.reload(&format!("0 {} zero", sectors(device.path())))),
        ],
    );
    drop(device);
    let device = Dm::new(&table);
    let before = mounted(device.path());
    assert_later(mounted(device.path()), before, "without LVM");
}

/// A table with another device below, which has the same bytes or not.
#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn a_disk_that_is_replaced_below_a_device_moves_its_times() {
    let disk = ScsiDisk::new(16, &["lbprz=1"]);
    let [lower, other] = halves(&disk);
    let device = Dm::linear(lower.path());
    let own = format!("0 8192 linear {} 0", lower.path().display());
    assert_follows(
        device.path(),
        &[
            ("another device below", &|| device.reload(&format!("0 8192 linear {} 0", other.path().display()))),
            ("the device from before", &|| device.reload(&own)),
        ],
    );
}

/// Arrays of the level linear count no requests since Linux 5.13.
#[test]
#[ignore = "needs a kernel with md: run tests/run"]
fn an_array_that_counts_nothing_has_new_times_at_each_call() {
    needs!(modules["md-mod", "linear"]);
    let disk = ScsiDisk::new(16, &["lbprz=1"]);
    let legs = halves(&disk);
    let array = Path::new("/dev/md/testtimes");
    let words =
        ["--create", "/dev/md/testtimes", "--run", "--quiet", "--metadata=1.2", "--level=linear", "--raid-devices=2"];
    run("mdadm", words.iter().map(AsRef::as_ref).chain(legs.iter().map(|leg| leg.path().as_os_str())));
    assert!(wait_until(|| array.exists()), "the array does not appear");
    let array = fs::canonicalize(array).expect("it is there");
    let mount = Mount::new(&array);
    let mut before = times(mount.file());
    for _ in 0..3 {
        write(&array, 0..4096);
        let after = times(mount.file());
        assert_later(after, before, "a write");
        before = after;
    }
    drop(mount);
    let stopped = wait_until(|| try_run("mdadm", ["--stop".as_ref(), array.as_os_str()], "").is_ok());
    assert!(stopped, "{} is still in use", array.display());
}
