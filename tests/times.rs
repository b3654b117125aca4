//! The times of devices from one mount to the next: the same as long as a device is unchanged, and later after each change.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

#[path = "times/changes.rs"]
mod changes;
#[path = "times/programs.rs"]
mod programs;

use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use common::image::{Image, write};
use common::loop_device::Loop;
use common::mount::Mount;
use common::{MIB, needs, run, try_run, wait_until};

/// The modification time and the change time of a file, in nanoseconds.
type Times = [i128; 2];

fn times_of(metadata: &Metadata) -> Times {
    let time = |seconds: i64, nanoseconds: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    [time(metadata.mtime(), metadata.mtime_nsec()), time(metadata.ctime(), metadata.ctime_nsec())]
}

fn times(file: &Path) -> Times {
    times_of(&fs::metadata(file).unwrap_or_else(|error| panic!("{}: {error}", file.display())))
}

/// Waits until the times of a file are settled: a write from now on gives it other ones.
fn settle(image: &Path) {
    let changed = || nanoseconds(times(image)[1]);
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    assert!(wait_until(|| now() > changed() + Duration::from_millis(100)), "the clock stands still");
}

/// Mounts a device, and returns the times of its file after the unmount.
fn mounted(device: &Path) -> Times {
    let mount = Mount::new(device);
    times(mount.file())
}

/// An image with settled times, and a loop device over all of it.
fn loop_over(size: u64) -> (Image, Loop) {
    let image = Image::on_disk(size, &[0..64 << 10, MIB..2 * MIB]);
    settle(image.path());
    let device = Loop::reserved(image.path());
    (image, device)
}

#[test]
fn an_unchanged_loop_device_has_the_same_times_in_each_mount() {
    needs!(root);
    let (image, device) = loop_over(4 * MIB);
    let before = mounted(device.path());
    assert_eq!(before[0], times(image.path())[1], "the change time of the image");
    assert!(before[1] > before[0]);
    let mut killed = Mount::new(device.path());
    assert_eq!(times(killed.file()), before);
    killed.kill();
    drop(killed);
    let [first, second] = [0; 2].map(|_| Mount::new(device.path()));
    assert_eq!([times(first.file()), times(second.file())], [before; 2]);
    drop((first, second));
    // Bound again, also after a read of all of it.
    device.detach();
    device.bind(image.path());
    common::run("dd", [&format!("if={}", device.path().display()), "of=/dev/null", "bs=1M", "status=none"]);
    assert_eq!(mounted(device.path()), before);
}

/// The only mount of a device in which a state is seen first, and which does not end in order.
#[test]
fn the_times_that_a_killed_daemon_gave_stay() {
    needs!(root);
    let (image, mut device) = loop_over(4 * MIB);
    let partition = device.add_partition(1, 2048, 2048);
    for _ in 0..3 {
        let mut killed = Mount::new(&partition);
        let before = times(killed.file());
        killed.kill();
        drop(killed);
        assert_eq!(mounted(&partition), before);
        image.write(MIB..MIB + 4096);
        settle(image.path());
        assert!(mounted(&partition)[0] > before[0]);
    }
}

#[test]
fn an_unchanged_partition_has_the_same_times_in_each_mount() {
    needs!(root);
    let (image, mut device) = loop_over(4 * MIB);
    let partition = device.add_partition(1, 2048, 2048);
    let before = mounted(&partition);
    assert!(before[0] > times(image.path())[1], "it is not all of the image");
    assert_eq!(before[0], before[1]);
    assert_eq!(mounted(&partition), before);
    write(&partition, 0..4096);
    settle(image.path());
    let after = mounted(&partition);
    assert!(after[0] > before[0]);
    assert_eq!(mounted(&partition), after);
}

/// All daemons that see a change give it the same time.
#[test]
fn mounts_at_the_same_time_agree_on_each_change() {
    needs!(root);
    let (image, device) = loop_over(4 * MIB);
    let [first, second] = [0; 2].map(|_| Mount::new(device.path()));
    let mut before = times(first.file());
    for _ in 0..3 {
        // Longer than the times of one device are kept back.
        assert!(wait_until(
            || SystemTime::now() > SystemTime::UNIX_EPOCH + nanoseconds(before[1]) + Duration::from_secs(1)
        ));
        image.write(0..4096);
        settle(image.path());
        let after = times(first.file());
        assert!(after[0] > before[0]);
        assert_eq!(times(second.file()), after);
        before = after;
    }
}

fn nanoseconds(time: i128) -> Duration {
    Duration::from_nanos(time.try_into().expect("a time after 1970"))
}

/// The times in a mount by a daemon for which /run is empty, as after a reboot, or cannot be written.
fn times_without_run(device: &Path, options: &str) -> Vec<Times> {
    let place = tempfile::tempdir().expect("a temporary directory");
    let script = "mount -t tmpfs -o \"$1\" none /run && \"$2\" mount \"$3\" \"$4\" &&
        stat -c %.9Y,%.9Z \"$4\"/* && stat -c %.9Y,%.9Z \"$4\"/* && umount \"$4\"";
    let program = env!("CARGO_BIN_EXE_blkholefs");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", script, "sh", options, program]).arg(device).arg(place.path());
    let output = command.output().expect("unshare runs");
    assert!(output.status.success(), "{output:?}");
    let time = |text: &str| text.replace('.', "").parse().unwrap_or_else(|_| panic!("{output:?}"));
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .map(|line| line.split_once(',').map(|(mtime, ctime)| [time(mtime), time(ctime)]).expect("two"))
        .collect()
}

/// What a backup relies on after a reboot: the modification time of a loop device that is all of a file. The change time says
/// when the device was first seen, because the number of the device may have been that of another file.
#[test]
fn after_a_reboot_a_loop_device_has_the_time_of_its_file() {
    needs!(root, programs["unshare"]);
    let (_image, mut device) = loop_over(4 * MIB);
    let before = mounted(device.path());
    let after = times_without_run(device.path(), "mode=755");
    assert_eq!([after[0][0], after[1][0]], [before[0]; 2]);
    assert!(after[0][1] > before[1]);
    assert_eq!(after[1], after[0]);
    let partition = device.add_partition(1, 2048, 2048);
    let before = mounted(&partition);
    let after = times_without_run(&partition, "mode=755");
    assert!(after[0][0] > before[0], "the counters of a partition begin again with each boot");
    assert_eq!(after[1], after[0]);
}

/// A daemon that cannot keep times gives new ones, and serves.
#[test]
fn without_a_place_for_times_each_mount_has_new_ones() {
    needs!(root, programs["unshare"]);
    let (_image, device) = loop_over(4 * MIB);
    let mut before = mounted(device.path());
    for _ in 0..2 {
        let after = times_without_run(device.path(), "ro");
        assert!(after[0][0] > before[0] && after[0][1] > before[1]);
        assert_eq!(after[1], after[0]);
        before = after[0];
    }
}

/// Requests are not counted while the counters are off.
#[test]
fn counters_that_are_off_prove_nothing_to_the_next_mount() {
    needs!(root);
    let (_image, device) = loop_over(4 * MIB);
    let mut before = mounted(device.path());
    let switch = Path::new("/sys/block").join(device.name()).join("queue/iostats");
    fs::write(&switch, "0").expect("the counters can be switched off");
    for _ in 0..2 {
        let after = mounted(device.path());
        assert!(after[0] > before[0] && after[1] > before[1]);
        before = after;
    }
    fs::write(&switch, "1").expect("the counters can be switched on");
    let after = mounted(device.path());
    assert!(after[0] > before[0]);
    assert_eq!(mounted(device.path()), after);
}

/// A file on tmpfs may be written through a mapping without a change of its times.
#[test]
fn a_file_in_memory_proves_nothing_to_the_next_mount() {
    needs!(root);
    let place = tempfile::tempdir().expect("a temporary directory");
    run("mount", ["-t".as_ref(), "tmpfs".as_ref(), "none".as_ref(), place.path().as_os_str()]);
    let image = place.path().join("image");
    File::create(&image).and_then(|file| file.set_len(MIB)).expect("a file of 1 MiB");
    settle(&image);
    let device = Loop::reserved(&image);
    let before = mounted(device.path());
    assert!(mounted(device.path())[0] > before[0]);
    drop(device);
    let unmounted = wait_until(|| try_run("umount", [place.path()], "").is_ok());
    assert!(unmounted, "{} is still in use", place.path().display());
}
