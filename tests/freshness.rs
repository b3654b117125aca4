//! Writers against lseek on loop devices.

mod common;

use common::freshness::race;
use common::image::Image;
use common::loop_device::Loop;
use common::mount::Mount;
use common::{MIB, needs};

const SIZE: u64 = 48 * MIB;

#[test]
fn a_write_to_a_loop_device_is_seen_at_once() {
    needs!(root);
    let image = Image::new(SIZE);
    let device = Loop::new(image.path());
    let mount = Mount::new(device.path());
    race(mount.file(), device.path(), SIZE, 200);
}

#[test]
fn a_write_below_two_loop_devices_is_seen_at_once() {
    needs!(root);
    let image = Image::new(SIZE);
    let lower = Loop::new(image.path());
    let upper = Loop::with_options(lower.path(), &["--direct-io=on"]);
    let mount = Mount::new(upper.path());
    race(mount.file(), upper.path(), SIZE, 200);
    // The write goes to a lower device of the shown one.
    race(mount.file(), lower.path(), SIZE, 100);
}
