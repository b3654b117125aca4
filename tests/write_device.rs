//! Writing to loop devices and images through a mount.

#[path = "common/mod.rs"]
mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::thread;

use common::image::{Image, open_rw};
use common::loop_device::Loop;
use common::mount::Mount;
use common::random::Random;
use common::written::Written;
use common::{KIB, MIB, assert_becomes, needs, run};

const SIZE: u64 = 8 * MIB;

/// Writes and zeros at random.
fn write_and_zero(file: &mut Written, size: u64, seed: u64) {
    let mut random = Random::new(Random::seed_or(seed));
    for _ in 0..100 {
        let longest = if random.one_in(2) { 700 } else { 300_000 };
        let start = random.within(0..size);
        let range = start..(start + random.within(1..longest)).min(size);
        if random.one_in(2) {
            file.zero(range);
        } else {
            file.write(range);
        }
    }
    file.check();
}

#[test]
fn writes_of_any_size_and_offset() {
    needs!(root, programs["losetup"]);
    for options in [&[][..], &["--sector-size=4096"]] {
        let image = Image::new(SIZE);
        let device = Loop::with_options(image.path(), options);
        let mut file = Written::new(device.path());
        write_and_zero(&mut file, SIZE, 5);
        file.truncate();
        file.check();
        drop(file);
        assert_eq!(image.path().metadata().expect("stat").blocks(), 0, "the image is one hole");
    }
}

/// Many threads write to parts of the same logical blocks, and others to whole blocks around them: none loses bytes.
#[test]
fn writers_of_parts_of_a_block_lose_nothing() {
    needs!(root, programs["losetup"]);
    let image = Image::new(SIZE);
    let device = Loop::with_options(image.path(), &["--sector-size=4096"]);
    let mount = Mount::writable(device.path());
    let file = &open_rw(mount.file());
    const PARTS: u64 = 8;
    const PART: u64 = 1000;
    thread::scope(|scope| {
        for part in 0..PARTS {
            scope.spawn(move || {
                for round in 0..300_u64 {
                    let at = round % 20 * PARTS * PART + part * PART;
                    let bytes = [u8::try_from(part + 1).expect("few parts"); PART as usize];
                    file.write_all_at(&bytes, at).expect("a write");
                }
            });
        }
    });
    let mut bytes = vec![0; usize::try_from(20 * PARTS * PART).expect("small")];
    File::open(device.path()).expect("it opens").read_exact_at(&mut bytes, 0).expect("a read");
    for (at, byte) in (0..).zip(&bytes) {
        assert_eq!(u64::from(*byte), at / PART % PARTS + 1, "at {at}");
    }
}

/// The error of an open for writing.
fn refused(path: &Path) -> Option<i32> {
    OpenOptions::new().write(true).open(path).err().and_then(|error| error.raw_os_error())
}

#[test]
fn a_device_that_is_in_use_is_refused_with_the_name_of_the_user() {
    needs!(root, programs["losetup", "mkfs.ext4", "mount", "umount", "mkswap", "blockdev"]);
    let image = Image::new(16 * MIB);
    run("mkfs.ext4", ["-q".as_ref(), image.path().as_os_str()]);
    let device = Loop::new(image.path());
    let mount = Mount::writable(device.path());
    let of_image = Mount::writable(image.path());
    let place = tempfile::Builder::new().prefix("a place").tempdir().expect("a directory");
    run("mount", [device.path(), place.path()]);
    let (device_refused, image_refused) = (refused(mount.file()), refused(of_image.file()));
    run("umount", [place.path()]);
    assert_eq!((device_refused, image_refused), (Some(libc::EBUSY), Some(libc::EBUSY)));
    for log in [mount.log(), of_image.log()] {
        let expected = format!("in use by a file system that is mounted on {}", place.path().display());
        assert!(log.contains(&expected), "{log}");
        assert_eq!(log.matches("mounted on").count(), 2, "its own mount is no user: {log}");
    }
    // A program that opens it exclusively.
    let held =
        nix::fcntl::open(device.path(), nix::fcntl::OFlag::O_EXCL, nix::sys::stat::Mode::empty()).expect("it is free");
    assert_eq!(refused(mount.file()), Some(libc::EBUSY));
    drop(held);
    // The daemon ends a claim after close(2) has returned.
    assert_becomes(&None, || refused(mount.file()));
    assert_becomes(&None, || refused(of_image.file()));
    run("blockdev", ["--setro".as_ref(), device.path().as_os_str()]);
    assert_eq!(refused(mount.file()), Some(libc::EACCES));
    assert!(mount.log().contains("the device is read-only"), "{}", mount.log());
    run("blockdev", ["--setrw".as_ref(), device.path().as_os_str()]);
    assert_becomes(&None, || refused(mount.file()));
}

#[test]
fn the_users_of_a_partition_are_those_of_its_disk_too() {
    needs!(root, programs["losetup", "addpart", "delpart", "mkfs.ext4", "mount", "umount"]);
    let image = Image::new(24 * MIB);
    let mut device = Loop::new(image.path());
    let partition = device.add_partition(1, 2048, 32768);
    run("mkfs.ext4", ["-q".as_ref(), partition.as_os_str()]);
    let mount = Mount::writable(device.path());
    let place = tempfile::tempdir().expect("a directory");
    run("mount", [partition.as_path(), place.path()]);
    let refused = refused(mount.file());
    run("umount", [place.path()]);
    assert_eq!(refused, Some(libc::EBUSY));
    assert!(mount.log().contains(&format!("mounted on {}", place.path().display())), "{}", mount.log());
}

#[test]
fn an_image_is_written_and_its_zeros_are_holes() {
    needs!(root);
    let image = Image::new(SIZE + 777);
    let mut file = Written::new(image.path());
    write_and_zero(&mut file, SIZE + 777, 6);
    file.write(SIZE..SIZE + 777);
    file.check();
    file.truncate();
    file.check();
    drop(file);
    // The file system keeps the block that the end of the image cuts.
    assert!(image.path().metadata().expect("stat").blocks() <= 8, "the image is one hole");
}

/// The file system of an image is full: the write fails, and the mount goes on.
#[test]
fn a_full_file_system_is_reported() {
    needs!(root, programs["mount", "umount"]);
    let place = tempfile::tempdir().expect("a directory");
    run(
        "mount",
        ["-t".as_ref(), "tmpfs".as_ref(), "-o".as_ref(), "size=1M".as_ref(), "none".as_ref(), place.path().as_os_str()],
    );
    let full = std::panic::catch_unwind(|| {
        let path = place.path().join("image");
        File::create(&path).and_then(|file| file.set_len(SIZE)).expect("a sparse file");
        let mount = Mount::writable(&path);
        let file = open_rw(mount.file());
        let error = file.write_all_at(&vec![1; 4 << 20], 0).expect_err("it does not fit");
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        file.set_len(0).expect("that needs no space");
        file.write_all_at(&[1; 4096], 5).expect("it fits again");
        let mut bytes = vec![0; usize::try_from(64 * KIB).expect("small")];
        file.read_exact_at(&mut bytes, 0).expect("a read");
        assert!(bytes[..5] == [0; 5] && bytes[5..4101] == [1; 4096] && bytes[4101..].iter().all(|byte| *byte == 0));
    });
    run("umount", [place.path()]);
    assert!(full.is_ok());
}
