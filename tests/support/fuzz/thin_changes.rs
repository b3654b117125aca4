//! Images of thin metadata with devices that share nodes, as snapshots do, which are damaged but have correct
//! checksums.
//!
//! Invariant: comparing two devices returns an error or their changes, without a panic and in bounded memory. If both
//! devices have a map, there is no error, and the changes are those of a reader without checks.
//!
//! An input is the number of an image (one byte), a length to which the image is cut (two bytes; most values do not cut
//! it), and edits of eight bytes each.

use std::cell::RefCell;

#[path = "../thin_image.rs"]
#[allow(dead_code)]
#[allow(clippy::duplicate_mod, reason = "each target is a program of its own, and all of them are one test too")]
mod thin_image;
#[path = "../thin_mutation.rs"]
#[allow(clippy::duplicate_mod, reason = "as above")]
mod thin_mutation;
use thin_mutation::Image;

thread_local! {
    static IMAGES: RefCell<Vec<Image>> = RefCell::new([3, 4, 9].map(|fill| Image::new(image(fill))).into());
}

/// Three devices, each made of the one before by some changes: one in the middle, and many of which one makes the tree
/// higher.
fn image(fill: usize) -> Vec<u8> {
    let mut image = thin_image::build(&[], fill);
    let mappings: Vec<_> = (0..60).map(|at| (at * 5, at)).collect();
    let first = thin_image::mapping_tree(&mut image, &mappings, fill);
    let second = thin_image::changed_tree(&mut image, first, &[(5, Some(100 << 24)), (10, None)], fill);
    let many: Vec<_> = (0..90).map(|at| (150 + at * 2, Some((200 + at) << 24))).collect();
    let third = thin_image::changed_tree(&mut image, second, &many, fill);
    let added = many.iter().filter(|(key, _)| !(key % 5 == 0 && *key < 300)).count() as u64;
    thin_image::set_devices(&mut image, &[(1, first, 60), (2, second, 59), (3, third, 59 + added)], fill);
    image
}

pub fn run(input: &[u8]) {
    IMAGES.with_borrow_mut(|images| thin_mutation::run(images, input));
}
