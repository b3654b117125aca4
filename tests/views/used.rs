//! The used space of a device: the free space of its file system reads as zeros, and is a hole.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use super::names::names;
use super::view;
use crate::common::check::{Kind, check_blocks, check_holes, map_holes, open, seek_data, seek_hole};
use crate::common::image::{Image, open_for_writing};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::nbd::directory;
use crate::common::{KIB, MIB, needs, run, try_run, wait_until};

const SIZE: u64 = 64 * MIB;
const USED: &[&str] = &["-o", "used"];

/// A device of 64 MiB all of whose bytes are not zero, and then a file system on it with a file of 4 MiB.
fn ext4() -> (Loop, Image) {
    let image = ext4_image();
    (Loop::new(image.path()), image)
}

fn ext4_image() -> Image {
    let image = Image::with_data(SIZE, &[0..SIZE]);
    let files = directory();
    fs::write(files.path().join("file"), vec![7; 4 * MIB as usize]).expect("a file");
    let (from, to) = (files.path().to_str().unwrap(), image.path().to_str().unwrap());
    run("mke2fs", ["-q", "-F", "-t", "ext4", "-E", "nodiscard,lazy_itable_init=0", "-d", from, to]);
    image
}

/// The files in a file system are those of another one.
fn check_files(copy: &Path, original: &Path) {
    let (one, two) = (directory(), directory());
    for (image, to) in [(copy, &one), (original, &two)] {
        run("e2fsck", ["-fn".as_ref(), image.as_os_str()]);
        let request = format!("rdump / {}", to.path().display());
        run("debugfs", ["-R".as_ref(), request.as_ref(), image.as_os_str()]);
    }
    run("diff", ["-r".as_ref(), one.path().as_os_str(), two.path().as_os_str()]);
    assert!(fs::read_dir(one.path()).unwrap().count() > 0);
}

#[test]
fn free_space_is_a_hole_and_the_files_are_the_same() {
    needs!(root, programs["mke2fs", "e2fsck", "debugfs", "cp", "diff"]);
    let (device, image) = ext4();
    let mount = Mount::with_options(device.path(), USED);
    let view = view(&mount, ".used");
    let copies = directory();
    let (sparse, dense) = (copies.path().join("sparse"), copies.path().join("dense"));
    run("cp", ["--sparse=always".as_ref(), view.as_os_str(), sparse.as_os_str()]);
    run("cp", ["--sparse=never".as_ref(), view.as_os_str(), dense.as_os_str()]);
    assert!(fs::read(&sparse).unwrap() == fs::read(&dense).unwrap(), "what is a hole reads as zeros");
    check_files(&sparse, image.path());
    let metadata = fs::metadata(&view).unwrap();
    assert_eq!(metadata.len(), SIZE);
    assert!(metadata.blocks() * 512 < SIZE);
    check_blocks(&view);
    assert!(fs::metadata(&sparse).unwrap().blocks() * 512 < 24 * MIB);
    // The holes are those of the copy that was read in full.
    check_holes(&map_holes(&view), &dense);
    // The exact file stays what it is.
    assert!(fs::read(mount.file()).unwrap() == fs::read(image.path()).unwrap());
}

#[test]
fn a_mounted_device_is_refused_and_an_open_one_cannot_be_mounted() {
    needs!(root, programs["mke2fs", "mount", "umount"]);
    let (device, _image) = ext4();
    let point = directory();
    let (path, at) = (device.path().to_str().unwrap().to_owned(), point.path().to_str().unwrap().to_owned());
    let mount = Mount::with_options(device.path(), USED);
    let view = view(&mount, ".used");
    run("mount", [&*path, &at]);
    assert_eq!(File::open(&view).unwrap_err().raw_os_error(), Some(libc::EBUSY));
    assert_eq!(fs::metadata(&view).unwrap().len(), SIZE, "a listing does not fail");
    run("umount", [&at]);
    let file = open(&view);
    assert!(seek_hole(&file, 0).is_some_and(|hole| hole < SIZE));
    for options in ["rw", "ro"] {
        let error = try_run("mount", ["-o", options, &path, &at], "").expect_err("it is in use");
        assert!(error.contains("busy") || error.contains("already mounted"), "{error}");
    }
    drop(file);
    // The close reaches the daemon after close(2) has returned.
    assert!(wait_until(|| try_run("mount", [&*path, &at], "").is_ok()));
    run("umount", [&at]);
}

#[test]
fn a_device_that_is_written_fails_until_the_view_is_opened_again() {
    needs!(root, programs["mke2fs"]);
    let (device, _image) = ext4();
    let mount = Mount::with_options(device.path(), USED);
    let view = view(&mount, ".used");
    let file = open(&view);
    let mut bytes = vec![0; 64 << 10];
    file.read_exact_at(&mut bytes, 0).expect("nobody wrote");
    let hole = seek_hole(&file, 0).unwrap();
    // Free space: the write is no matter to the file system, but the daemon cannot know that.
    let writer = open_for_writing(device.path());
    writer.write_all_at(&[1; 4096], hole).unwrap();
    writer.sync_all().unwrap();
    drop(writer);
    let error = file.read_exact_at(&mut bytes, 32 * MIB).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_eq!(seek_data(&file, hole), Some(hole), "all is data");
    drop(file);
    open(&view).read_exact_at(&mut bytes, 32 * MIB).expect("a new view");
}

/// Another loop device over the same file, or a virtual machine that has it open.
#[test]
fn a_write_to_the_file_below_the_device_is_noticed() {
    needs!(root, programs["mke2fs"]);
    let (device, image) = ext4();
    let mount = Mount::with_options(device.path(), USED);
    let file = open(&view(&mount, ".used"));
    let mut bytes = vec![0; 64 << 10];
    file.read_exact_at(&mut bytes, 0).expect("nobody wrote");
    let hole = seek_hole(&file, 0).unwrap();
    image.write(hole..hole + 4 * KIB);
    assert_eq!(file.read_exact_at(&mut bytes, 40 * MIB).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(seek_data(&file, hole), Some(hole), "all is data");
}

#[test]
fn an_image_is_watched_by_its_times() {
    needs!(root, programs["mke2fs"]);
    let image = ext4_image();
    let mount = Mount::with_options(image.path(), USED);
    let file = open(&view(&mount, ".used"));
    let mut bytes = vec![0; 64 << 10];
    file.read_exact_at(&mut bytes, 0).expect("nobody wrote");
    assert!(seek_hole(&file, 0).is_some_and(|hole| hole < SIZE));
    image.write(50 * MIB..50 * MIB + 4 * KIB);
    assert_eq!(file.read_exact_at(&mut bytes, 40 * MIB).unwrap_err().raw_os_error(), Some(libc::EIO));
    drop(file);
    let writer = open_for_writing(image.path());
    File::open(view(&mount, ".used")).expect_err("a write may be in progress");
    drop(writer);
}

#[test]
fn what_is_not_understood_is_data_with_the_reason() {
    needs!(root, programs["mke2fs", "debugfs"]);
    let (device, image) = ext4();
    let info = |path: &Path| {
        run(env!("CARGO_BIN_EXE_blkholefs"), ["info".as_ref(), "-o".as_ref(), "used".as_ref(), path.as_os_str()])
    };
    let text = info(device.path());
    assert!(text.contains("used space of ext4") && text.contains("has holes"), "{text}");
    run("debugfs", ["-w", "-R", "feature needs_recovery", image.path().to_str().unwrap()]);
    device.losetup(&["-c"]);
    let text = info(device.path());
    assert!(text.contains("dense: ext4:") && text.contains("journal"), "{text}");
    let mount = Mount::with_options(device.path(), USED);
    let file = open(&view(&mount, ".used"));
    assert_eq!(seek_hole(&file, 0), Some(SIZE));
    assert!(mount.log().contains("all of it is data in the view of the used space: ext4"), "{}", mount.log());
}

#[test]
fn a_directory_has_the_view_for_known_file_systems() {
    needs!(root, programs["mke2fs", "mkswap"]);
    let (ext4, _image) = ext4();
    let random = Image::with_data(8 * MIB, &[0..8 * MIB]);
    let random = Loop::new(random.path());
    let swap = Image::with_data(8 * MIB, &[0..8 * MIB]);
    run("mkswap", [swap.path()]);
    let swap = Loop::new(swap.path());
    let devices = directory();
    for (name, device) in [("ext4", &ext4), ("random", &random), ("swap", &swap)] {
        std::os::unix::fs::symlink(device.path(), devices.path().join(name)).unwrap();
    }
    let mount = Mount::with_options(devices.path(), USED);
    assert_eq!(names(mount.directory()), ["ext4", "ext4.used", "random", "swap", "swap.used"]);
    let file = open(&mount.directory().join("swap.used"));
    assert!(seek_hole(&file, 0).is_some_and(|hole| hole <= 64 * KIB));
    assert_eq!(file.metadata().unwrap().len(), 8 * MIB);
}

#[test]
fn a_name_that_leads_to_another_device_gives_the_view_of_that_one() {
    needs!(root, programs["mke2fs"]);
    let (one, _image) = ext4();
    let other = Image::with_data(SIZE / 2, &[0..SIZE / 2]);
    run("mke2fs", ["-q", "-F", "-t", "ext4", other.path().to_str().unwrap()]);
    let two = Loop::new(other.path());
    let devices = directory();
    std::os::unix::fs::symlink(one.path(), devices.path().join("disk")).unwrap();
    std::os::unix::fs::symlink(two.path(), devices.path().join("new")).unwrap();
    let mount = Mount::with_options(devices.path(), USED);
    let path = mount.directory().join("disk.used");
    let view = open(&path);
    assert_eq!(open(&path).metadata().unwrap().ino(), view.metadata().unwrap().ino(), "nothing has changed");
    fs::rename(devices.path().join("new"), devices.path().join("disk")).unwrap();
    let new = open(&path);
    assert_eq!((view.metadata().unwrap().len(), new.metadata().unwrap().len()), (SIZE, SIZE / 2));
}

#[test]
fn a_disk_shows_the_union_over_its_partitions() {
    needs!(root, programs["mke2fs", "sfdisk", "cp"]);
    let image = Image::with_data(128 * MIB, &[0..128 * MIB]);
    let script = "label: gpt\nstart=1MiB, size=64MiB\nstart=65MiB, size=32MiB\n";
    crate::common::run_with_input("sfdisk", ["-q", image.path().to_str().unwrap()], script);
    let part = directory();
    let file_system = part.path().join("ext4");
    File::create(&file_system).unwrap().set_len(64 * MIB).unwrap();
    run("mke2fs", ["-q", "-F", "-t", "ext4", file_system.to_str().unwrap()]);
    open_for_writing(image.path()).write_all_at(&fs::read(&file_system).unwrap(), MIB).unwrap();
    let device = Loop::new(image.path());
    let mount = Mount::with_options(device.path(), USED);
    let view = view(&mount, ".used");
    let holes = map_holes(&view).into_iter().filter(|extent| extent.0 == Kind::Hole);
    let free: u64 = holes.map(|extent| extent.1.end - extent.1.start).sum();
    assert!(free > 40 * MIB && free < 64 * MIB, "{free}");
    let file = open(&view);
    assert_eq!(seek_hole(&file, 65 * MIB), Some(128 * MIB), "the other partition and the rest are data");
    let mut bytes = vec![0; 32 << 20];
    file.read_exact_at(&mut bytes, 65 * MIB).unwrap();
    assert!(bytes == super::read_at(&open(image.path()), 65 * MIB, 32 << 20));
}
