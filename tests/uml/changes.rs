//! Tables and devices below that change under an open file.

use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use crate::common::check::{Extent, Kind, assert_map, check, map_of, open, seek_data};
use crate::common::dm::Dm;
use crate::common::image::{Image, open_for_writing, write, write_at};
use crate::common::ioctl;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::{MIB, assert_becomes, run, wait_until};

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn an_open_file_follows_a_reloaded_table() {
    let image = Image::with_data(8 * MIB, &[0..MIB, 4 * MIB..5 * MIB]);
    let disk = Loop::new(image.path());
    let other_image = Image::with_data(8 * MIB, &[2 * MIB..3 * MIB]);
    let other = Loop::new(other_image.path());
    let part = |disk: &Loop, start: u64| format!("0 8192 linear {} {}", disk.path().display(), start / 512);
    let device = Dm::new(&part(&disk, 0));
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    for (table, data) in [
        (part(&disk, 0), vec![0..MIB]),
        (part(&disk, 2 * MIB), vec![2 * MIB..3 * MIB]),
        ("0 8192 zero".to_owned(), vec![]),
        (part(&other, 0), vec![2 * MIB..3 * MIB]),
        (part(&other, MIB + 512), vec![MIB - 4096..2 * MIB]),
        ("0 4096 zero\n4096 4096 error".to_owned(), vec![2 * MIB..4 * MIB]),
        (part(&disk, 0), vec![0..MIB]),
    ] {
        device.reload(&table);
        let first = seek_data(&file, 0);
        let expected = data.first().map(|range| range.start);
        assert!(first == expected || first == Some(0), "{first:?} after {table}");
        assert_map(mount.file(), &map_of(4 * MIB, &data));
        if !table.contains("error") {
            check(mount.file(), device.path());
        }
    }
}

/// Another table gives the device other bytes without any write.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_reloaded_table_changes_the_times() {
    let image = Image::with_data(8 * MIB, &[0..MIB]);
    let disk = Loop::new(image.path());
    let part = |start: u64| format!("0 8192 linear {} {start}", disk.path().display());
    let device = Dm::new(&part(0));
    let mount = Mount::new(device.path());
    let times = || {
        let metadata = mount.file().metadata().expect("the file has attributes");
        (metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec())
    };
    // The image was written just before, so its times may still change.
    assert_becomes(&true, || times() == times());
    let before = times();
    assert_eq!(times(), before, "nothing happened");
    device.reload(&part(0));
    assert_eq!(times(), before, "the same table");
    device.reload(&part(4096));
    let after = times();
    assert_ne!(after, before);
    assert_eq!(times(), after, "nothing happened since");
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn an_open_file_follows_changes_of_the_size() {
    let image = Image::with_data(8 * MIB, &[0..4096, 5 * MIB..6 * MIB]);
    let disk = Loop::new(image.path());
    let device = Dm::new(&format!("0 4096 linear {} 0", disk.path().display()));
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    for size in [2 * MIB, 8 * MIB, 4 * MIB, 6 * MIB] {
        device.reload(&format!("0 {} linear {} 0", size / 512, disk.path().display()));
        assert_becomes(&size, || file.metadata().expect("stat").len());
        let data = [0..4096, 5 * MIB..6 * MIB];
        let inside = if size > 5 * MIB { &data[..] } else { &data[..1] };
        assert_map(mount.file(), &map_of(size, inside));
        check(mount.file(), device.path());
    }
}

/// A table in the inactive slot changes nothing until the device is resumed.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn an_inactive_table_changes_nothing() {
    let image = Image::with_data(4 * MIB, &[0..MIB]);
    let disk = Loop::new(image.path());
    let device = Dm::linear(disk.path());
    crate::common::run_with_input("dmsetup", ["load", device.name()], "0 8192 zero");
    let mount = Mount::new(device.path());
    assert_map(mount.file(), &map_of(4 * MIB, &[0..MIB]));
    device.resume();
    assert_map(mount.file(), &map_of(4 * MIB, &[]));
}

/// `dmsetup remove --force` leaves an error target in place of an open device.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn an_open_device_with_an_error_table_is_data_and_eio() {
    let image = Image::new(4 * MIB);
    let disk = Loop::new(image.path());
    let device = Dm::linear(disk.path());
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    assert_eq!(seek_data(&file, 0), None);
    device.reload("0 8192 error");
    assert_eq!(seek_data(&file, 0), Some(0));
    let error = file.read_at(&mut [0; 4096], 0).expect_err("there are no bytes");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

/// A change of a device two layers below the exported one changes the map.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_change_of_a_loop_device_two_layers_down_is_seen() {
    let image = Image::with_data(8 * MIB, &[0..4096, 4 * MIB..5 * MIB]);
    let disk = Loop::new(image.path());
    let inner = Dm::new(&format!("0 4096 linear {} 0", disk.path().display()));
    let device = Dm::linear(inner.path());
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    assert_map(mount.file(), &map_of(2 * MIB, &[0..4096]));

    ioctl::loop_set_offset(disk.path(), 4 * MIB);
    assert_becomes(&None, || seek_data(&file, MIB));
    assert_map(mount.file(), &map_of(2 * MIB, &[0..MIB]));

    // Written past the devices above, through the loop device's own page cache.
    let writer = open_for_writing(disk.path());
    write_at(&writer, MIB + 8192..MIB + 12288);
    assert_becomes(&Some(MIB + 8192), || seek_data(&file, MIB));
    drop(writer);
    image.punch(4 * MIB..5 * MIB);
    write(inner.path(), 0..4096);
    assert_map(mount.file(), &map_of(2 * MIB, &[0..4096, MIB + 8192..MIB + 12288]));
    check(mount.file(), device.path());
}

/// A device is in the stack twice, once below another one: pages that the upper device writes back to it must be written
/// back too.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn dirty_pages_of_a_device_that_is_twice_in_a_stack_are_data() {
    let image = Image::new(4 * MIB);
    let lower = Loop::new(image.path());
    let upper = Loop::with_options(lower.path(), &["--direct-io=on"]);
    let device =
        Dm::new(&format!("0 8192 linear {} 0\n8192 8192 linear {} 0", lower.path().display(), upper.path().display()));
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    assert_eq!(seek_data(&file, 0), None);
    let writer = open_for_writing(upper.path());
    write_at(&writer, MIB..MIB + 4096);
    let found = seek_data(&file, 4 * MIB);
    let mut bytes = [0; 4096];
    file.read_exact_at(&mut bytes, 5 * MIB).expect("a read");
    assert!(bytes == [0; 4096] || found == Some(5 * MIB), "bytes that are not zero are in a hole");
    assert_map(mount.file(), &map_of(8 * MIB, &[MIB..MIB + 4096, 5 * MIB..5 * MIB + 4096]));
    check(mount.file(), device.path());
}

/// An idle mount of /dev/mapper holds no device open, and lists the devices that exist now.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_mount_of_dev_mapper_shows_the_devices_that_exist_now() {
    let mapper = std::path::Path::new("/dev/mapper");
    let mount = Mount::new(mapper);
    let image = Image::with_data(2 * MIB, &[0..MIB]);
    let disk = Loop::new(image.path());
    for _ in 0..3 {
        let device = Dm::linear(disk.path());
        let file = mount.directory().join(device.name());
        assert_map(&file, &map_of(2 * MIB, &[0..MIB]));
        check(&file, device.path());
        // The device is removed at once: nothing holds it open.
        drop(device);
        assert!(wait_until(|| !file.exists()), "the name is still there");
    }
    // Other tests may have devices at the same time, so only this name is checked.
    let control = run("ls", [mount.directory()]).lines().any(|name| name == "control");
    assert!(!control, "control is no block device");
}

/// A name that links to another device later has the map of the new device.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_name_of_another_device_has_the_map_of_that_device() {
    let image = Image::with_data(2 * MIB, &[0..MIB]);
    let disk = Loop::new(image.path());
    let names = tempfile::tempdir().expect("a temporary directory");
    let name = names.path().join("disk");
    let first = Dm::linear(disk.path());
    let second = Dm::new("0 4096 zero");
    let link = |device: &Dm| {
        let _ = std::fs::remove_file(&name);
        std::os::unix::fs::symlink(device.path(), &name).expect("the temporary directory is writable");
    };
    link(&first);
    let mount = Mount::new(&name);
    assert_map(mount.file(), &map_of(2 * MIB, &[0..MIB]));
    let early = open(mount.file());
    link(&second);
    assert_map(mount.file(), &map_of(2 * MIB, &[]));
    check(mount.file(), second.path());
    let shown = [Extent(Kind::Data, 0..MIB)];
    assert_eq!(seek_data(&early, 0), Some(shown[0].1.start), "an open file stays with its device");
}
