//! Whole images of thin metadata, damaged with right checksums.
//!
//! Invariant: reading an image ends, without a panic and in bounded memory, in an error or in a map; where a device has
//! a map, look-ups of single blocks agree with it.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

#[path = "../../support/thin_image.rs"]
#[allow(dead_code)]
mod thin_image;
#[path = "../../support/thin_mutation.rs"]
mod thin_mutation;
use thin_image::Device;

static IMAGES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();

fn images() -> Vec<Vec<u8>> {
    let devices = [
        Device::new(1, (0..60).map(|at| at * 7..at * 7 + 3), 0),
        Device::new(2, [5..6], 1000),
        Device::new(3, [], 0),
        Device::new(4, (0..10).map(|at| 100 * at..100 * at + 20), 2000),
    ];
    [3, 4, 9, 100].map(|fill| thin_image::build(&devices, fill)).into()
}

fuzz_target!(|input: (u8, u16, Vec<thin_mutation::Edit>)| {
    let (which, cut, edits) = input;
    let images = IMAGES.get_or_init(images);
    let mut image = images[usize::from(which) % images.len()].clone();
    for edit in edits.into_iter().take(64) {
        thin_mutation::edit(&mut image, edit);
    }
    // Sometimes the device is shorter than its superblock says.
    if cut % 4 == 0 {
        image.truncate(usize::from(cut) * 16);
    }
    thin_mutation::read_everything(&image);
});
