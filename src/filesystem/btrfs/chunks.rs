//! Chunks: logical ranges, and where their copies are on the device (`struct btrfs_chunk` of
//! `include/uapi/linux/btrfs_tree.h`).

use super::damaged;
use super::node::{KEY, Key};
use super::superblock::{DEVICE_ITEM, Device, Superblock};
use super::tree::Trees;
use crate::filesystem::fields::{array_at, u16_at, u64_at};
use crate::reason::DenseReason;

/// `BTRFS_CHUNK_TREE_OBJECTID`: the number of the tree.
const CHUNK_TREE: u64 = 3;
/// `BTRFS_FIRST_CHUNK_TREE_OBJECTID` and `BTRFS_CHUNK_ITEM_KEY`: the key of a chunk, with its logical position.
pub const CHUNKS_OBJECT: u64 = 256;
const CHUNK_ITEM: u8 = 228;
/// `BTRFS_DEV_ITEMS_OBJECTID` and `BTRFS_DEV_ITEM_KEY`: the key of a device, with its number.
const DEVICES_OBJECT: u64 = 1;
const DEV_ITEM: u8 = 216;
/// The length of a chunk without the places of its copies, and of such a place (`struct btrfs_stripe`).
const CHUNK: usize = 48;
const STRIPE: usize = 32;
/// `BTRFS_BLOCK_GROUP_*`: what is in a chunk, and that it has two copies on one device.
pub const DATA: u64 = 1;
pub const SYSTEM: u64 = 2;
pub const METADATA: u64 = 4;
const DUP: u64 = 1 << 5;
/// The most chunks: with the usual size of 1 GiB, those of a device of 1 PiB.
const MAX_CHUNKS: usize = 1 << 20;

/// A logical range with one or two copies on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The logical position.
    pub start: u64,
    pub len: u64,
    /// What is in the chunk, and its profile: the same as the flags of its block group.
    pub flags: u64,
    /// The position of the first copy on the device, and that of the second one, if there is one.
    copies: [Option<u64>; 2],
}

impl Chunk {
    /// The first logical position behind the chunk.
    fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Whether the chunk holds the `len` bytes from the logical position `at` on.
    pub fn holds(&self, at: u64, len: u64) -> bool {
        self.start <= at && at.checked_add(len).is_some_and(|end| end <= self.end())
    }

    /// Whether no trees are in the chunk.
    pub const fn is_only_data(&self) -> bool {
        self.flags & (SYSTEM | METADATA) == 0
    }

    /// The positions on the device of the byte at the logical position `at`, which the chunk holds.
    pub fn copies_of(&self, at: u64) -> impl Iterator<Item = u64> {
        let offset = at.saturating_sub(self.start);
        self.copies.into_iter().flatten().map(move |copy| copy.saturating_add(offset))
    }

    /// Parses the item of a chunk. The device must hold all of its copies.
    fn parse(start: u64, item: &[u8], superblock: &Superblock) -> Result<Self, DenseReason> {
        let (len, flags, count) = (u64_at(item, 0), u64_at(item, 24), usize::from(u16_at(item, 44)));
        let copies = match flags & !(DATA | SYSTEM | METADATA) {
            0 => 1,
            DUP => 2,
            other => return Err(format!("its chunks have the profile {other:#x}, which is not supported").into()),
        };
        let is_multiple = |number: u64| number.is_multiple_of(superblock.sector_size);
        let is_range = len > 0 && is_multiple(len) && is_multiple(start) && start.checked_add(len).is_some();
        if count != copies || item.len() != CHUNK + STRIPE * copies || flags & 7 == 0 || !is_range {
            return Err(damaged("a chunk has a wrong length or number of copies"));
        }
        let mut chunk = Self { start, len, flags, copies: [None; 2] };
        for (copy, stripe) in chunk.copies.iter_mut().zip(item.get(CHUNK..).unwrap_or_default().chunks(STRIPE)) {
            let at = u64_at(stripe, 8);
            let is_inside = at.checked_add(len).is_some_and(|end| end <= superblock.device.len) && is_multiple(at);
            if u64_at(stripe, 0) != superblock.device.id || array_at(stripe, 16) != superblock.device.uuid || !is_inside
            {
                return Err(damaged("a chunk is on another device or lies beyond the end of this one"));
            }
            *copy = Some(at);
        }
        Ok(chunk)
    }
}

/// Chunks that do not overlap, in the order of their logical positions.
pub struct Chunks(Vec<Chunk>);

impl Chunks {
    fn new(mut chunks: Vec<Chunk>) -> Result<Self, DenseReason> {
        chunks.sort_unstable_by_key(|chunk| chunk.start);
        if chunks.windows(2).any(|pair| pair[0].end() > pair[1].start) {
            return Err(damaged("its chunks overlap"));
        }
        Ok(Self(chunks))
    }

    /// The index of the chunk that holds the byte at a logical position.
    pub fn index_at(&self, at: u64) -> Option<usize> {
        let index = self.0.partition_point(|chunk| chunk.end() <= at);
        self.0.get(index).filter(|chunk| chunk.start <= at).map(|_| index)
    }

    /// The chunk that holds the byte at a logical position.
    pub fn at(&self, at: u64) -> Option<&Chunk> {
        self.0.get(self.index_at(at)?)
    }

    /// All chunks.
    pub fn all(&self) -> &[Chunk] {
        &self.0
    }

    /// The copies of all chunks: the position on the device, the length, and the logical position.
    pub fn copies(&self) -> Vec<(u64, u64, u64)> {
        let mut copies: Vec<_> =
            self.0.iter().flat_map(|c| c.copies_of(c.start).map(|at| (at, c.len, c.start))).collect();
        copies.sort_unstable();
        copies
    }

    /// Checks that all of `system`, the chunks in the superblock, are among these, and all of these that hold the chunk tree
    /// are in `system`.
    pub fn check_contains(&self, system: &Self) -> Result<(), DenseReason> {
        let of_system: Vec<_> = self.0.iter().filter(|chunk| chunk.flags & SYSTEM != 0).collect();
        if system.0.iter().collect::<Vec<_>>() == of_system {
            return Ok(());
        }
        Err(damaged("the chunks in its superblock differ from those in its chunk tree"))
    }
}

/// The chunks in the superblock, in which the chunk tree is.
///
/// # Errors
/// When one of them is damaged or not supported.
pub fn system_chunks(superblock: &Superblock) -> Result<Chunks, DenseReason> {
    let mut rest = &superblock.system_chunks[..];
    let mut chunks = Vec::new();
    while !rest.is_empty() {
        let truncated = || damaged("its list of chunks is truncated");
        let (key, item) = rest.split_at_checked(KEY).ok_or_else(truncated)?;
        let len = CHUNK + STRIPE * usize::from(u16_at(item, 44));
        let (item, next) = item.split_at_checked(len).ok_or_else(truncated)?;
        let key = Key::parse(key);
        if (key.object, key.kind) != (CHUNKS_OBJECT, CHUNK_ITEM) {
            return Err(damaged("its list of chunks holds something else"));
        }
        chunks.push(Chunk::parse(key.offset, item, superblock)?);
        rest = next;
    }
    Chunks::new(chunks)
}

/// Reads all chunks from the chunk tree.
///
/// # Errors
/// When the tree is damaged, when it names another device, and when it cannot be read.
pub fn read(trees: &mut Trees<'_>) -> Result<Chunks, DenseReason> {
    let superblock = trees.superblock;
    let mut chunks = Vec::new();
    let mut devices = Vec::new();
    trees.walk(CHUNK_TREE, superblock.chunk_tree, &mut |key, item| match (key.object, key.kind) {
        (CHUNKS_OBJECT, CHUNK_ITEM) if chunks.len() < MAX_CHUNKS => {
            chunks.push(Chunk::parse(key.offset, item, superblock)?);
            Ok(())
        }
        (DEVICES_OBJECT, DEV_ITEM) if devices.is_empty() && item.len() == DEVICE_ITEM => {
            devices.push((key.offset, Device::parse(item)));
            Ok(())
        }
        (DEVICES_OBJECT, DEV_ITEM) => Err("it has several devices".into()),
        (CHUNKS_OBJECT, CHUNK_ITEM) => Err("it has too many chunks".into()),
        _ => Err(damaged("its chunk tree has an item of an unknown kind")),
    })?;
    if devices != [(superblock.device.id, superblock.device)] {
        return Err(damaged("its device differs from that in its superblock"));
    }
    Chunks::new(chunks)
}
