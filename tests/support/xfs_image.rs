//! Small XFS file systems in memory, made by hand: with trees of any height, and for changes to their bytes with right
//! checksums. The layouts are those of `src/filesystem/xfs`, and the real file systems of `tests/used_xfs.rs` show that these
//! are right.

use std::collections::BTreeMap;
use std::io;

use blkholefs::testing::filesystem::ReadBytes;
use blkholefs::testing::units::Bytes;

const SECTOR: usize = 512;
const GROUP_BYTES: u64 = 16 << 20;
/// The length of the last group in blocks.
const LAST_GROUP: u64 = 4000;
/// Where the log of group 0 is, and its length, in blocks of the file system.
const LOG: u64 = 3900;
const LOG_BLOCKS: u64 = 128;
/// The entries of the free list, from this place on.
const LISTED: u32 = 3;
const FIRST_LISTED: u32 = 5;
const UUID: [u8; 16] = *b"blkholefs-tests!";

/// What kind of file system.
#[derive(Clone, Copy)]
pub struct Shape {
    /// 4 or 5.
    pub version: u16,
    /// The most entries of a block of a tree. Few make trees high.
    pub entries: usize,
    /// The free extents of each group.
    pub extents: u32,
    /// The head of the log, from 2 to the length of the log in blocks of 512 bytes.
    pub head: u64,
}

/// A structure in an image, and where in it the checksum is.
#[derive(Clone, Copy)]
pub struct Structure {
    pub offset: u64,
    pub len: usize,
    checksum: Option<usize>,
}

/// A device with zeros but for some sectors.
#[derive(Clone)]
pub struct XfsImage {
    len: u64,
    sectors: BTreeMap<u64, [u8; SECTOR]>,
    pub structures: Vec<Structure>,
}

impl ReadBytes for XfsImage {
    fn len(&self) -> Bytes {
        Bytes::new(self.len)
    }

    fn read_exact(&self, offset: Bytes, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.get().checked_add(buffer.len() as u64).filter(|end| *end <= self.len);
        end.ok_or(io::ErrorKind::UnexpectedEof)?;
        self.copy(offset.get(), buffer);
        Ok(())
    }
}

impl XfsImage {
    /// The file system of this shape. Its device is a bit longer than it.
    pub fn new(shape: Shape) -> Self {
        let (sectors, structures) = (BTreeMap::new(), Vec::new());
        let mut image = Self { len: GROUP_BYTES + LAST_GROUP * block_size(shape) + 700, sectors, structures };
        let free: u64 = (0..2).map(|group| image.add_group(shape, group)).sum();
        image.add_log(shape);
        let blocks = GROUP_BYTES / block_size(shape) + LAST_GROUP;
        image.add(0, &superblock(shape, blocks, free), (shape.version == 5).then_some(224));
        image
    }

    /// Makes the device shorter.
    pub fn cut(&mut self, len: u64) {
        self.len = self.len.min(len);
    }

    /// Writes a structure.
    fn add(&mut self, offset: u64, bytes: &[u8], checksum: Option<usize>) {
        let structure = Structure { offset, len: bytes.len(), checksum };
        self.structures.push(structure);
        self.write(offset, bytes);
        self.stamp(structure);
    }

    /// The bytes of a structure.
    pub fn bytes(&self, structure: Structure) -> Vec<u8> {
        let mut bytes = vec![0; structure.len];
        self.copy(structure.offset, &mut bytes);
        bytes
    }

    /// Fills `buffer` with the bytes at `offset`, whatever the length of the device is.
    fn copy(&self, offset: u64, buffer: &mut [u8]) {
        let sector = |position: u64| position / SECTOR as u64;
        let (mut at, end) = (offset, offset + buffer.len() as u64);
        buffer.fill(0);
        for (number, bytes) in self.sectors.range(sector(offset)..sector(end + SECTOR as u64 - 1)) {
            let start = number * SECTOR as u64;
            at = at.max(start);
            let part = &bytes[(at - start) as usize..(end.min(start + SECTOR as u64) - start) as usize];
            buffer[(at - offset) as usize..][..part.len()].copy_from_slice(part);
        }
    }

    /// Writes whole sectors.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (sector, bytes) in (offset / SECTOR as u64..).zip(bytes.chunks(SECTOR)) {
            self.sectors.insert(sector, bytes.try_into().unwrap());
        }
    }

    /// Changes a word of a structure.
    pub fn put(&mut self, structure: Structure, at: usize, value: u32) {
        let place = structure.offset + (at / 4 * 4 % structure.len) as u64;
        let sector = self.sectors.entry(place / SECTOR as u64).or_insert([0; SECTOR]);
        let at = (place % SECTOR as u64) as usize;
        sector[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    /// Makes the checksum of a structure right, if it has one.
    pub fn stamp(&mut self, structure: Structure) {
        let Some(at) = structure.checksum else { return };
        self.put(structure, at, 0);
        let crc = crc32c::crc32c(&self.bytes(structure));
        self.put(structure, at, crc.swap_bytes());
    }

    /// Adds a group. Returns the blocks that the superblock counts as free in it.
    fn add_group(&mut self, shape: Shape, group: u32) -> u64 {
        let (block, checked) = (block_size(shape), shape.version == 5);
        let start = u64::from(group) * GROUP_BYTES;
        let length = if group == 0 { GROUP_BYTES / block } else { LAST_GROUP } as u32;
        // Lengths that differ, so that the two trees have different orders.
        let extents: Vec<_> = (0..shape.extents).map(|at| (1000 + at * 12, 1 + at * 7 % 11)).collect();
        let mut by_length = extents.clone();
        by_length.sort_by_key(|(start, length)| (*length, *start));
        let mut next = 100;
        let (by_block, levels) = self.add_tree(shape, group, *b"AB3BABTB", &extents, &mut next);
        let (by_length, _) = self.add_tree(shape, group, *b"AB3CABTC", &by_length, &mut next);
        let free: u32 = extents.iter().map(|(_, length)| length).sum();
        let trees = next - 100 - 2;
        let longest = extents.iter().map(|(_, length)| *length).max().unwrap_or(0);
        let mut agf = vec![0; SECTOR];
        let fields = [1, group, length, by_block, by_length, 0, levels, levels, 0];
        agf[..4].copy_from_slice(b"XAGF");
        words(&mut agf, 4, &fields);
        words(&mut agf, 40, &[FIRST_LISTED, FIRST_LISTED + LISTED - 1, LISTED, free, longest, trees]);
        agf[64..80].copy_from_slice(&UUID);
        self.add(start + SECTOR as u64, &agf, checked.then_some(216));
        let mut list = vec![0; SECTOR];
        let entries = if checked { 36 } else { 0 };
        words(&mut list, entries + FIRST_LISTED as usize * 4, &[90, 92, 91]);
        if checked {
            list[..4].copy_from_slice(b"XAFL");
            words(&mut list, 4, &[group]);
            list[8..24].copy_from_slice(&UUID);
        }
        self.add(start + 3 * SECTOR as u64, &list, checked.then_some(32));
        u64::from(free + trees + LISTED)
    }

    /// Adds a tree, whose blocks are taken from `next` on. Returns its root and the number of its levels.
    fn add_tree(
        &mut self,
        shape: Shape,
        group: u32,
        magic: [u8; 8],
        extents: &[(u32, u32)],
        next: &mut u32,
    ) -> (u32, u32) {
        let mut entries: Vec<_> = extents.iter().map(|(start, length)| ([*start, *length], 0)).collect();
        let (block, checked) = (block_size(shape), shape.version == 5);
        for level in 0.. {
            let chunks: Vec<_> = match entries.is_empty() {
                true => vec![&entries[..]],
                false => entries.chunks(shape.entries).collect(),
            };
            let numbers = *next..*next + chunks.len() as u32;
            let mut above = Vec::new();
            for (number, chunk) in numbers.clone().zip(&chunks) {
                let mut bytes = vec![0; block as usize];
                bytes[..4].copy_from_slice(if checked { &magic[..4] } else { &magic[4..] });
                let left = if number == numbers.start { u32::MAX } else { number - 1 };
                let right = if number + 1 == numbers.end { u32::MAX } else { number + 1 };
                words(&mut bytes, 4, &[level << 16 | chunk.len() as u32, left, right]);
                let offset = u64::from(group) * GROUP_BYTES + u64::from(number) * block;
                if checked {
                    words(&mut bytes, 16, &[0, (offset / 512) as u32]);
                    bytes[32..48].copy_from_slice(&UUID);
                    words(&mut bytes, 48, &[group]);
                }
                let header = if checked { 56 } else { 16 };
                let pointers = header + (block as usize - header) / 12 * 8;
                for (at, (extent, child)) in chunk.iter().enumerate() {
                    words(&mut bytes, header + at * 8, extent);
                    if level > 0 {
                        words(&mut bytes, pointers + at * 4, &[*child]);
                    }
                }
                self.add(offset, &bytes, checked.then_some(52));
                above.extend(chunk.first().map(|(extent, _)| (*extent, number)));
            }
            *next = numbers.end;
            if numbers.len() == 1 {
                return (numbers.start, level + 1);
            }
            entries = above;
        }
        unreachable!()
    }

    /// Adds the log: blocks of two cycles, and before the head the record of an unmount.
    fn add_log(&mut self, shape: Shape) {
        let block = block_size(shape);
        let start = LOG * block;
        let count = LOG_BLOCKS * block / SECTOR as u64;
        for at in 0..count {
            let mut bytes = [0; SECTOR];
            words(&mut bytes, 0, &[if at < shape.head { 3 } else { 2 }]);
            self.write(start + at * SECTOR as u64, &bytes);
        }
        let first = shape.head - 2;
        let mut header = vec![0; SECTOR];
        words(
            &mut header,
            0,
            &[0xfeed_babe, 3, if shape.version == 5 { 2 } else { 1 }, SECTOR as u32, 3, first as u32],
        );
        words(&mut header, 40, &[1]);
        header[304..320].copy_from_slice(&UUID);
        words(&mut header, 320, &[32 << 10]);
        self.add(start + first * SECTOR as u64, &header, None);
        let mut data = vec![0; SECTOR];
        words(&mut data, 0, &[3, 8, 0xaa20_0000, 0x6e55_0000]);
        self.add(start + (first + 1) * SECTOR as u64, &data, None);
    }
}

/// The size of a block in bytes.
pub fn block_size(shape: Shape) -> u64 {
    if shape.version == 5 { 1024 } else { 512 }
}

/// The ranges that are used in every undamaged image, in bytes: the headers of both groups, and the log.
pub fn headers_and_log(shape: Shape) -> [std::ops::Range<u64>; 3] {
    let log = LOG * block_size(shape);
    [0..2048, GROUP_BYTES..GROUP_BYTES + 2048, log..log + LOG_BLOCKS * block_size(shape)]
}

fn superblock(shape: Shape, blocks: u64, free: u64) -> Vec<u8> {
    let block = block_size(shape) as u32;
    let (block_log, inode_log) = (block.ilog2(), 8 + u32::from(shape.version == 5));
    let group_blocks = GROUP_BYTES as u32 / block;
    let mut bytes = vec![0; SECTOR];
    bytes[..4].copy_from_slice(b"XFSB");
    words(&mut bytes, 4, &[block, 0, blocks as u32]);
    bytes[32..48].copy_from_slice(&UUID);
    // The log, and the inode of the root directory in block 95.
    words(&mut bytes, 48, &[0, LOG as u32, 0, 95 << (block_log - inode_log)]);
    words(&mut bytes, 84, &[group_blocks, 2, 0, LOG_BLOCKS as u32]);
    let features: u16 = if shape.version == 5 { 0xb4a5 } else { 0xb084 };
    words(&mut bytes, 100, &[u32::from(features) << 16 | SECTOR as u32]);
    words(&mut bytes, 104, &[1 << (inode_log + 16) | block >> inode_log]);
    let logs = [block_log, 9, inode_log, block_log - inode_log, group_blocks.ilog2()].map(|log| log as u8);
    bytes[120..125].copy_from_slice(&logs);
    words(&mut bytes, 144, &[0, free as u32]);
    let more = if shape.version == 5 { 0x18a } else { 0xa };
    words(&mut bytes, 200, &[more, more]);
    bytes
}

/// Writes big-endian words.
fn words(bytes: &mut [u8], at: usize, words: &[u32]) {
    for (place, word) in bytes[at..].chunks_mut(4).zip(words) {
        place.copy_from_slice(&word.to_be_bytes());
    }
}
