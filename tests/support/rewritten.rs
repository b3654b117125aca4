//! Files that are written twice within one tick of the clock that their times come from: the second write does not change
//! them.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use crate::common::check::{open, seek_data};
use crate::common::image::{Image, open_for_writing};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::{KIB, MIB, assert_becomes};
use crate::thin_image::{self, Device};

const BLOCK: u64 = 64 * KIB;

/// The metadata image of an offline pool is rewritten right after each query of a volume: no block that is mapped then is
/// in a hole.
pub fn metadata_right_after_a_look() {
    const ROUNDS: usize = 300;
    let image = |mapped: &[u64]| {
        let mappings = mapped.iter().map(|block| (*block, block + 4)).collect();
        thin_image::build(&[Device { id: 7, mappings }], 64)
    };
    // Of one length, and each with a block that the other one has not.
    let images = [image(&[1, 3]), image(&[0, 3])];
    assert_eq!(images[0].len(), images[1].len());
    let (data, metadata) = (Image::with_data(MIB, &[0..MIB]), Image::new(images[0].len() as u64));
    let file = open_for_writing(metadata.path());
    file.write_all_at(&images[0], 0).expect("a write");
    let option = format!("thin_metadata={}", metadata.path().display());
    let mount = Mount::with_options(data.path(), &["-o", &option]);
    let volume = mount.directory().join("7");
    let mut stale = Vec::new();
    for round in 0..ROUNDS {
        let opened = open(&volume);
        assert!(seek_data(&opened, 0).is_some(), "both have data");
        let now = (round + 1) % 2;
        file.write_all_at(&images[now], 0).expect("a write");
        let mapped = [1, 0][now] * BLOCK;
        if seek_data(&opened, mapped) != Some(mapped) || seek_data(&open(&volume), mapped) != Some(mapped) {
            stale.push(round);
        }
    }
    assert!(stale.is_empty(), "{} of {ROUNDS} rounds had a stale hole: {stale:?}", stale.len());
}

/// The backing file of a loop device is written past the device right after a stat: a later stat gives a later time.
pub fn backing_file_right_after_a_stat() {
    const ROUNDS: usize = 100;
    let image = Image::new(MIB);
    let device = Loop::new(image.path());
    let mount = Mount::new(device.path());
    let time = || {
        let stat = fs::metadata(mount.file()).expect("stat");
        (stat.mtime(), stat.mtime_nsec(), stat.ctime(), stat.ctime_nsec())
    };
    let file = open_for_writing(image.path());
    let mut unseen = Vec::new();
    for round in 0..ROUNDS {
        file.write_all_at(&[1; 4096], 0).expect("a write");
        let before = time();
        file.write_all_at(&[2; 4096], 0).expect("a write");
        if time() <= before {
            unseen.push(round);
        }
    }
    assert!(unseen.is_empty(), "{} of {ROUNDS} writes changed no time: {unseen:?}", unseen.len());
    // Without writes, the times stay.
    assert_becomes(&true, || time() == time());
}
