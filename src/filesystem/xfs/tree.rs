//! The two free space trees of an allocation group.
//!
//! A block of a tree begins with a header. Level 0 has extents of free blocks. The levels above have keys, which are the
//! first extents of the blocks below, and then the numbers of these blocks. The blocks of a level are linked both ways.
//!
//! Source: `struct xfs_btree_block` and `xfs_alloc_rec` in `fs/xfs/libxfs/xfs_format.h`; `xfs_btree_sblock_verify` in
//! `fs/xfs/libxfs/xfs_btree.c`, `xfs_allocbt_verify` in `fs/xfs/libxfs/xfs_alloc_btree.c`.

use std::ops::Range;

use super::super::ReadBytes;
use super::super::fields::array_at;
use super::bytes::{be16, be32, be64, damaged, has_checksum, read};
use super::log::Lsn;
use super::superblock::Superblock;
use crate::reason::DenseReason;

/// The most levels of a tree: `XFS_BTREE_MAXLEVELS`.
const MAX_LEVELS: u32 = 9;
/// The number of a block that does not exist: `NULLAGBLOCK`.
const NO_BLOCK: u32 = u32::MAX;
/// The sizes of the header: `XFS_BTREE_SBLOCK_LEN` and `XFS_BTREE_SBLOCK_CRC_LEN`.
const HEADER: usize = 16;
const HEADER_WITH_CHECKSUM: usize = 56;
/// The sizes of an extent or key, and of the number of a block.
const EXTENT: usize = 8;
const POINTER: usize = 4;

/// What the extents of a tree are ordered by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// By their first block: the "bnobt".
    Block,
    /// By their length, and then by their first block: the "cntbt".
    Length,
}

impl Order {
    /// `XFS_ABTB_MAGIC`, `XFS_ABTB_CRC_MAGIC`, `XFS_ABTC_MAGIC`, `XFS_ABTC_CRC_MAGIC`.
    fn magic(self, has_checksums: bool) -> [u8; 4] {
        match (self, has_checksums) {
            (Self::Block, false) => *b"ABTB",
            (Self::Block, true) => *b"AB3B",
            (Self::Length, false) => *b"ABTC",
            (Self::Length, true) => *b"AB3C",
        }
    }
}

/// An extent of free blocks, or a key.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Extent {
    start: u32,
    length: u32,
}

impl Extent {
    fn at(block: &[u8], at: usize) -> Self {
        Self { start: be32(block, at), length: be32(block, at + 4) }
    }

    /// The end, or `None` if the extent is empty or has no end.
    fn end(self) -> Option<u32> {
        self.start.checked_add(self.length).filter(|_| self.length > 0)
    }

    /// The sum of these over all extents shows whether two trees have the same extents. It is the finalizer of the random
    /// generator SplitMix64, which is a permutation.
    fn mixed(self) -> u64 {
        let value = u64::from(self.start) << 32 | u64::from(self.length);
        let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }
}

/// What two trees with the same extents have in common.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Summary {
    extents: u64,
    pub blocks: u64,
    pub longest: u32,
    mixed: u64,
}

/// A tree that was read to its end.
pub(super) struct Walked {
    pub extents: Summary,
    /// The blocks of the tree.
    pub nodes: Vec<u32>,
}

/// Where a tree is.
pub(super) struct Tree<'a> {
    pub device: &'a dyn ReadBytes,
    pub superblock: &'a Superblock,
    pub head: Lsn,
    pub group: u32,
    pub order: Order,
    pub root: u32,
    pub levels: u32,
    /// The blocks that can be free or belong to a tree.
    pub allowed: Range<u32>,
}

impl Tree<'_> {
    /// Reads the whole tree, and calls `visit` with each free range.
    ///
    /// It ends, since each block below has one level less, and the extents of all of the tree ascend: no block is read
    /// twice.
    ///
    /// # Errors
    /// If a block cannot be read or is damaged, or the extents do not ascend, overlap or lie outside.
    pub(super) fn walk(&self, visit: &mut dyn FnMut(Range<u32>)) -> Result<Walked, DenseReason> {
        if !(1..=MAX_LEVELS).contains(&self.levels) {
            return Err(self.damaged("height"));
        }
        let walked = Walked { extents: Summary::default(), nodes: Vec::new() };
        let no_block = Linked { block: NO_BLOCK, right: None };
        let mut walk = Walk { tree: self, visit, walked, last: None, linked: vec![no_block; self.levels as usize] };
        walk.block(self.root, self.levels - 1, None)?;
        match walk.linked.iter().all(|last| last.right == Some(NO_BLOCK)) {
            true => Ok(walk.walked),
            false => Err(self.damaged("chain of blocks")),
        }
    }

    fn name(&self) -> String {
        let order = if self.order == Order::Block { "block" } else { "length" };
        format!("free space tree of group {} by {order}", self.group)
    }

    fn damaged(&self, text: &str) -> DenseReason {
        damaged(format!("the {text} of the {} is wrong", self.name()))
    }

    fn header_size(&self) -> usize {
        if self.superblock.has_checksums { HEADER_WITH_CHECKSUM } else { HEADER }
    }

    /// Reads a block and checks its header.
    fn read(&self, number: u32, level: u32) -> Result<Vec<u8>, DenseReason> {
        if !self.allowed.contains(&number) {
            return Err(self.damaged("number of a block"));
        }
        let superblock = self.superblock;
        let offset = (superblock.first_block_of(self.group) + u64::from(number)) * superblock.block_size;
        let block = read(self.device, offset, superblock.block_size as usize, &format!("the {}", self.name()))?;
        if array_at(&block, 0) != self.order.magic(superblock.has_checksums) || u32::from(be16(&block, 4)) != level {
            return Err(self.damaged("magic number or level in a block"));
        }
        if superblock.has_checksums {
            if !has_checksum(&block, 52) {
                return Err(self.damaged("checksum"));
            }
            let place = (be64(&block, 16), be32(&block, 48), array_at(&block, 32));
            // The place is stored in sectors of 512 bytes, of whatever size the sectors of the device are.
            if place != (offset / 512, self.group, superblock.metadata_uuid) {
                return Err(self.damaged("place, owner or UUID in a block"));
            }
            if !self.head.covers(Lsn::new(be64(&block, 24))) {
                return Err(self.damaged("log sequence number in a block"));
            }
        }
        Ok(block)
    }
}

/// The last block of a level that was read.
#[derive(Clone, Copy)]
struct Linked {
    block: u32,
    /// The block that must be the next one of its level. `None` if no block was read.
    right: Option<u32>,
}

struct Walk<'a> {
    tree: &'a Tree<'a>,
    visit: &'a mut dyn FnMut(Range<u32>),
    walked: Walked,
    last: Option<Extent>,
    /// For each level.
    linked: Vec<Linked>,
}

impl Walk<'_> {
    /// Reads a block and all below it. Its first extent must be `key`, which only the root does not have.
    fn block(&mut self, number: u32, level: u32, key: Option<Extent>) -> Result<(), DenseReason> {
        let block = self.tree.read(number, level)?;
        self.walked.nodes.push(number);
        self.check_links(number, level, &block)?;
        let (header, count) = (self.tree.header_size(), usize::from(be16(&block, 6)));
        let entry = if level == 0 { EXTENT } else { EXTENT + POINTER };
        let most = (block.len() - header) / entry;
        // Only a group without free blocks has a block without entries: the root at level 0.
        if count > most || count == 0 && (level > 0 || key.is_some()) {
            return Err(self.tree.damaged("number of entries in a block"));
        }
        let extents = (0..count).map(|at| Extent::at(&block, header + at * EXTENT));
        if key.is_some() && extents.clone().next() != key {
            return Err(self.tree.damaged("key of a block"));
        }
        if level == 0 {
            return extents.into_iter().try_for_each(|extent| self.extent(extent));
        }
        let pointers = header + most * EXTENT;
        for (at, key) in extents.enumerate() {
            self.block(be32(&block, pointers + at * POINTER), level - 1, Some(key))?;
        }
        Ok(())
    }

    /// Checks that a block and the one that was read before it on its level are linked both ways.
    fn check_links(&mut self, number: u32, level: u32, block: &[u8]) -> Result<(), DenseReason> {
        let (left, right) = (be32(block, 8), be32(block, 12));
        let Some(last) = self.linked.get_mut(level as usize) else { return Err(self.tree.damaged("height")) };
        if left != last.block || last.right.is_some_and(|right| right != number) {
            return Err(self.tree.damaged("chain of blocks"));
        }
        *last = Linked { block: number, right: Some(right) };
        Ok(())
    }

    /// Checks an extent, and that it follows the last one.
    fn extent(&mut self, extent: Extent) -> Result<(), DenseReason> {
        let allowed = &self.tree.allowed;
        let Some(end) = extent.end().filter(|end| extent.start >= allowed.start && *end <= allowed.end) else {
            return Err(self.tree.damaged("place of an extent"));
        };
        let follows = self.last.is_none_or(|last| match self.tree.order {
            Order::Block => last.end().is_some_and(|end| end <= extent.start),
            Order::Length => (last.length, last.start) < (extent.length, extent.start),
        });
        if !follows {
            return Err(self.tree.damaged("order of the extents"));
        }
        self.last = Some(extent);
        let summary = &mut self.walked.extents;
        summary.extents += 1;
        summary.blocks += u64::from(extent.length);
        summary.longest = summary.longest.max(extent.length);
        summary.mixed = summary.mixed.wrapping_add(extent.mixed());
        (self.visit)(extent.start..end);
        Ok(())
    }
}
