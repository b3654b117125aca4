//! The used and the free space of an XFS file system.
//!
//! The file system is divided into allocation groups. Each group begins with four sectors: a superblock, the AGF (free
//! space), the AGI (inodes) and the AGFL (the free list). The free space of a group is in two trees, which hold the same
//! extents: one is ordered by block, the other by length. The blocks of these trees and those on the free list are used.
//!
//! The names and layouts are those of `fs/xfs/libxfs/xfs_format.h` and `xfs_log_format.h` in Linux 6.18. All numbers on disk
//! are big-endian, except checksums. Version 5 has a CRC-32C, an owner and a UUID in each piece of metadata. Version 4 has
//! none of them, and rests on the comparison of both trees and of all counters.
//!
//! What the trees say holds only if the log has nothing to replay: its last record must be the one of an unmount.

mod bytes;
mod group;
mod log;
mod superblock;
mod tree;

use super::ReadBytes;
use crate::map::{Block, FillBuilder, FillMap, HoleMap as _};
use crate::reason::DenseReason;
use crate::units::Bytes;
use bytes::damaged;
use group::Group;
use superblock::{MAGIC, Superblock};

/// Whether a device that begins with `head` has an XFS file system.
pub fn is_xfs(head: &[u8]) -> bool {
    head.starts_with(&MAGIC)
}

/// The used space of the XFS file system on `device`, in blocks of the file system.
///
/// All that is not proven to be free is mapped, and so is what lies behind the end of the file system.
///
/// # Errors
/// If there is any doubt: the file system is not clean, has features that are not known, or its metadata is damaged.
pub fn used(device: &dyn ReadBytes) -> Result<FillMap, DenseReason> {
    let superblock = Superblock::read(device)?;
    let head = log::clean_head(device, &superblock)?;
    if superblock.lsn.is_some_and(|lsn| !head.covers(lsn)) {
        return Err(damaged("the superblock is newer than the log"));
    }
    let builder = FillBuilder::new(device.len(), Bytes::new(superblock.block_size));
    let mut filler = builder.filler();
    let mut in_use = vec![superblock.root_inode_block()?];
    let mut free = 0_u64;
    for number in 0..superblock.group_count {
        let group = Group::read(device, &superblock, head, number)?;
        let first = superblock.first_block_of(number);
        let blocks = group.walk(&mut |used| {
            filler.set_range(Block::new(first + u64::from(used.start))..Block::new(first + u64::from(used.end)));
        })?;
        in_use.extend(blocks.into_iter().map(|block| first + u64::from(block)));
        free = free.saturating_add(group.counted_as_free());
    }
    if free != superblock.free_blocks {
        return Err(damaged(format!(
            "its groups have {free} free blocks, and the superblock counts {}",
            superblock.free_blocks
        )));
    }
    filler.set_range(Block::new(superblock.blocks)..Block::new(u64::MAX));
    drop(filler);
    let map = builder.finish().ok_or("the map of its used space takes too much memory")?;
    check_in_use(&superblock, &map, &in_use)?;
    Ok(map)
}

/// Checks that the log and these blocks are not free in the map.
fn check_in_use(superblock: &Superblock, map: &FillMap, blocks: &[u64]) -> Result<(), DenseReason> {
    let start_of = |block: u64| Bytes::new(block.saturating_mul(superblock.block_size));
    let log = superblock.log_blocks();
    if map.next_hole(start_of(log.start)).is_some_and(|hole| hole.start < start_of(log.end)) {
        return Err(damaged("a part of its log is in the free space tree"));
    }
    match blocks.iter().find(|block| map.extent_at(start_of(**block)).kind.is_hole()) {
        Some(block) => Err(damaged(format!("its block {block} holds metadata, and is in the free space tree"))),
        None => Ok(()),
    }
}
