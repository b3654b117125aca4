//! Images on file systems that do not know of what is still in the page cache when they tell their holes.

mod common;

use common::check::{check, open, seek_data};
use common::fuse_image::FuseImage;
use common::image::{open_for_writing, write_at};
use common::loop_device::Loop;
use common::mount::Mount;
use common::{MIB, requires_root};

#[test]
fn dirty_pages_of_an_image() {
    if !requires_root() {
        return;
    }
    let image = FuseImage::new(4 * MIB);
    let writer = open_for_writing(image.path());
    write_at(&writer, 3 * MIB..3 * MIB + 4096);
    assert_eq!(seek_data(&open(image.path()), 0), None, "its file system has not seen the write");
    let mount = Mount::new(image.path());
    let file = open(mount.file());
    assert_eq!(seek_data(&file, 0), Some(3 * MIB));
    write_at(&writer, MIB..MIB + 4096);
    assert_eq!(seek_data(&file, 0), Some(MIB), "while it is open");
    check(mount.file(), image.path());
}

#[test]
fn dirty_pages_of_an_image_under_a_loop_device() {
    if !requires_root() {
        return;
    }
    let image = FuseImage::new(4 * MIB);
    let device = Loop::new(image.path());
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    assert_eq!(seek_data(&file, 0), None);
    let writer = open_for_writing(device.path());
    for page in [3 * MIB, MIB] {
        write_at(&writer, page..page + 4096);
        assert_eq!(seek_data(&file, 0), Some(page));
    }
    check(mount.file(), device.path());
}
