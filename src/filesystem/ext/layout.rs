//! Where the groups of a file system are, and the metadata whose place follows from the superblock alone.
//!
//! Source: e2fsprogs, `lib/ext2fs/closefs.c` (`ext2fs_bg_has_super`, `ext2fs_super_and_bgd_loc2`) and
//! `lib/ext2fs/openfs.c` (`ext2fs_descriptor_block_loc2`).

use std::ops::Range;

use super::superblock::{Backups, Superblock};

/// Blocks of the file system, half-open.
pub(super) type Blocks = Range<u64>;

impl Superblock {
    /// The blocks of a group. The last group may be shorter than the others.
    pub(super) fn group(&self, group: u32) -> Blocks {
        let start = self.first_data_block + u64::from(group) * self.blocks_per_group;
        start..start.saturating_add(self.blocks_per_group).min(self.blocks)
    }

    /// The metadata at the start of a group: the superblock, descriptors, and what is reserved for descriptors.
    pub(super) fn start_of_group(&self, group: u32) -> [Blocks; 3] {
        let none = 0..0;
        let start = self.first_block_for_metadata(group);
        let has_super = self.has_superblock(group);
        let superblock = if has_super { start..start + 1 } else { none.clone() };
        let after = superblock.end.max(start);
        let in_table = self.in_descriptor_table(group);
        let table = if has_super && in_table { after..after + self.descriptor_table() } else { none.clone() };
        // A block of descriptors with `meta_bg` is in the first, the second and the last of the groups that it describes.
        let at = u64::from(group) % self.descriptors_per_block();
        let holds_block = !in_table && (at <= 1 || at == self.descriptors_per_block() - 1);
        let block = if holds_block { after..after + 1 } else { none };
        [superblock, table, block].map(|range| range.start..range.end.min(self.blocks).max(range.start))
    }

    /// Where the block of descriptors with this index is, and how many of the next ones follow it on the device.
    pub(super) fn descriptor_block(&self, index: u64) -> (u64, u64) {
        let in_table = self.first_meta_bg.unwrap_or(u64::MAX).min(self.descriptor_blocks());
        if index < in_table {
            return (self.first_block_for_metadata(0) + 1 + index, in_table - index);
        }
        let group = (index * self.descriptors_per_block()) as u32;
        (self.first_block_for_metadata(group) + u64::from(self.has_superblock(group)), 1)
    }

    pub(super) fn descriptors_per_block(&self) -> u64 {
        self.block_size / self.descriptor_size as u64
    }

    fn descriptor_blocks(&self) -> u64 {
        u64::from(self.groups).div_ceil(self.descriptors_per_block())
    }

    /// The length of the table of descriptors behind a superblock.
    fn descriptor_table(&self) -> u64 {
        self.first_meta_bg.unwrap_or_else(|| self.descriptor_blocks() + self.reserved_descriptors)
    }

    /// Whether the descriptor of a group is in the table behind the superblocks.
    fn in_descriptor_table(&self, group: u32) -> bool {
        self.first_meta_bg.is_none_or(|first| u64::from(group) / self.descriptors_per_block() < first)
    }

    /// The first block of a group, after the boot block, which takes all of block 0 where blocks have 1 KiB.
    fn first_block_for_metadata(&self, group: u32) -> u64 {
        let start = self.group(group).start;
        if self.block_size == 1024 { start.max(1) } else { start }
    }

    fn has_superblock(&self, group: u32) -> bool {
        match self.backups {
            _ if group == 0 => true,
            Backups::All => true,
            Backups::Powers => group == 1 || [3, 5, 7].into_iter().any(|base| is_power(group, base)),
            Backups::These(groups) => groups.contains(&group),
        }
    }
}

/// Whether `number`, which is not zero, is a power of `base`.
fn is_power(mut number: u32, base: u32) -> bool {
    while number.is_multiple_of(base) {
        number /= base;
    }
    number == 1
}
