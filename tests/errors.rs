//! An operation that cannot succeed fails with the errno that tools expect, and never returns wrong bytes.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use common::check::{check, map_holes, open};
use common::image::Image;
use common::loop_device::Loop;
use common::mount::{LoopMount, Mount};
use common::{MIB, needs, run};

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn reads_end_at_the_end_of_the_device() {
    needs!(root);
    let source = LoopMount::new(MIB + 512, &[MIB..MIB + 512]);
    let file = open(source.file());
    let mut buffer = vec![0; 8192];
    assert_eq!(file.read_at(&mut buffer, MIB).expect("a read of the tail"), 512);
    assert_eq!(file.read_at(&mut buffer, MIB + 511).expect("a read of the last byte"), 1);
    assert_ne!(buffer[0], 0);
    for offset in [MIB + 512, MIB + 513, 1 << 40, i64::MAX as u64 - 8192] {
        assert_eq!(file.read_at(&mut buffer, offset).expect("a read behind the end"), 0, "{offset}");
    }
}

#[test]
fn every_change_is_erofs() {
    needs!(root);
    let source = LoopMount::new(MIB, &[0..4096]);
    let (file, directory) = (source.file(), source.mount.directory());
    let other = directory.join("other");
    let write_only = OpenOptions::new().write(true).open(file);
    let read_write = OpenOptions::new().read(true).write(true).open(file);
    let truncated = OpenOptions::new().write(true).truncate(true).open(file);
    assert_eq!(errno(write_only), Some(libc::EROFS), "open for writing");
    assert_eq!(errno(read_write), Some(libc::EROFS), "open for both");
    assert_eq!(errno(truncated), Some(libc::EROFS), "open with truncation");
    assert_eq!(errno(File::create(&other)), Some(libc::EROFS), "create");
    assert_eq!(errno(fs::create_dir(&other)), Some(libc::EROFS), "mkdir");
    assert_eq!(errno(fs::remove_file(file)), Some(libc::EROFS), "unlink");
    assert_eq!(errno(fs::rename(file, &other)), Some(libc::EROFS), "rename");
    assert_eq!(errno(fs::hard_link(file, &other)), Some(libc::EROFS), "link");
    assert_eq!(errno(fs::set_permissions(file, fs::metadata(file).expect("stat").permissions())), Some(libc::EROFS));
    assert_eq!(errno(fs::metadata(&other)), Some(libc::ENOENT), "a name that does not exist");
    source.check();
}

/// A range that the device cannot read gives an error, and the rest of the file can be read.
#[test]
fn a_range_that_cannot_be_read_is_eio() {
    needs!(root);
    let source = LoopMount::new(4 * MIB, &[0..MIB]);
    source.image.resize(2 * MIB);
    let file = open(source.file());
    let mut buffer = vec![0xee; 4096];
    assert_eq!(errno(file.read_exact_at(&mut buffer, 3 * MIB)), Some(libc::EIO));
    file.read_exact_at(&mut buffer, MIB - 4096).expect("the rest can be read");
    assert!(buffer.iter().all(|&byte| byte != 0));
}

#[test]
fn a_partial_last_sector_is_data() {
    needs!(root);
    common::tail::a_partial_last_sector_is_data();
}

/// After one device of a directory is detached, its file gives errors and the other files work.
#[test]
fn a_detached_device_fails_and_the_other_devices_of_its_directory_do_not() {
    needs!(root);
    let nodes = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    let images = [Image::with_data(MIB, &[0..4096]), Image::with_data(MIB, &[4096..8192])];
    let lost = Loop::new(images[0].path());
    let kept = Loop::new(images[1].path());
    for device in [&lost, &kept] {
        run("cp", ["--archive".as_ref(), device.path().as_os_str(), nodes.path().as_os_str()]);
    }
    let mount = Mount::new(nodes.path());
    let in_mount = |device: &Loop| mount.directory().join(device.name());
    check(&in_mount(&lost), lost.path());
    check(&in_mount(&kept), kept.path());

    let (gone, name) = (in_mount(&lost), lost.name().to_owned());
    drop(lost);
    let nothing = File::open(&gone).and_then(|file| {
        let mut buffer = [0; 512];
        // Another process may have bound the loop device again.
        let is_bound = Path::new("/sys/block").join(&name).join("loop/backing_file").exists();
        file.read_at(&mut buffer, 0).map(|count| assert!(count == 0 || is_bound, "a detached device returns bytes"))
    });
    let expected = [libc::ENODEV, libc::ENXIO, libc::EIO];
    assert!(
        nothing.as_ref().err().is_none_or(|error| expected.iter().any(|&e| error.raw_os_error() == Some(e))),
        "{nothing:?}"
    );
    fs::remove_file(nodes.path().join(name)).expect("the node is ours");
    assert!(common::wait_until(|| errno(fs::metadata(&gone)) == Some(libc::ENOENT)), "the node is gone");
    check(&in_mount(&kept), kept.path());
}

/// After the daemon is killed, reads fail and the mountpoint can be unmounted.
#[test]
fn after_a_kill_reads_fail_and_the_mountpoint_can_be_unmounted() {
    needs!(root);
    let LoopMount { mut mount, device, image: _image } = LoopMount::new(MIB, &[0..4096]);
    let file = open(mount.file());
    mount.kill();
    assert_eq!(errno(file.read_at(&mut [0; 512], 0)), Some(libc::ENOTCONN));
    drop(file);
    drop(mount);
    let again = Mount::new(device.path());
    check(again.file(), device.path());
}

/// A directory as SPEC is read at each request. It shows only block devices and directories.
#[test]
fn a_directory_shows_the_block_devices_that_exist_now() {
    needs!(root);
    let nodes = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    let image = Image::with_data(MIB, &[0..4096]);
    let device = Loop::new(image.path());
    let mount = Mount::new(nodes.path());
    let names = |path: &Path| {
        let mut names: Vec<_> =
            fs::read_dir(path).expect("readdir").map(|entry| entry.expect("an entry").file_name()).collect();
        names.sort();
        names
    };
    assert!(names(mount.directory()).is_empty());
    fs::write(nodes.path().join("not-a-device"), "text").expect("the directory is ours");
    fs::create_dir(nodes.path().join("sub")).expect("the directory is ours");
    for path in ["a device", "sub/deeper"] {
        run("cp", ["--archive".as_ref(), device.path().as_os_str(), nodes.path().join(path).as_os_str()]);
    }
    assert_eq!(names(mount.directory()), ["a device", "sub"]);
    assert_eq!(names(&mount.directory().join("sub")), ["deeper"]);
    check(&mount.directory().join("a device"), device.path());
    check(&mount.directory().join("sub/deeper"), device.path());
    assert_eq!(map_holes(&mount.directory().join("sub/deeper")).len(), 2);
    fs::remove_file(nodes.path().join("a device")).expect("the node is ours");
    assert!(common::wait_until(|| names(mount.directory()) == ["sub"]), "the node is gone");
}
