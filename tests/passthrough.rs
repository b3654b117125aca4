//! FUSE passthrough: the kernel reads the bytes of an image itself, and the daemon serves all other requests.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use common::check::{check, map_holes, map_of, open, seek_data};
use common::image::Image;
use common::loop_device::Loop;
use common::mount::{LoopMount, Mount};
use common::{KIB, MIB, assert_becomes, needs, wait_until};

/// The number of bytes that a process has written by system calls. The daemon's reads are not all counted: asynchronous
/// ones are none of the calls that the kernel counts (`io_submit`).
fn bytes_written_by(process: u32) -> u64 {
    let counters = fs::read_to_string(format!("/proc/{process}/io")).expect("the daemon runs");
    let line = counters.lines().find_map(|line| line.strip_prefix("wchar: ")).expect("proc(5) has it");
    line.parse().expect("a number")
}

/// The number of bytes that the daemon replies while all of `file` is read.
fn bytes_replied_for(file: &Path, daemon: u32) -> u64 {
    let before = bytes_written_by(daemon);
    fs::read(file).expect("the file can be read");
    bytes_written_by(daemon) - before
}

#[test]
fn an_image_is_read_by_the_kernel_and_a_loop_device_by_the_daemon() {
    needs!(root);
    let source = LoopMount::new(8 * MIB, &[0..8 * MIB]);
    assert!(
        bytes_replied_for(source.file(), source.mount.pid()) >= 8 * MIB,
        "the daemon does not read the loop device"
    );
    let release = nix::sys::utsname::uname().expect("a kernel").release().to_owned();
    let mut numbers = release.to_str().expect("text").split('.').map_while(|part| part.parse::<u32>().ok());
    if (numbers.next(), numbers.next()) < (Some(6), Some(9)) {
        return;
    }
    let image = Mount::new(source.image.path());
    assert!(bytes_replied_for(image.file(), image.pid()) < MIB, "the daemon read an image");
}

#[test]
fn writes_and_changes_of_size_are_seen_by_an_open_file() {
    needs!(root);
    let image = Image::with_data(4 * MIB, &[0..4096]);
    let mount = Mount::new(image.path());
    let file = open(mount.file());
    assert_eq!(seek_data(&file, 4096), None);
    image.write(2 * MIB..3 * MIB);
    assert_eq!(seek_data(&file, 4096), Some(2 * MIB));
    check(mount.file(), image.path());
    image.resize(16 * MIB);
    image.write(12 * MIB..12 * MIB + 4096);
    assert_becomes(&Some(12 * MIB), || seek_data(&file, 3 * MIB));
    let (mut ours, mut theirs) = (vec![0; 8192], vec![0; 8192]);
    file.read_exact_at(&mut ours, 12 * MIB).expect("it is there");
    open(image.path()).read_exact_at(&mut theirs, 12 * MIB).expect("it is there");
    assert_eq!(ours, theirs);
    check(mount.file(), image.path());
}

#[test]
fn concurrent_opens_read_the_same_bytes_and_map() {
    needs!(root);
    let image = Image::with_data(MIB, &[0..64 * KIB, 512 * KIB..MIB]);
    let mount = Mount::new(image.path());
    let expected = fs::read(image.path()).expect("the image can be read");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..50 {
                    assert!(fs::read(mount.file()).expect("the file can be read") == expected);
                    assert_eq!(map_holes(mount.file()), map_of(MIB, &[0..64 * KIB, 512 * KIB..MIB]));
                }
            });
        }
    });
}

/// An open file keeps its image. A later open of the name opens the new image.
#[test]
fn an_open_file_keeps_its_image_when_another_takes_its_name() {
    needs!(root);
    let image = Image::with_data(MIB, &[0..4096]);
    let other = Image::with_data(MIB, &[512 * KIB..MIB]);
    let mount = Mount::new(image.path());
    let file = open(mount.file());
    fs::rename(other.path(), image.path()).expect("a rename in one directory");
    assert_eq!(seek_data(&file, 4096), None, "the open file is still the old image");
    check(mount.file(), image.path());
    drop(file);
    check(mount.file(), image.path());
    fs::write(other.path(), "").expect("the fixture removes it");
}

/// An idle mount holds no reference to an image, so the file system of the image can be unmounted.
#[test]
fn an_idle_mount_holds_no_image() {
    needs!(root);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let lower = Image::new(64 * MIB);
    common::run("mkfs.ext4", ["-q".as_ref(), lower.path().as_os_str()]);
    let device = Loop::new(lower.path());
    common::run("mount", [device.path(), directory.path()]);
    let path = directory.path().join("image");
    fs::write(&path, vec![1; 4096]).expect("room for it");
    let mount = Mount::new(&path);
    assert_eq!(fs::read(mount.file()).expect("the file can be read"), vec![1; 4096]);
    // close(2) does not wait for the release request.
    let released = wait_until(|| common::try_run("umount", [directory.path()], "").is_ok());
    assert!(released, "the file system of the image is held");
}
