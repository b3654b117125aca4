//! Damages images of thin metadata where it hurts, makes their checksums right, and reads all of them.
//!
//! Invariant: whatever the image, reading it ends, without a panic, in an error or in a map; and where a device has a
//! map, look-ups of single blocks in its tree agree with it.

use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;

use blkholefs::map::{Block, HoleMap};
use blkholefs::source::thin::lookup::NodeCache;
use blkholefs::source::thin::metadata::Metadata;
use blkholefs::source::thin::reader::MetadataReader;
use blkholefs::source::thin::{MetaBlock, ThinId};
use blkholefs::units::Bytes;

use super::thin_image::{BLOCK, NODE, SUPERBLOCK, get, put, stamp};

/// One change, made of any bytes.
pub type Edit = [u8; 8];

/// The positions of fields that matter in a superblock and in a node, each with its size.
const SUPERBLOCK_FIELDS: [(usize, usize); 10] =
    [(4, 4), (8, 8), (40, 4), (56, 8), (320, 8), (328, 8), (336, 4), (340, 4), (344, 8), (360, 4)];
const NODE_FIELDS: [(usize, usize); 5] = [(4, 4), (8, 8), (16, 4), (20, 4), (24, 4)];

/// Changes a field or some bytes of a block, then makes its checksum right.
pub fn edit(image: &mut [u8], edit: Edit) {
    let blocks = image.len() / BLOCK;
    let [which, place, how, entry, value @ ..] = edit;
    let number = usize::from(which) % blocks;
    let base = number * BLOCK;
    let entry = usize::from(entry);
    let (at, size) = match (place % 8, number) {
        (0..=1, 0) => SUPERBLOCK_FIELDS[entry % SUPERBLOCK_FIELDS.len()],
        (0..=1, _) => NODE_FIELDS[entry % NODE_FIELDS.len()],
        (2..=3, _) => (32 + 8 * (entry % 8), 8),
        (4..=5, _) => (32 + 8 * 252 + 8 * (entry % 8), 8),
        (6, _) => (32 + 8 * 126 + 24 * (entry % 8), 8),
        _ => (entry * 16 % BLOCK, 4),
    };
    let value = u64::from(u32::from_le_bytes(value));
    let old = get(image, base + at, size);
    let new = match how % 6 {
        0 => value,
        1 => value % (blocks as u64 + 2),
        2 => old.wrapping_add(value % 5).wrapping_sub(2),
        3 => u64::MAX - value % 3,
        4 => old ^ (1 << (value % (8 * size as u64))),
        // A number that stands elsewhere in the image: another node's key, child or count.
        _ => get(image, usize::try_from(value).unwrap_or(0) % (image.len() / 8) * 8, size),
    };
    put(image, base + at, new, size);
    stamp(image, number, if number == 0 { SUPERBLOCK } else { NODE });
}

/// Reads everything that the image has; returns how many maps it gave.
pub fn read_everything(image: &[u8]) -> usize {
    let file = tempfile::tempfile().expect("a temporary file");
    file.write_all_at(image, 0).expect("room for an image");
    let reader = MetadataReader::new(file).expect("a file has a length");
    let Ok(metadata) = Metadata::open(reader, MetaBlock::SUPERBLOCK) else { return 0 };
    let mut ids: Vec<ThinId> = (0..6).filter_map(ThinId::new).collect();
    let listed = metadata.devices().unwrap_or_default();
    ids.extend(listed.into_iter().take(8));
    ids.iter().filter(|id| read_device(&metadata, **id)).count()
}

fn read_device(metadata: &Metadata, id: ThinId) -> bool {
    let size = metadata.superblock().data_block_size.bytes();
    let len = Bytes::new(size.get() * 3000 - 512);
    let details = metadata.details(id);
    let map = metadata.map(id, len, 2);
    let cache = NodeCache::new(NonZeroUsize::new(3).expect("not zero"));
    let Ok(tree) = metadata.mapping_tree(id) else {
        assert!(map.is_err(), "a map without a tree");
        return false;
    };
    for key in (0..3000).step_by(61) {
        let found = tree.next(key, metadata.reader(), &cache);
        if let Ok(map) = &map {
            let found = found.expect("a whole tree has no damaged path").map(|(key, _)| key).filter(|key| *key < 3000);
            assert_eq!(found, map.next_mapped(Block::new(key)).map(Block::get), "at or after {key}");
        }
    }
    if let Ok(map) = &map {
        assert!(map.mapped_blocks() <= details.expect("a map has details").mapped_blocks);
        assert!(map.allocated().is_some_and(|allocated| allocated <= len));
        assert!(map.memory() < Bytes::new(64 << 10));
    }
    map.is_ok()
}
