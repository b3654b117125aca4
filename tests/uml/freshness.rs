//! Writers against lseek, on stacks that the host's kernel may not have.

use crate::common::MIB;
use crate::common::dm::{Dm, Pool};
use crate::common::freshness::race;
use crate::common::image::Image;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;

const SIZE: u64 = 48 * MIB;

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_write_to_a_thin_volume_is_seen_at_once() {
    let pool = Pool::new(64 * MIB, 65536);
    let thin = pool.thin(0, SIZE);
    let mount = Mount::new(thin.path());
    race(mount.file(), thin.path(), SIZE, 60);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_write_below_a_linear_device_is_seen_at_once() {
    let pool = Pool::new(64 * MIB, 65536);
    let thin = pool.thin(0, SIZE);
    let linear = Dm::linear(thin.path());
    let mount = Mount::new(linear.path());
    // The writes go to the lower device; the mount exports the upper one.
    race(mount.file(), thin.path(), SIZE, 40);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_write_to_a_striped_device_is_seen_at_once() {
    let images = [Image::new(SIZE / 2), Image::new(SIZE / 2)];
    let disks = [Loop::new(images[0].path()), Loop::new(images[1].path())];
    let [first, second] = [&disks[0], &disks[1]].map(|disk| disk.path().display());
    let striped = Dm::new(&format!("0 {} striped 2 128 {first} 0 {second} 0", SIZE / 512));
    let mount = Mount::new(striped.path());
    race(mount.file(), striped.path(), SIZE, 60);
}

/// This kernel's clock counts ticks of 10 ms, so files that are written twice have one time.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn offline_metadata_rewritten_within_a_clock_tick_is_seen() {
    crate::rewritten::metadata_right_after_a_look();
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_backing_file_written_within_a_clock_tick_of_a_stat_is_seen() {
    crate::rewritten::backing_file_right_after_a_stat();
}
