//! Writing to devices of other kinds than thin volumes through a mount.

use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::common::check::{map_holes, map_of};
use crate::common::dm::{Dm, sectors};
use crate::common::image::{Image, open_rw};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::common::scsi::ScsiDisk;
use crate::common::written::Written;
use crate::common::{KIB, MIB, needs, run};
use crate::md::Array;

const SIZE: u64 = 8 * MIB;

/// Writes and zeros at random, and then all of it made zero.
fn write_and_zero(device: &Path, seed: u64) -> Written {
    let size = sectors(device) * 512;
    let mut file = Written::new(device);
    file.write(0..size);
    let mut random = Random::new(Random::seed_or(seed));
    for _ in 0..40 {
        let longest = if random.one_in(2) { 700 } else { 300_000 };
        let start = random.within(0..size);
        let range = start..(start + random.within(1..longest)).min(size);
        if random.one_in(2) { file.zero(range) } else { file.write(range) }
    }
    file.check();
    file.zero(MIB - 1..2 * MIB + 1);
    file.zero(3 * MIB..3 * MIB + 100 * KIB);
    file.check();
    file.truncate();
    file.check();
    file
}

#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn scsi_disks_with_and_without_a_promise_of_zeros() {
    for sector in [512, 4096] {
        for parameters in [&["lbprz=1"][..], &["lbprz=0"], &["lbprz=2"], &["lbprz=1", "lbpu=0", "lbpws=0"]] {
            let size = format!("sector_size={sector}");
            // By default a command takes a tick of the timer.
            let rest = [size.as_str(), "unmap_granularity=1", "delay=0"];
            let parameters: Vec<_> = parameters.iter().copied().chain(rest).collect();
            let disk = ScsiDisk::new(SIZE / MIB, &parameters);
            let file = write_and_zero(disk.path(), sector);
            if parameters[0] == "lbprz=1" && parameters.len() == 4 {
                assert_eq!(map_holes(file.mount().file()), map_of(SIZE, &[]), "all is unmapped");
            }
        }
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn devices_over_a_loop_device() {
    needs!(root, programs["dmsetup"], modules["dm-crypt"]);
    for options in [&[][..], &["--sector-size=4096"]] {
        let image = Image::new(SIZE);
        let below = Loop::with_options(image.path(), options);
        let file = write_and_zero(below.path(), 1);
        assert_eq!(map_holes(file.mount().file()), map_of(SIZE, &[]), "the image is one hole");
        drop(file);
        let path = below.path().display();
        let linear = Dm::new(&format!("0 8192 linear {path} 4096"));
        let file = write_and_zero(linear.path(), 2);
        assert_eq!(map_holes(file.mount().file()), map_of(8192 * 512, &[]), "the image is one hole");
        drop(file);
        drop(linear);
        // A discard of this device would leave other bytes than zeros.
        let key = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
        let crypt = Dm::new(&format!("0 8192 crypt aes-xts-plain64 {key} 0 {path} 0 1 allow_discards"));
        drop(write_and_zero(crypt.path(), 3));
    }
}

#[test]
#[ignore = "needs a kernel with md: run tests/run"]
fn arrays() {
    needs!(root, programs["mdadm"], modules["md-mod", "raid0", "raid1"]);
    for words in [&["--level=1", "--assume-clean"][..], &["--level=0"]] {
        let array = Array::new(words, &[SIZE, SIZE]);
        drop(write_and_zero(&array.path, 4));
    }
}

/// A file system that cannot make holes gets zeros.
#[test]
#[ignore = "needs a kernel with minix: run tests/run"]
fn an_image_on_a_file_system_without_holes() {
    needs!(root, programs["mkfs.minix", "mount", "umount"], modules["minix"]);
    let disk = Image::new(24 * MIB);
    run("mkfs.minix", [disk.path()]);
    let (device, place) = (Loop::new(disk.path()), tempfile::tempdir().expect("a directory"));
    run("mount", [device.path(), place.path()]);
    let path = place.path().join("image");
    std::fs::write(&path, vec![7; 4 << 20]).expect("it fits");
    let mut file = Written::new(&path);
    file.zero(5..2 * MIB);
    file.write(MIB..MIB + 700);
    file.check();
    file.truncate();
    file.check();
    drop(file);
    run("umount", [place.path()]);
}

/// A last sector that is not whole is written, or refused with EIO, and its neighbours stay as they are.
#[test]
#[ignore = "needs a kernel of its own: run tests/run"]
fn a_last_sector_that_is_not_whole() {
    needs!(root, programs["losetup"]);
    let size = SIZE + 3 * 512;
    let image = Image::with_data(size, &[SIZE - 4096..size]);
    let device = Loop::with_options(image.path(), &["--sector-size=4096"]);
    let mut model = std::fs::read(image.path()).expect("the image can be read");
    let mount = Mount::writable(device.path());
    let file = open_rw(mount.file());
    for range in [SIZE - 1500..SIZE + 700, SIZE + 512..size, size - 1..size, 5..4100] {
        let bytes = vec![9; usize::try_from(range.end - range.start).expect("small")];
        let place = usize::try_from(range.start).expect("small")..usize::try_from(range.end).expect("small");
        match file.write_all_at(&bytes, range.start).and_then(|()| file.sync_all()) {
            Ok(()) => model[place].copy_from_slice(&bytes),
            Err(error) => {
                assert_eq!((error.raw_os_error(), range.end > SIZE), (Some(libc::EIO), true), "{range:?}");
                let whole = place.start..place.end.min(SIZE as usize).max(place.start);
                model[whole].fill(9);
            }
        }
        assert!(std::fs::read(image.path()).expect("the image can be read") == model, "{range:?}");
    }
}

/// Errors of a leg are errors of the write, and the rest of the device can be written.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn errors_of_a_leg_are_reported() {
    needs!(root, programs["dmsetup"]);
    let image = Image::new(SIZE);
    let below = Loop::new(image.path());
    let path = below.path().display();
    let device = Dm::new(&format!("0 2048 linear {path} 0\n2048 2048 error\n4096 2048 linear {path} 2048"));
    let mount = Mount::writable(device.path());
    let file = open_rw(mount.file());
    let errno = |result: std::io::Result<()>| result.expect_err("an error").raw_os_error();
    for offset in [MIB, MIB + 5, 2 * MIB - 4096] {
        assert_eq!(errno(file.write_all_at(&[7; 4096], offset)), Some(libc::EIO), "a write at {offset}");
    }
    let punch = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert_eq!(nix::fcntl::fallocate(&file, punch, 1 << 20, 4096), Err(nix::errno::Errno::EIO));
    assert_eq!(errno(file.set_len(0)), Some(libc::EIO), "of all of it");
    file.write_all_at(&[7; 4096], 2 * MIB).expect("the next leg works");
    file.write_all_at(&[7; 4096], 5).expect("the first leg works");
    let mut bytes = [0; 4096];
    file.read_exact_at(&mut bytes, 2 * MIB).expect("it can be read");
    assert_eq!(bytes, [7; 4096]);
}
