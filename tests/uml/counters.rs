//! The I/O counters of a device as evidence that it was not written to.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::thread;

use crate::common::check::{check, open, seek_data, sysfs};
use crate::common::dm::{Dm, Pool, sectors};
use crate::common::image::{Image, write};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::scsi::ScsiDisk;
use crate::common::{MIB, wait_until};

/// The modification time of a file, to the nanosecond.
fn time(file: &Path) -> (i64, i64) {
    let metadata = file.metadata().expect("the file has attributes");
    (metadata.mtime(), metadata.mtime_nsec())
}

/// Turns the counters of a device off or on.
fn switch(device: &Path, to: &str) {
    fs::write(sysfs(device).join("queue/iostats"), to).expect("the device has iostats");
}

/// The counters are off during a write between two calls of stat(2), so they do not count it.
#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn io_counters_that_were_switched_off_change_the_times() {
    let disk = ScsiDisk::new(16, &["lbprz=1"]);
    let mount = Mount::new(disk.path());
    let before = time(mount.file());
    assert_eq!(time(mount.file()), before, "nothing happened");
    switch(disk.path(), "0");
    write(disk.path(), 0..4096);
    switch(disk.path(), "1");
    assert_ne!(time(mount.file()), before);
}

/// The same for a map whose freshness depends on the counters. Kernels before 6.5 count the I/O of a device-mapper device
/// even when `iostats` is off.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn io_counters_that_were_switched_off_hide_no_write() {
    let pool = Pool::new(64 * MIB, 64 << 10);
    let thin = pool.thin(0, 64 * MIB);
    let mount = Mount::new(thin.path());
    let file = open(mount.file());
    assert_eq!(seek_data(&file, 0), None);
    let before = fs::read_to_string(sysfs(thin.path()).join("queue/iostats")).expect("the device has iostats");
    switch(thin.path(), "0");
    write(thin.path(), MIB..MIB + 4096);
    switch(thin.path(), before.trim());
    assert_eq!(seek_data(&file, MIB), Some(MIB));
    check(mount.file(), thin.path());
}

/// A write is in flight at the first stat(2) and has ended at the second. Kernels before 6.4 count it when it begins.
#[test]
#[ignore = "needs a kernel with device-mapper and scsi_debug: run tests/run"]
fn a_write_that_ends_between_two_stats_changes_the_times() {
    // The lowest device has no backing file whose times could change.
    let disk = ScsiDisk::new(16, &["lbprz=1"]);
    let (path, length) = (disk.path().display(), sectors(disk.path()));
    let slow = Dm::new(&format!("0 {length} delay {path} 0 0 {path} 0 3000"));
    let device = Dm::linear(slow.path());
    let mount = Mount::new(device.path());
    let in_flight = || fs::read_to_string(sysfs(device.path()).join("inflight")).expect("sysfs");
    let node = device.path().to_owned();
    let writer = thread::spawn(move || {
        // Bypasses the page cache, so that a request to the mount writes nothing back.
        let flag = "oflag=direct";
        let output = format!("of={}", node.display());
        crate::common::run("dd", ["if=/dev/urandom", &output, "bs=4k", "count=1", flag, "conv=notrunc", "status=none"]);
    });
    assert!(wait_until(|| in_flight().split_ascii_whitespace().nth(1) == Some("1")), "{}", in_flight());
    let before = time(mount.file());
    assert!(!writer.is_finished(), "the write has ended too early");
    writer.join().expect("the write succeeds");
    assert_ne!(time(mount.file()), before);
}

/// stat(2) and lseek(2) do not wait for a read of the device.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn stat_and_lseek_do_not_read_the_device() {
    let image = Image::with_data(4 * MIB, &[MIB..2 * MIB]);
    let disk = Loop::new(image.path());
    let (path, length) = (disk.path().display(), sectors(disk.path()));
    let device = Dm::new(&format!("0 {length} delay {path} 0 30000"));
    let mount = Mount::new(device.path());
    let shown = mount.file().to_owned();
    let queries = thread::spawn(move || {
        let file = open(&shown);
        (time(&shown), seek_data(&file, 0))
    });
    assert!(wait_until(|| queries.is_finished()), "a query waited for a read of 30 s");
    assert_eq!(queries.join().expect("the queries succeed").1, Some(MIB));
}
