//! One allocation group: its AGF and AGFL, and the walk over its free space.
//!
//! Source: `struct xfs_agf` and `struct xfs_agfl` in `fs/xfs/libxfs/xfs_format.h`; `xfs_agf_verify` and `xfs_agfl_verify` in
//! `fs/xfs/libxfs/xfs_alloc.c`.

use std::ops::Range;

use super::super::ReadBytes;
use super::super::fields::array_at;
use super::bytes::{be32, be64, damaged, has_checksum, read};
use super::log::Lsn;
use super::superblock::Superblock;
use super::tree::{Order, Tree, Walked};
use crate::reason::DenseReason;

/// `XFS_AGF_MAGIC` and `XFS_AGFL_MAGIC`.
const AGF_MAGIC: [u8; 4] = *b"XAGF";
const AGFL_MAGIC: [u8; 4] = *b"XAFL";
/// `XFS_AGF_VERSION`.
const AGF_VERSION: u32 = 1;
/// The size of the header of the AGFL in version 5: `sizeof(struct xfs_agfl)`.
const AGFL_HEADER: usize = 36;

/// The headers of a group, after all checks.
pub(super) struct Group<'a> {
    device: &'a dyn ReadBytes,
    superblock: &'a Superblock,
    head: Lsn,
    number: u32,
    /// The sector of the AGF.
    agf: Vec<u8>,
    /// The blocks of the free list.
    free_list: Vec<u32>,
}

impl<'a> Group<'a> {
    /// Reads and checks the AGF and the AGFL of a group.
    ///
    /// # Errors
    /// If they cannot be read or are damaged.
    pub(super) fn read(
        device: &'a dyn ReadBytes,
        superblock: &'a Superblock,
        head: Lsn,
        number: u32,
    ) -> Result<Self, DenseReason> {
        let sector = superblock.sector_size as usize;
        let start = superblock.first_block_of(number) * superblock.block_size;
        let headers = read(device, start, 4 * sector, &format!("the headers of group {number}"))?;
        let agf = headers[sector..2 * sector].to_vec();
        let mut group = Self { device, superblock, head, number, agf, free_list: Vec::new() };
        group.check_agf()?;
        group.free_list = group.read_free_list(&headers[3 * sector..])?;
        Ok(group)
    }

    fn damaged(&self, text: &str) -> DenseReason {
        damaged(format!("{text} of group {} is wrong", self.number))
    }

    fn field(&self, at: usize) -> u32 {
        be32(&self.agf, at)
    }

    fn length(&self) -> u32 {
        self.superblock.length_of(self.number)
    }

    /// The number of blocks on the free list: `agf_flcount`.
    fn free_list_count(&self) -> u32 {
        self.field(48)
    }

    /// The free blocks in the trees: `agf_freeblks`.
    fn free_blocks(&self) -> u32 {
        self.field(52)
    }

    /// The blocks of the trees without their roots: `agf_btreeblks`.
    fn tree_blocks(&self) -> u32 {
        self.field(60)
    }

    /// The blocks that `sb_fdblocks` counts as free (`xfs_initialize_perag_data` in `fs/xfs/libxfs/xfs_ag.c`). That is so
    /// without lazy counters too (`xfs_trans_apply_sb_deltas` in `fs/xfs/xfs_trans.c`).
    pub(super) fn counted_as_free(&self) -> u64 {
        u64::from(self.free_blocks()) + u64::from(self.free_list_count()) + u64::from(self.tree_blocks())
    }

    fn check_agf(&self) -> Result<(), DenseReason> {
        let superblock = self.superblock;
        if !self.agf.starts_with(&AGF_MAGIC) || self.field(4) != AGF_VERSION {
            return Err(self.damaged("the header of the free space (AGF)"));
        }
        if superblock.has_checksums {
            if !has_checksum(&self.agf, 216) {
                return Err(self.damaged("the checksum of the AGF"));
            }
            if array_at(&self.agf, 64) != superblock.metadata_uuid || !self.head.covers(Lsn::new(be64(&self.agf, 208)))
            {
                return Err(self.damaged("the UUID or the log sequence number of the AGF"));
            }
        }
        if self.field(8) != self.number || self.field(12) != self.length() {
            return Err(self.damaged("the number or the length in the AGF"));
        }
        if self.free_blocks() > self.length() || self.tree_blocks() > self.length() {
            return Err(self.damaged("a counter in the AGF"));
        }
        Ok(())
    }

    /// The blocks of the free list, which is a ring in the sector of the AGFL.
    fn read_free_list(&self, agfl: &[u8]) -> Result<Vec<u32>, DenseReason> {
        let entries = match self.superblock.has_checksums {
            false => agfl,
            true if !has_checksum(agfl, 32) => return Err(self.damaged("the checksum of the free list (AGFL)")),
            true => {
                let expected = (AGFL_MAGIC, self.number, self.superblock.metadata_uuid);
                let lsn = Lsn::new(be64(agfl, 24));
                if (array_at(agfl, 0), be32(agfl, 4), array_at(agfl, 8)) != expected || !self.head.covers(lsn) {
                    return Err(self.damaged("the header of the free list (AGFL)"));
                }
                &agfl[AGFL_HEADER..]
            }
        };
        let size = entries.len() / 4;
        let (first, last, count) = (self.field(40) as usize, self.field(44) as usize, self.free_list_count() as usize);
        // An empty list may have any first and last entry, as long as they are neighbours.
        if first >= size || last >= size || count > size || (first + count) % size != (last + 1) % size {
            return Err(self.damaged("the length of the free list"));
        }
        let blocks = (0..count).map(|at| be32(entries, (first + at) % size * 4)).collect::<Vec<_>>();
        match blocks.iter().all(|block| self.metadata_blocks().contains(block)) {
            true => Ok(blocks),
            false => Err(self.damaged("a block of the free list")),
        }
    }

    /// The blocks that may hold metadata other than the headers.
    fn metadata_blocks(&self) -> Range<u32> {
        self.superblock.header_blocks()..self.length()
    }

    fn tree(&self, order: Order) -> Tree<'a> {
        let (root, levels) = match order {
            Order::Block => (self.field(16), self.field(28)),
            Order::Length => (self.field(20), self.field(32)),
        };
        let allowed = self.metadata_blocks();
        Tree {
            device: self.device,
            superblock: self.superblock,
            head: self.head,
            group: self.number,
            order,
            root,
            levels,
            allowed,
        }
    }

    /// Calls `use_blocks` with each range of used blocks of this group, in ascending order, and returns blocks that must
    /// be among them: those of the trees, their roots, and the free list.
    ///
    /// # Errors
    /// If a tree is damaged, or the trees and the counters differ.
    pub(super) fn walk(&self, use_blocks: &mut dyn FnMut(Range<u32>)) -> Result<Vec<u32>, DenseReason> {
        let mut used_from = 0;
        let by_block = self.tree(Order::Block).walk(&mut |free| {
            use_blocks(used_from..free.start);
            used_from = free.end;
        })?;
        use_blocks(used_from..self.length());
        let by_length = self.tree(Order::Length).walk(&mut |_| {})?;
        self.check_counts(&by_block, &by_length)?;
        let mut blocks = by_block.nodes;
        blocks.extend(by_length.nodes);
        blocks.extend(&self.free_list);
        blocks.extend(self.superblock.has_rmap.then(|| self.field(24)));
        blocks.extend(self.superblock.has_reflink.then(|| self.field(88)));
        match blocks.iter().all(|block| self.metadata_blocks().contains(block)) {
            true => Ok(blocks),
            false => Err(self.damaged("the root of a tree")),
        }
    }

    fn check_counts(&self, by_block: &Walked, by_length: &Walked) -> Result<(), DenseReason> {
        if by_block.extents != by_length.extents {
            return Err(damaged(format!("the two free space trees of group {} differ", self.number)));
        }
        if by_block.extents.blocks != u64::from(self.free_blocks()) || by_block.extents.longest != self.field(56) {
            return Err(self.damaged("the number of free blocks in the AGF"));
        }
        // Each tree has a root that is not counted.
        let rmap = if self.superblock.has_rmap { u64::from(self.field(80)).saturating_sub(1) } else { 0 };
        let trees = (by_block.nodes.len() + by_length.nodes.len()) as u64 - 2 + rmap;
        if trees != u64::from(self.tree_blocks()) {
            return Err(self.damaged("the number of blocks of trees in the AGF"));
        }
        Ok(())
    }
}
