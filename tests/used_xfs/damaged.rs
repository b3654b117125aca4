//! Images in memory, whole and damaged, whatever their bytes are. These tests need no rights and no programs.

use std::ops::Range;

use blkholefs::testing::filesystem::{ReadBytes as _, xfs};
use blkholefs::testing::map::{ExtentKind, HoleMap as _};
use blkholefs::testing::units::Bytes;

use crate::common::random::Random;
use crate::images::ranges;
use crate::xfs_image::{Shape, Structure, XfsImage, block_size, headers_and_log};

const SHAPES: [Shape; 5] = [
    Shape { version: 5, entries: 3, extents: 40, head: 2 },
    Shape { version: 4, entries: 4, extents: 60, head: 77 },
    Shape { version: 5, entries: 60, extents: 240, head: 256 },
    Shape { version: 4, entries: 30, extents: 240, head: 128 },
    Shape { version: 5, entries: 3, extents: 0, head: 10 },
];

fn reason(image: &XfsImage) -> Option<String> {
    xfs::used(image).err().map(|reason| reason.to_string())
}

#[test]
fn whole_images_have_their_free_extents() {
    for shape in SHAPES {
        let (image, block) = (XfsImage::new(shape), block_size(shape));
        let map = xfs::used(&image).unwrap();
        let of_group = |start: u64| {
            (0..u64::from(shape.extents)).map(move |at| {
                let first = start + (1000 + at * 12) * block;
                first..first + (1 + at * 7 % 11) * block
            })
        };
        let free: Vec<Range<u64>> = of_group(0).chain(of_group(16 << 20)).collect();
        assert_eq!(ranges(&map, ExtentKind::Hole), free);
    }
}

#[test]
fn only_the_magic_number_is_xfs() {
    assert!(xfs::is_xfs(b"XFSB") && xfs::is_xfs(b"XFSB and more"));
    assert!(!xfs::is_xfs(b"") && !xfs::is_xfs(b"XFS") && !xfs::is_xfs(&[0; 65_536]));
}

#[test]
fn every_shorter_device_is_refused() {
    for shape in SHAPES {
        let whole = XfsImage::new(shape);
        let end = whole.len().get() - 700;
        for len in (0..end).step_by(99_991).chain([0, 1, 4, 511, 512, 513, 2048, end - 512, end - 1]) {
            let mut image = whole.clone();
            image.cut(len);
            assert!(reason(&image).is_some(), "{len}");
        }
    }
}

/// Each word of each structure with each of some values: an error or a map, in bounded time.
#[test]
fn every_word_may_have_any_value() {
    for shape in [SHAPES[0], SHAPES[1]] {
        let whole = XfsImage::new(shape);
        let mut image = whole.clone();
        for structure in structures(&whole) {
            let original = whole.bytes(structure);
            for at in (0..structure.len.min(328)).step_by(4) {
                for value in [0, 1, 1000, u32::MAX] {
                    image.put(structure, at, value);
                    image.stamp(structure);
                    check_total(&image, shape);
                }
                image.write(structure.offset, &original);
            }
        }
    }
}

/// Some structures, and the last ones: the headers of the second group, the log and the superblock.
fn structures(image: &XfsImage) -> Vec<Structure> {
    let last = image.structures.len() - 5;
    image.structures[..last].iter().step_by(20).chain(&image.structures[last..]).copied().collect()
}

fn check_total(image: &XfsImage, shape: Shape) {
    let Ok(map) = xfs::used(image) else { return };
    assert_eq!(map.len(), Bytes::new(image.len().get()));
    for used in headers_and_log(shape) {
        assert!(map.next_hole(Bytes::new(used.start)).is_none_or(|hole| hole.start.get() >= used.end), "{used:?}");
    }
}

#[test]
fn random_bytes_are_refused() {
    for seed in 0..500 {
        let mut random = Random::new(seed);
        let mut image = XfsImage::new(SHAPES[seed as usize % SHAPES.len()]);
        let structures = image.structures.clone();
        let structure = structures[random.within(0..structures.len() as u64) as usize];
        let bytes = random.bytes(structure.len as u64);
        image.write(structure.offset, &bytes);
        image.stamp(structure);
        assert!(reason(&image).is_some(), "{seed}");
    }
}

/// The first structures of an image are the blocks of the tree by block of group 0, from the leaves to the root.
#[test]
fn trees_that_lead_to_themselves_end() {
    for shape in [SHAPES[0], SHAPES[1]] {
        let mut image = XfsImage::new(shape);
        let leaves = shape.extents.div_ceil(shape.entries as u32);
        let above = image.structures[leaves as usize];
        let header = if shape.version == 5 { 56 } else { 16 };
        let pointers = header + (above.len - header) / 12 * 8;
        // The first child of the first block above the leaves is that block itself, then its own second child.
        for child in [100 + leaves, 101, 99, u32::MAX] {
            image.put(above, pointers, child);
            image.stamp(above);
            let reason = reason(&image).expect("a reason");
            assert!(reason.contains("of the free space tree of group 0 by block is wrong"), "{reason}");
        }
    }
}
