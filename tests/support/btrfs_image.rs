//! Small btrfs file systems, made block by block, so that each of their fields can be wrong with right checksums.
//!
//! ```text
//! device     1 MiB            4 MiB, 6 MiB         8 MiB                 12 MiB
//! chunk      system, 1 MiB    metadata, 1 MiB DUP  data, 4 MiB
//! logical    1 MiB            4 MiB                8 MiB
//! holds      chunk tree       the other trees      64 KiB at its start, 4 KiB after 1 MiB
//! ```

use std::collections::BTreeMap;
use std::io;

use blkholefs::testing::filesystem::ReadBytes;
use blkholefs::testing::units::Bytes;

pub const MIB: u64 = 1 << 20;
/// The length of the device.
pub const LEN: u64 = 12 * MIB;
/// The size of a node, of a sector, and of the superblock.
pub const BLOCK: usize = 4096;
pub const SUPERBLOCK: u64 = 64 << 10;
/// Logical positions of the nodes. The first copy of each is at the same position on the device.
pub const CHUNK_TREE: u64 = MIB;
pub const ROOT_TREE: u64 = 4 * MIB;
pub const EXTENT_ROOT: u64 = ROOT_TREE + 4096;
pub const EXTENT_LEAVES: [u64; 2] = [EXTENT_ROOT + 4096, EXTENT_ROOT + 8192];
pub const DEVICE_TREE: u64 = ROOT_TREE + 4 * 4096;
pub const GROUP_TREE: u64 = ROOT_TREE + 5 * 4096;
/// The header of a node, and an item of a leaf.
pub const HEADER: usize = 101;
pub const ITEM: usize = 25;

const GENERATION: u64 = 9;
const FSID: [u8; 16] = [0xf5; 16];
const DEVICE_UUID: [u8; 16] = [0xde; 16];
const CHUNK_UUID: [u8; 16] = [0xc4; 16];

type Key = (u64, u8, u64);

/// A device that is zero except for some blocks.
#[derive(Clone)]
pub struct Image {
    pub len: u64,
    pub blocks: BTreeMap<u64, Box<[u8; BLOCK]>>,
}

impl ReadBytes for Image {
    fn len(&self) -> Bytes {
        Bytes::new(self.len)
    }

    fn read_exact(&self, offset: Bytes, buffer: &mut [u8]) -> io::Result<()> {
        let start = offset.get();
        let end = start.checked_add(buffer.len() as u64).filter(|&end| end <= self.len);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.fill(0);
        for (&at, block) in self.blocks.range(start.saturating_sub(BLOCK as u64 - 1)..end) {
            let (from, to) = (at.max(start), (at + BLOCK as u64).min(end));
            let target = &mut buffer[(from - start) as usize..(to - start) as usize];
            target.copy_from_slice(&block[(from - at) as usize..(to - at) as usize]);
        }
        Ok(())
    }
}

impl Image {
    /// A good file system, with a tree of block groups or with block groups in the extent tree.
    pub fn new(has_group_tree: bool) -> Self {
        let mut image = Self { len: LEN, blocks: BTreeMap::new() };
        let nodes = if has_group_tree { 6 } else { 5 };
        let chunks = [
            (MIB, MIB, 2, vec![MIB], 4096),
            (4 * MIB, MIB, 4 | 32, vec![4 * MIB, 6 * MIB], nodes * 4096),
            (8 * MIB, 4 * MIB, 1, vec![8 * MIB], (64 << 10) + 4096),
        ];
        let chunk_items =
            chunks.iter().map(|(start, len, flags, copies, _)| ((256, 228, *start), chunk(*len, *flags, copies)));
        let device = ((1, 216, 1), device());
        image.leaf(3, CHUNK_TREE, [device].into_iter().chain(chunk_items.clone()).collect());
        let mut extents = Vec::new();
        for (start, len, _, copies, _) in &chunks {
            extents.extend(copies.iter().map(|copy| ((1, 204, *copy), numbers(&[3, 256, *start, *len, 0, 0]))));
        }
        extents.sort();
        image.leaf(4, DEVICE_TREE, [((0, 249, 1), vec![0; 40])].into_iter().chain(extents).collect());
        let groups: Vec<_> = chunks
            .iter()
            .map(|(start, len, flags, _, used)| ((*start, 192, *len), numbers(&[*used, 256, *flags])))
            .collect();
        let node = |at: u64| ((at, 169, 0), numbers(&[1, GENERATION, 2]));
        let data = |at: u64, len: u64| ((at, 168, len), numbers(&[1, GENERATION, 1]));
        let mut used = vec![node(CHUNK_TREE), data(8 * MIB, 64 << 10), data(9 * MIB, 4096)];
        used.extend((0..nodes).map(|index| node(ROOT_TREE + index * 4096)));
        let mut roots = vec![((2, 132, 0), root(EXTENT_ROOT, 1)), ((4, 132, 0), root(DEVICE_TREE, 0))];
        if has_group_tree {
            roots.push(((11, 132, 0), root(GROUP_TREE, 0)));
            image.leaf(11, GROUP_TREE, groups);
        } else {
            used.extend(groups);
        }
        used.sort();
        let rest = used.split_off(4);
        let keys = [used[0].0, rest[0].0];
        image.leaf(2, EXTENT_LEAVES[0], used);
        image.leaf(2, EXTENT_LEAVES[1], rest);
        image.node(2, EXTENT_ROOT, &[(keys[0], EXTENT_LEAVES[0]), (keys[1], EXTENT_LEAVES[1])]);
        image.leaf(1, ROOT_TREE, roots);
        image.superblock(chunk_items.take(1).collect(), has_group_tree, (nodes + 1) * 4096 + (64 << 10) + 4096);
        image.stamp();
        image
    }

    /// Sets the bytes at a position within the block at `block`.
    pub fn put(&mut self, block: u64, at: usize, bytes: &[u8]) {
        self.block(block)[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The position in its block of the item with this index.
    pub fn item(&self, block: u64, index: usize) -> usize {
        let at = HEADER + ITEM * index + 17;
        HEADER + u32::from_le_bytes(self.blocks[&block][at..at + 4].try_into().expect("4 bytes")) as usize
    }

    /// Writes the checksums of all blocks.
    pub fn stamp(&mut self) {
        for block in self.blocks.values_mut() {
            let checksum = crc32c::crc32c(&block[32..]);
            block[..4].copy_from_slice(&checksum.to_le_bytes());
        }
    }

    fn block(&mut self, at: u64) -> &mut [u8; BLOCK] {
        self.blocks.entry(at).or_insert_with(|| Box::new([0; BLOCK]))
    }

    fn header(&mut self, tree: u64, at: u64, count: usize, level: u8) {
        self.put(at, 32, &FSID);
        self.put(at, 48, &numbers(&[at, 1 | 1 << 56]));
        self.put(at, 64, &CHUNK_UUID);
        self.put(at, 80, &numbers(&[GENERATION, tree, count as u64]));
        self.put(at, 100, &[level]);
    }

    fn leaf(&mut self, tree: u64, at: u64, items: Vec<(Key, Vec<u8>)>) {
        self.header(tree, at, items.len(), 0);
        let mut end = BLOCK - HEADER;
        for (index, (key, item)) in items.into_iter().enumerate() {
            end -= item.len();
            let entry = HEADER + ITEM * index;
            self.put(at, entry, &key_bytes(key));
            self.put(at, entry + 17, &(end as u32).to_le_bytes());
            self.put(at, entry + 21, &(item.len() as u32).to_le_bytes());
            self.put(at, HEADER + end, &item);
        }
    }

    fn node(&mut self, tree: u64, at: u64, children: &[(Key, u64)]) {
        self.header(tree, at, children.len(), 1);
        for (index, (key, child)) in children.iter().enumerate() {
            self.put(at, HEADER + 33 * index, &key_bytes(*key));
            self.put(at, HEADER + 33 * index + 17, &numbers(&[*child, GENERATION]));
        }
    }

    fn superblock(&mut self, system: Vec<(Key, Vec<u8>)>, has_group_tree: bool, used: u64) {
        let at = SUPERBLOCK;
        self.put(at, 32, &FSID);
        self.put(at, 48, &numbers(&[SUPERBLOCK, 1]));
        self.put(at, 64, b"_BHRfS_M");
        self.put(at, 72, &numbers(&[GENERATION, ROOT_TREE, CHUNK_TREE, 0, 0, LEN, used, 6, 1]));
        self.put(at, 144, &[4096_u32, 4096, 0, 4096].map(u32::to_le_bytes).concat());
        let array: Vec<u8> = system.into_iter().flat_map(|(key, item)| [key_bytes(key), item].concat()).collect();
        self.put(at, 160, &(array.len() as u32).to_le_bytes());
        self.put(at, 164, &numbers(&[GENERATION, 0, if has_group_tree { 0b1011 } else { 0 }, 0x341]));
        self.put(at, 201, &device());
        self.put(at, 811, &array);
    }
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn key_bytes((object, kind, offset): Key) -> Vec<u8> {
    [&object.to_le_bytes()[..], &[kind], &offset.to_le_bytes()].concat()
}

/// The item of a root.
fn root(node: u64, level: u8) -> Vec<u8> {
    let mut item = vec![0; 439];
    item[160..168].copy_from_slice(&GENERATION.to_le_bytes());
    item[176..184].copy_from_slice(&node.to_le_bytes());
    item[238] = level;
    item
}

/// The item of the device.
fn device() -> Vec<u8> {
    let mut item = [numbers(&[1, LEN, 7 * MIB]), vec![0; 74]].concat();
    item[66..82].copy_from_slice(&DEVICE_UUID);
    item[82..].copy_from_slice(&FSID);
    item
}

/// The item of a chunk.
fn chunk(len: u64, flags: u64, copies: &[u64]) -> Vec<u8> {
    let mut item = [numbers(&[len, 2, 65536, flags]), vec![0; 16]].concat();
    item[44] = copies.len() as u8;
    for copy in copies {
        item.extend([numbers(&[1, *copy]), DEVICE_UUID.to_vec()].concat());
    }
    item
}
