//! The group descriptors: where the bitmaps and the inode table of each group are, and how much of it is free.
//!
//! Source of the offsets: e2fsprogs, `lib/ext2fs/ext2_fs.h` (`struct ext4_group_desc`).

use super::super::fields::{u16_at, u32_at};
use super::layout::Blocks;
use super::superblock::Superblock;
use super::superblock::halves;
use super::{LONGEST_READ, ReadBytes, damaged};
use crate::reason::DenseReason;

/// `EXT2_BG_BLOCK_UNINIT`: the block bitmap was never written. Only metadata is used.
const BLOCK_UNINIT: u16 = 0x2;
/// The size from which on a descriptor has the upper half of the bitmap's checksum.
const HAS_WIDE_CHECKSUM: usize = 0x3a;

/// What is needed of a group descriptor.
#[derive(Clone, Copy)]
pub(super) struct Descriptor {
    pub block_bitmap: u64,
    inode_bitmap: u64,
    inode_table: u64,
    pub free_clusters: u64,
    /// Whether the block bitmap is on the device.
    pub has_bitmap: bool,
    bitmap_checksum: u32,
    wide_checksum: bool,
}

impl Descriptor {
    /// # Errors
    /// If the checksum is wrong, or the group's metadata is not where it may be.
    fn parse(record: &[u8], group: u32, fs: &Superblock) -> Result<Self, DenseReason> {
        if !fs.checksums.descriptor_is_right(group, record) {
            return Err(damaged(format!("the checksum of the descriptor of group {group} is wrong")));
        }
        let flags = if fs.checksums.cover_descriptors() { u16_at(record, 0x12) } else { 0 };
        let descriptor = Self {
            block_bitmap: halves(u32_at(record, 0x0), u32_at(record, 0x20)),
            inode_bitmap: halves(u32_at(record, 0x4), u32_at(record, 0x24)),
            inode_table: halves(u32_at(record, 0x8), u32_at(record, 0x28)),
            free_clusters: u64::from(u16_at(record, 0xc)) | u64::from(u16_at(record, 0x2c)) << 16,
            has_bitmap: flags & BLOCK_UNINIT == 0,
            bitmap_checksum: u32::from(u16_at(record, 0x18)) | u32::from(u16_at(record, 0x38)) << 16,
            wide_checksum: record.len() >= HAS_WIDE_CHECKSUM,
        };
        let group_blocks = fs.group(group);
        let allowed = if fs.flex_bg { fs.first_data_block + 1..fs.blocks } else { group_blocks };
        for blocks in descriptor.metadata(fs) {
            if blocks.start < allowed.start || blocks.end > allowed.end {
                return Err(damaged(format!("the metadata of group {group} is not where it may be")));
            }
        }
        Ok(descriptor)
    }

    /// The blocks of the bitmaps and of the inode table.
    pub(super) fn metadata(&self, fs: &Superblock) -> [Blocks; 3] {
        let range = |start: u64, count| start..start.saturating_add(count);
        [range(self.block_bitmap, 1), range(self.inode_bitmap, 1), range(self.inode_table, fs.inode_table)]
    }

    /// Whether the checksum of the group's block bitmap, of which these are the bytes in use, is right.
    pub(super) fn bitmap_is_right(&self, bitmap: &[u8], fs: &Superblock) -> bool {
        match fs.checksums.crc32c(bitmap) {
            Some(computed) if self.wide_checksum => computed == self.bitmap_checksum,
            Some(computed) => computed & 0xffff == self.bitmap_checksum,
            None => true,
        }
    }
}

/// Calls `each` with the descriptor of every group in ascending order.
///
/// # Errors
/// Those of `each`, of the device, and if a descriptor is wrong.
pub(super) fn for_each(
    device: &dyn ReadBytes,
    fs: &Superblock,
    mut each: impl FnMut(u32, Descriptor) -> Result<(), DenseReason>,
) -> Result<(), DenseReason> {
    let mut buffer = Vec::new();
    let mut group = 0;
    while group < fs.groups {
        let (block, following) = fs.descriptor_block(u64::from(group) / fs.descriptors_per_block());
        let blocks = following.min(LONGEST_READ / fs.block_size);
        if block.checked_add(blocks).is_none_or(|end| end > fs.blocks) {
            return Err(damaged("its group descriptors are not inside of it"));
        }
        buffer.resize((blocks * fs.block_size) as usize, 0);
        let read = device.read_exact(fs.position(block), &mut buffer);
        read.map_err(|error| DenseReason::cannot("read its group descriptors", &error))?;
        let descriptors = buffer.chunks_exact(fs.block_size as usize).flat_map(|block| {
            // Descriptors do not cross the ends of blocks: both sizes are powers of two.
            block.chunks_exact(fs.descriptor_size)
        });
        for record in descriptors.take((fs.groups - group) as usize) {
            each(group, Descriptor::parse(record, group, fs)?)?;
            group += 1;
        }
    }
    Ok(())
}
