//! Whole images of thin metadata that are damaged but have correct checksums.
//!
//! Invariant: reading an image returns an error or a map, without a panic and in bounded memory. If a device has a map, look-ups
//! of single blocks give the same result.
//!
//! An input is the number of an image (one byte), a length to which the image is cut (two bytes; most values do not cut it),
//! and edits of eight bytes each.
// A device is made of a list of ranges, which may have one element.
#![allow(clippy::single_range_in_vec_init)]

use std::cell::RefCell;

#[path = "../thin_image.rs"]
#[allow(dead_code)]
mod thin_image;
#[path = "../thin_mutation.rs"]
mod thin_mutation;
use thin_image::Device;
use thin_mutation::Image;

thread_local! {
    static IMAGES: RefCell<Vec<Image>> = RefCell::new(images());
}

/// Images with deep trees (few entries in each node), and images with flat trees.
fn images() -> Vec<Image> {
    let small = [
        Device::new(1, (0..20).map(|at| at * 7..at * 7 + 2), 0),
        Device::new(2, [5..6], 1000),
        Device::new(3, [], 0),
        Device::new(4, (0..10).map(|at| 100 * at..100 * at + 4), 2000),
    ];
    let large = [
        Device::new(1, (0..60).map(|at| at * 7..at * 7 + 3), 0),
        Device::new(2, [5..6], 1000),
        Device::new(3, [], 0),
        Device::new(4, (0..10).map(|at| 100 * at..100 * at + 20), 2000),
    ];
    [(3, &small), (4, &small), (9, &large), (100, &large)]
        .map(|(fill, devices)| Image::new(thin_image::build(devices, fill)))
        .into()
}

pub fn run(input: &[u8]) {
    IMAGES.with_borrow_mut(|images| thin_mutation::run(images, input));
}
