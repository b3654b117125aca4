//! The used and the free space of a btrfs file system on one device.
//!
//! btrfs never overwrites what the last commit refers to: new blocks are written to free space, and then the superblock that
//! refers to them (`btrfs_commit_transaction` of `fs/btrfs/transaction.c`). So the extent tree of the superblock lists all
//! that is in use, even after a crash. What a later, unfinished transaction wrote is referred to by nothing. What the last
//! transaction freed may be discarded or not, as it is free in either case. The one exception is the log tree, which `fsync`
//! writes between commits: a file system with a log tree is refused, and mounting it once removes the log tree.
//!
//! # What is used
//!
//! ```text
//! superblock -> chunk tree:  logical ranges (chunks), and the physical copies of each (one, or two for "DUP")
//!            -> root tree -> device tree:      the physical copies, again
//!                         -> extent tree:      the logical ranges that are in use
//!                         -> block group tree: the used bytes of each chunk (part of the extent tree in older file systems)
//! ```
//!
//! Used are both copies of each extent, the first MiB of the device, the copies of the superblock, and what lies behind the
//! end of the file system. The file system is refused unless all trees agree: the copies of the chunks with the device tree,
//! the chunks with the block groups, the extents in each chunk with its used bytes, and their sum with the superblock.
//!
//! Older commits, to which the mount option `rescue=usebackuproot` returns, are not part of the used space.

mod chunks;
mod extents;
mod node;
mod superblock;
mod tree;

use chunks::Chunks;
use superblock::Superblock;
use tree::Trees;

use super::ReadBytes;
use super::fields::has_at;
use crate::map::{Block, FillBuilder, FillMap, HoleMap as _};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The first bytes of the device, which btrfs does not use (`BTRFS_DEVICE_RANGE_RESERVED` of `fs/btrfs/fs.h`).
const RESERVED: u64 = 1 << 20;

/// Whether a device that begins with `head` has the signature of btrfs.
pub fn is_btrfs(head: &[u8]) -> bool {
    has_at(head, superblock::POSITIONS[0] as usize + superblock::MAGIC_AT, superblock::MAGIC)
}

/// The used space of a btrfs file system.
///
/// # Errors
/// When it is not on this device alone, has a feature that is not supported or a log tree, when a part of its metadata is
/// damaged or does not match another part, and when it cannot be read.
pub fn used(device: &dyn ReadBytes) -> Result<FillMap, DenseReason> {
    let superblock = superblock::read(device)?;
    let builder = FillBuilder::new(device.len(), Bytes::new(superblock.sector_size));
    let mut filler = builder.filler();
    // Blocks that are partly in the range are used too.
    let mut mark = |start: u64, len: u64| {
        let end = start.saturating_add(len).div_ceil(superblock.sector_size);
        filler.set_range(Block::new(start / superblock.sector_size)..Block::new(end));
    };
    mark(0, RESERVED);
    mark(superblock.device.len, u64::MAX);
    superblock::POSITIONS.into_iter().for_each(|position| mark(position, superblock::SIZE as u64));
    let (nodes, chunks) = read_trees(device, &superblock, &mut mark)?;
    let map = builder.finish().ok_or("it has too many used blocks")?;
    check_nodes(&map, &chunks, &nodes)?;
    Ok(map)
}

/// Reads all trees, and calls `mark` with the position on the device and the length of each used extent. Returns the positions of the nodes, and the chunks.
fn read_trees(
    device: &dyn ReadBytes,
    superblock: &Superblock,
    mark: &mut dyn FnMut(u64, u64),
) -> Result<(Vec<u64>, Chunks), DenseReason> {
    let system = chunks::system_chunks(superblock)?;
    let mut trees = Trees::new(device, superblock, &system)?;
    let chunks = chunks::read(&mut trees)?;
    let mut nodes = trees.nodes;
    chunks.check_contains(&system)?;
    let mut trees = Trees::new(device, superblock, &chunks)?;
    let roots = extents::read_roots(&mut trees)?;
    extents::check_device_tree(&mut trees, &roots)?;
    let used = extents::mark_used(&mut trees, &roots, mark)?;
    nodes.append(&mut trees.nodes);
    chunks.check_used(&used, superblock)?;
    Ok((nodes, chunks))
}

/// Checks that each node that was read is itself within an extent that is in use.
fn check_nodes(map: &FillMap, chunks: &Chunks, nodes: &[u64]) -> Result<(), DenseReason> {
    for &node in nodes {
        let chunk = chunks.at(node).ok_or_else(|| damaged("a node lies in no chunk"))?;
        let is_used = |copy: u64| map.extent_at(Bytes::new(copy)).kind.is_data();
        if !chunk.copies_of(node).all(is_used) {
            return Err(damaged("a node of its trees is not among its extents"));
        }
    }
    Ok(())
}

/// The reason for metadata that contradicts itself.
fn damaged(what: &'static str) -> DenseReason {
    DenseReason::Damaged(what.into())
}
