//! Damages fields of thin metadata images, recomputes the checksums, and reads every device.
//!
//! Invariant: whatever the image, reading it ends, without a panic, in an error or in a map. Where a device has a map, it
//! maps what a reader without any checks finds in the bytes, and look-ups of single blocks agree with it. Where two devices
//! have maps, the changes between them are those that this reader finds.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;

use blkholefs::testing::map::{ExtentKind, FillMap, HoleMap};
use blkholefs::testing::source::thin::changes::Compared;
use blkholefs::testing::source::thin::lookup::NodeCache;
use blkholefs::testing::source::thin::metadata::Metadata;
use blkholefs::testing::source::thin::reader::MetadataReader;
use blkholefs::testing::source::thin::{MetaBlock, ThinId};
use blkholefs::testing::units::Bytes;

use super::thin_image::{BLOCK, NODE, SUPERBLOCK, get, put, stamp};

/// The most edits of one input. More of them leave hardly a tree that can be read.
const MAX_EDITS: usize = 64;

/// One change, encoded in arbitrary bytes.
pub type Edit = [u8; 8];

/// The positions of the fields that the reader uses in a superblock and in a node, each with its size.
const SUPERBLOCK_FIELDS: [(usize, usize); 10] =
    [(4, 4), (8, 8), (40, 4), (56, 8), (320, 8), (328, 8), (336, 4), (340, 4), (344, 8), (360, 4)];
const NODE_FIELDS: [(usize, usize); 5] = [(4, 4), (8, 8), (16, 4), (20, 4), (24, 4)];
/// Where a superblock names the copy that is held as the metadata snapshot.
const HELD_ROOT: usize = 56;
/// The magic number of a superblock, at byte 32.
const MAGIC: u64 = 27_022_010;
/// Blocks of a device that are compared with its map.
const KEYS: u64 = 1000;

/// An image in a file. Changes are made in place and taken back, so that a round costs what it reads and not what the
/// image holds.
pub struct Image {
    whole: Vec<u8>,
    bytes: Vec<u8>,
    file: File,
    changed: BTreeSet<usize>,
}

impl Image {
    /// The image with these bytes, a multiple of the block size, and one more block: a held copy of the superblock.
    pub fn new(mut whole: Vec<u8>) -> Self {
        let held = whole.len() / BLOCK;
        whole.extend_from_within(..BLOCK);
        put(&mut whole, held * BLOCK + 8, held as u64, 8);
        put(&mut whole, HELD_ROOT, held as u64, 8);
        for number in [0, held] {
            stamp(&mut whole, number, SUPERBLOCK);
        }
        let file = tempfile::tempfile().expect("a temporary file");
        file.write_all_at(&whole, 0).expect("room for an image");
        Self { bytes: whole.clone(), whole, file, changed: BTreeSet::new() }
    }

    /// Makes `edits`, keeps the first `len` bytes if that is less, reads everything, and takes all back; returns how many
    /// maps there were.
    pub fn read_edited(&mut self, edits: &[Edit], len: Option<usize>) -> usize {
        for edit in edits {
            self.edit(*edit);
        }
        self.write_changed();
        if let Some(len) = len.filter(|len| *len < self.whole.len()) {
            self.file.set_len(len as u64).expect("a file becomes shorter");
        }
        let maps = read_everything(self.file.try_clone().expect("a free descriptor"), &self.bytes);
        for number in &self.changed {
            let block = number * BLOCK..(number + 1) * BLOCK;
            self.bytes[block.clone()].copy_from_slice(&self.whole[block]);
        }
        self.write_changed();
        self.changed.clear();
        if let Some(len) = len.filter(|len| *len < self.whole.len()) {
            self.file.write_all_at(&self.whole[len..], len as u64).expect("room for an image");
        }
        maps
    }

    fn write_changed(&self) {
        for number in &self.changed {
            let block = &self.bytes[number * BLOCK..][..BLOCK];
            self.file.write_all_at(block, (number * BLOCK) as u64).expect("room for a block");
        }
    }

    /// Changes a field or some bytes of a block, then makes its checksum right.
    fn edit(&mut self, edit: Edit) {
        let image = &mut self.bytes;
        let blocks = image.len() / BLOCK;
        let [which, place, how, entry, value @ ..] = edit;
        let number = usize::from(which) % blocks;
        let base = number * BLOCK;
        let entry = usize::from(entry);
        let is_superblock = get(&self.whole, base + 32, 8) == MAGIC;
        let (at, size) = match (place % 8, is_superblock) {
            (0..=1, true) => SUPERBLOCK_FIELDS[entry % SUPERBLOCK_FIELDS.len()],
            (0..=1, false) => NODE_FIELDS[entry % NODE_FIELDS.len()],
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
        stamp(image, number, if is_superblock { SUPERBLOCK } else { NODE });
        self.changed.insert(number);
    }
}

/// Reads all devices that the metadata in `file` has, and some that it may not have; returns how many maps it gave.
/// `bytes` are what is in the file, which may end earlier.
fn read_everything(file: File, bytes: &[u8]) -> usize {
    let other = file.try_clone().expect("a free descriptor");
    let open = |file, location| Metadata::open(MetadataReader::new(file).expect("a file has a length"), location);
    let Ok(metadata) = open(file, MetaBlock::SUPERBLOCK) else { return 0 };
    let mut ids: BTreeSet<ThinId> = (0..6).filter_map(ThinId::new).collect();
    ids.extend(metadata.devices().unwrap_or_default().into_iter().take(8));
    if let Some(held) = metadata.superblock().held_root
        && let Ok(held) = open(other, held)
    {
        let _ = held.devices();
        for id in &ids {
            let _ = (held.mapping_tree(*id), held.details(*id));
        }
    }
    let maps: BTreeSet<ThinId> = ids.iter().copied().filter(|id| read_device(&metadata, *id, bytes)).collect();
    let ids: Vec<ThinId> = ids.into_iter().collect();
    for pair in ids.windows(2) {
        for (older, newer) in [(pair[0], pair[1]), (pair[1], pair[0])] {
            read_changes(&metadata, older, newer, bytes, maps.contains(&older) && maps.contains(&newer));
        }
    }
    maps.len()
}

/// Compares two devices. Where both have a map, the changes are those of a reader without checks.
fn read_changes(metadata: &Metadata, older: ThinId, newer: ThinId, bytes: &[u8], have_maps: bool) {
    let size = metadata.superblock().data_block_size.bytes();
    let len = Bytes::new(size.get() * KEYS - 512);
    let [of_older, of_newer] = [older, newer].map(|id| Compared { id, len });
    let changes = metadata.changes(of_older, of_newer, false);
    if !have_maps {
        return;
    }
    let changes = changes.expect("two whole trees can be compared");
    let entries_of = |id| entries(bytes, metadata.mapping_tree(id).expect("a map has a tree").root.get());
    let (of_older, of_newer) = (entries_of(older), entries_of(newer));
    for key in 0..KEYS {
        let block = |entries: &BTreeMap<u64, u64>| entries.get(&key).map(|value| value >> 24);
        let expected = match (block(&of_older), block(&of_newer)) {
            (older, newer) if older == newer => ExtentKind::Unchanged,
            (_, Some(_)) => ExtentKind::Data,
            (_, None) => ExtentKind::Hole,
        };
        assert_eq!(changes.extent_at(Bytes::new(key * size.get())).kind, expected, "block {key}");
    }
}

fn read_device(metadata: &Metadata, id: ThinId, bytes: &[u8]) -> bool {
    let size = metadata.superblock().data_block_size.bytes();
    let len = Bytes::new(size.get() * KEYS - 512);
    let details = metadata.details(id);
    let map = metadata.map(id, len, 2);
    let Ok(tree) = metadata.mapping_tree(id) else {
        assert!(map.is_err(), "a map without a tree");
        return false;
    };
    // A cache that keeps all, and for a few keys one that evicts nodes while they are used.
    let cache = |nodes| NodeCache::new(NonZeroUsize::new(nodes).expect("not zero"));
    let (large, small) = (cache(256), cache(3));
    let next_mapped = |map: &FillMap, key: u64| {
        Some(map.next_data(Bytes::new(key * size.get()))).filter(|data| *data < len).map(|data| data.get() / size.get())
    };
    // Without a map there is nothing to compare, only paths with and without damage.
    let step = if map.is_ok() { 53 } else { 211 };
    let keys = (0..KEYS).step_by(step).map(|key| (key, &large)).chain([155, 310].map(|key| (key, &small)));
    for (key, cache) in keys {
        let found = tree.next(key, metadata.reader(), cache);
        if let Ok(map) = &map {
            let found = found.expect("a whole tree has no damaged path").map(|(key, _)| key).filter(|key| *key < KEYS);
            assert_eq!(found, next_mapped(map, key), "at or after {key}");
        }
    }
    if let Ok(map) = &map {
        let mapped: BTreeSet<u64> =
            std::iter::successors(next_mapped(map, 0), |key| next_mapped(map, key + 1)).collect();
        let mut found = entries(bytes, tree.root.get());
        found.retain(|key, _| *key < KEYS);
        assert!(mapped.iter().eq(found.keys()), "{mapped:?} is not what the tree has: {found:?}");
        assert!(mapped.len() as u64 <= details.expect("a map has details").mapped_blocks);
        assert!(map.allocated().is_some_and(|allocated| allocated <= len));
        assert!(map.memory() < Bytes::new(64 << 10));
    }
    map.is_ok()
}

/// The entries of a tree, read without checks. A map was made of it, so all of it lies in the image.
fn entries(bytes: &[u8], root: u64) -> BTreeMap<u64, u64> {
    let (mut entries, mut nodes) = (BTreeMap::new(), vec![root]);
    while let Some(node) = nodes.pop() {
        let node = &bytes[usize::try_from(node).expect("a block of the image") * BLOCK..][..BLOCK];
        let field = |at, size| usize::try_from(get(node, at, size)).expect("a field of 32 bits");
        let values = 32 + 8 * field(20, 4);
        for index in 0..field(16, 4) {
            let (key, value) = (get(node, 32 + 8 * index, 8), get(node, values + 8 * index, 8));
            if field(4, 4) == 1 {
                nodes.push(value);
            } else {
                entries.insert(key, value);
            }
        }
        assert!(nodes.len() < bytes.len(), "a tree without an end");
    }
    entries
}

/// Reads one of the images as an input of a fuzz target has it: the number of the image (one byte), a length to which it is cut
/// (two bytes; most values do not cut it), and edits.
pub fn run(images: &mut [Image], input: &[u8]) {
    let Some(([which, low, high], edits)) = input.split_first_chunk() else { return };
    let (edits, _) = edits.as_chunks();
    let cut = usize::from(u16::from_le_bytes([*low, *high]));
    let count = images.len();
    let image = &mut images[usize::from(*which) % count];
    image.read_edited(&edits[..edits.len().min(MAX_EDITS)], (cut % 16 == 1).then_some(cut * 16));
}
