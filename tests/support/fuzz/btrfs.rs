//! Small btrfs file systems that are damaged with right checksums.
//!
//! Invariant: an image is refused or has a map of its length, without a panic and in bounded memory. In a map, all that was read
//! to make it is data: the superblock, and every node that is not refused.
//!
//! An input is the number of an image (one byte), and edits of eight bytes each: the block, the position in it, how many bytes,
//! and the bytes.

#[path = "../btrfs_image.rs"]
#[allow(dead_code)]
mod btrfs_image;

use blkholefs::testing::filesystem::btrfs::used;
use blkholefs::testing::map::{ExtentKind, HoleMap as _, view};
use blkholefs::testing::units::Bytes;
use btrfs_image::{BLOCK, CHUNK_TREE, Image, LEN, ROOT_TREE, SUPERBLOCK};

/// The most edits of one input.
const MAX_EDITS: usize = 32;

pub fn run(input: &[u8]) {
    let Some((which, edits)) = input.split_first() else { return };
    let mut image = Image::new(which % 2 == 1);
    let blocks: Vec<u64> = image.blocks.keys().copied().collect();
    let (edits, _) = edits.as_chunks::<8>();
    for [block, low, high, count, bytes @ ..] in edits.iter().take(MAX_EDITS) {
        let bytes = &bytes[..usize::from(*count % 4) + 1];
        let at = usize::from(u16::from_le_bytes([*low, *high])) % (BLOCK - bytes.len() + 1);
        image.put(blocks[usize::from(*block) % blocks.len()], at, bytes);
    }
    image.stamp();
    let map = used(&image);
    assert!(map.is_ok() || !edits.is_empty(), "an image without edits is good");
    let Ok(map) = map else { return };
    assert_eq!(map.len(), Bytes::new(LEN));
    let mut end = Bytes::ZERO;
    for (start, extent) in view::runs(&map, Bytes::new(1), Bytes::ZERO..map.len()) {
        assert_eq!(start, end);
        end = extent.end;
        if extent.kind != ExtentKind::Data {
            let is_free = |at: u64| start.get() < at + BLOCK as u64 && at < end.get();
            assert!(!is_free(0) && !is_free(SUPERBLOCK), "the reserved range is free");
            // The positions of these two nodes follow from the superblock, if it is as it was.
            let is_kept = image.blocks[&SUPERBLOCK][80..96] == Image::new(which % 2 == 1).blocks[&SUPERBLOCK][80..96];
            assert!(!is_kept || !(is_free(CHUNK_TREE) || is_free(ROOT_TREE)), "a root is free");
        }
    }
    assert_eq!(end, map.len());
}
