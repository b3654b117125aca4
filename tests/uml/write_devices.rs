//! Writing to devices of other kinds than thin volumes through a mount.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::common::check::{map_holes, map_of};
use crate::common::dm::{Dm, sectors};
use crate::common::image::Image;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::common::scsi::ScsiDisk;
use crate::common::written::Written;
use crate::common::{KIB, MIB, needs};

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
            let parameters: Vec<_> = parameters.iter().copied().chain([size.as_str(), "unmap_granularity=1"]).collect();
            let disk = ScsiDisk::new(SIZE / MIB, &parameters);
            let file = write_and_zero(disk.path(), sector);
            if parameters[0] == "lbprz=1" && parameters.len() == 3 {
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

/// Errors of a leg are errors of the write, and the rest of the device can be written.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn errors_of_a_leg_are_reported() {
    needs!(root, programs["dmsetup"]);
    let image = Image::new(SIZE);
    let below = Loop::new(image.path());
    let path = below.path().display();
    let device = Dm::new(&format!("0 2048 linear {path} 0\n2048 2048 error\n4096 2048 linear {path} 2048"));
    let mount = Mount::with_options(device.path(), &["-o", "rw"]);
    let file = OpenOptions::new().read(true).write(true).open(mount.file()).expect("it can be opened");
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
