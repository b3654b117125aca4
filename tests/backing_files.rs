//! Images on file systems that do not include dirty pages of the page cache when they report holes.

mod common;

use std::fs;

use common::check::{check, check_holes, check_same_bytes, map_holes, open, seek_data, seek_hole};
use common::fuse_image::FuseImage;
use common::image::{open_for_writing, write_at};
use common::loop_device::Loop;
use common::mount::Mount;
use common::{MIB, needs};

#[test]
fn dirty_pages_of_an_image_are_data() {
    needs!(root);
    let image = FuseImage::new(4 * MIB);
    let writer = open_for_writing(image.path());
    write_at(&writer, 3 * MIB..3 * MIB + 4096);
    assert_eq!(seek_data(&open(image.path()), 0), None, "the file system does not report the dirty page");
    let mount = Mount::new(image.path());
    let file = open(mount.file());
    assert_eq!(seek_data(&file, 0), Some(3 * MIB));
    write_at(&writer, MIB..MIB + 4096);
    assert_eq!(seek_data(&file, 0), Some(MIB), "while it is open");
    check(mount.file(), image.path());
}

#[test]
fn dirty_pages_of_a_loop_device_over_such_an_image_are_data() {
    needs!(root);
    let image = FuseImage::new(4 * MIB);
    let device = Loop::with_options(image.path(), &["--direct-io=on"]);
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

/// A network file system reports holes of the server's current state, and the local page cache keeps bytes that were
/// read before. Holes can be used only if reads and hole queries see the same state.
#[test]
fn holes_of_a_server_are_used_only_if_reads_bypass_the_page_cache() {
    needs!(root);
    let image = FuseImage::new(4 * MIB);
    let (buffered, direct) = (Loop::new(image.path()), Loop::with_options(image.path(), &["--direct-io=on"]));
    let writer = open_for_writing(image.path());
    write_at(&writer, MIB..2 * MIB);
    writer.sync_all().expect("the server accepts the write");
    let cached = fs::read(image.path()).expect("the image can be read");
    image.punch_elsewhere();
    assert!(
        fs::read(image.path()).expect("the image can be read") == cached,
        "the page cache must be older than the server's state"
    );
    for device in [&buffered, &direct] {
        let mount = Mount::new(device.path());
        let map = map_holes(mount.file());
        check_holes(&map, device.path());
        check_same_bytes(mount.file(), device.path());
        let is_direct = std::ptr::eq(device, &raw const direct);
        assert_eq!(seek_hole(&open(mount.file()), 0) == Some(0), is_direct, "{map:?}");
    }
    let mount = Mount::new(image.path());
    assert_eq!(seek_data(&open(mount.file()), 0), None);
    assert!(fs::read(mount.file()).expect("the file can be read").iter().all(|&byte| byte == 0), "all of it is a hole");
}
