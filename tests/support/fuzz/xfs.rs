//! Whole XFS file systems that are damaged, with right checksums or wrong ones.
//!
//! Invariant: finding the used space returns an error or a map, without a panic and in bounded memory. A map has the length
//! of the device; the headers of all groups and the log are used in it, unless an edit moved them.
//!
//! An input is the number of an image (one byte), a length to which the device is cut (two bytes; most values do not cut it),
//! and edits of eight bytes each: a structure (255 is the last one, the superblock), whether its checksum is made right, a place in it, and a word.

use std::cell::RefCell;

use blkholefs::testing::filesystem::{ReadBytes as _, xfs};
use blkholefs::testing::map::HoleMap as _;
use blkholefs::testing::units::Bytes;

#[path = "../xfs_image.rs"]
mod xfs_image;
use xfs_image::{Shape, XfsImage, block_size, headers_and_log};

/// The most edits of one input. More of them leave nothing that can be read.
const MAX_EDITS: usize = 32;
const SHAPES: [Shape; 4] = [
    Shape { version: 5, entries: 3, extents: 20, head: 2 },
    Shape { version: 4, entries: 3, extents: 20, head: 77 },
    Shape { version: 5, entries: 60, extents: 100, head: 256 },
    Shape { version: 4, entries: 30, extents: 0, head: 128 },
];

thread_local! {
    static IMAGES: RefCell<Vec<XfsImage>> = RefCell::new(SHAPES.map(XfsImage::new).into());
}

pub fn run(input: &[u8]) {
    let Some(([which, low, high], edits)) = input.split_first_chunk() else { return };
    let which = usize::from(*which) % SHAPES.len();
    let mut image = IMAGES.with_borrow(|images| images[which].clone());
    let cut = u64::from(u16::from_le_bytes([*low, *high]));
    if cut % 16 == 1 {
        image.cut(cut * 512);
    }
    let (edits, _) = edits.as_chunks::<8>();
    for [structure, stamp, low, high, word @ ..] in edits.iter().take(MAX_EDITS) {
        let (number, count) = (usize::from(*structure), image.structures.len());
        let number = if number < 128 { number % count } else { count - 1 - (255 - number) % count };
        let structure = image.structures[number];
        image.put(structure, usize::from(u16::from_le_bytes([*low, *high])), u32::from_be_bytes(*word));
        if stamp % 8 != 1 {
            image.stamp(structure);
        }
    }
    check(&image, which, edits.is_empty() && cut % 16 != 1);
}

fn check(image: &XfsImage, which: usize, whole: bool) {
    let shape = SHAPES[which];
    let map = match xfs::used(image) {
        Ok(map) => map,
        Err(reason) => return assert!(!whole, "{reason}"),
    };
    assert_eq!(map.len(), image.len());
    let [headers, _, log] = headers_and_log(shape);
    let first_block = 0..block_size(shape);
    for used in if whole { [headers, log] } else { [first_block.clone(), first_block] } {
        assert!(map.next_hole(Bytes::new(used.start)).is_none_or(|hole| hole.start.get() >= used.end), "{used:?}");
    }
}
