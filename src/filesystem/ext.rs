//! The used and the free space of ext2, ext3 and ext4.
//!
//! The device is divided into groups of blocks. Each group has a descriptor, and a bitmap with one bit for each of its
//! clusters; a cluster is one block, or several with `bigalloc`. All positions are in blocks, and all ranges are half-open.
//!
//! A block is free only if all of this holds:
//!
//! - the superblock is clean, counts no errors, and has no feature that is not understood ([`features`]);
//! - every checksum that the format has is right: of the superblock, of each descriptor, of each bitmap;
//! - the block's bit is not set, or its group never had a bitmap and the block is no metadata;
//! - no metadata of any group lies in free space or in other metadata;
//! - the free space that was found in each group, and in all, is what the descriptors and the superblock count.
//!
//! Source: e2fsprogs, `lib/ext2fs`; Linux, `Documentation/filesystems/ext4` and `fs/ext4`.

mod bitmap;
mod checksum;
mod descriptor;
mod features;
mod layout;
mod mmp;
mod superblock;

use std::borrow::Cow;

use self::layout::Blocks;
use self::superblock::Superblock;
use super::ReadBytes;
use crate::map::{Block, FillBuilder, FillMap, Filler, HoleMap as _};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The longest read of the device in bytes, a multiple of all block sizes.
const LONGEST_READ: u64 = 1 << 20;

/// Whether a device that begins with these bytes has a file system of this kind: the magic number of the superblock is in
/// the first 2 KiB.
pub fn is_ext(head: &[u8]) -> bool {
    superblock::has_magic(head)
}

/// The map of the used blocks of the file system on a device. Bytes behind its end count as used.
///
/// # Errors
/// Why the free space is not certain: the device cannot be read, or the file system is not clean, is damaged, or has
/// features that are not understood.
pub fn used(device: &dyn ReadBytes) -> Result<FillMap, DenseReason> {
    let fs = read_superblock(device)?;
    mmp::check(device, &fs)?;
    check_metadata_is_disjoint(device, &fs)?;
    let builder = FillBuilder::new(device.len(), Bytes::new(fs.block_size));
    let mut marker = Marker { filler: builder.filler() };
    // The boot block is outside of all groups where blocks have 1 KiB.
    marker.mark(&(0..1));
    marker.mark(&(fs.blocks..u64::MAX));
    bitmap::mark_all(device, &fs, &mut marker)?;
    for_each_metadata(device, &fs, |blocks| {
        marker.mark(&whole_clusters(blocks, fs.cluster_bits));
        Ok(())
    })?;
    let map = builder.finish().ok_or_else(too_large)?;
    check_counts(device, &fs, &map)?;
    Ok(map)
}

/// Marks blocks as used.
struct Marker<'a> {
    filler: Filler<'a>,
}

impl Marker<'_> {
    fn mark(&mut self, blocks: &Blocks) {
        self.filler.set_range(Block::new(blocks.start)..Block::new(blocks.end));
    }
}

fn damaged(text: impl Into<Cow<'static, str>>) -> DenseReason {
    DenseReason::Damaged(text.into())
}

fn too_large() -> DenseReason {
    DenseReason::Unsupported("the map of its used space takes too much memory".into())
}

fn read_superblock(device: &dyn ReadBytes) -> Result<Superblock, DenseReason> {
    let mut record = [0; superblock::SIZE];
    let read = device.read_exact(Bytes::new(superblock::OFFSET as u64), &mut record);
    read.map_err(|error| DenseReason::cannot("read its superblock", &error))?;
    Superblock::parse(&record, device.len())
}

/// Calls `each` with all metadata that is not in files.
fn for_each_metadata(
    device: &dyn ReadBytes,
    fs: &Superblock,
    mut each: impl FnMut(Blocks) -> Result<(), DenseReason>,
) -> Result<(), DenseReason> {
    if let Some(block) = fs.mmp_block {
        each(block..block + 1)?;
    }
    descriptor::for_each(device, fs, |group, descriptor| {
        fs.start_of_group(group).into_iter().chain(descriptor.metadata(fs)).try_for_each(&mut each)
    })
}

/// No block belongs to two pieces of metadata. Where there are no checksums, this finds a wrong position of a bitmap.
fn check_metadata_is_disjoint(device: &dyn ReadBytes, fs: &Superblock) -> Result<(), DenseReason> {
    let overlap = || damaged("its metadata overlaps");
    let builder = FillBuilder::new(fs.position(fs.blocks), Bytes::new(fs.block_size));
    let mut marker = Marker { filler: builder.filler() };
    let mut sum = 0_u64;
    for_each_metadata(device, fs, |blocks| {
        sum = sum.saturating_add(blocks.end - blocks.start);
        marker.mark(&blocks);
        // More than all blocks: at once, so that memory and time stay bounded.
        if sum > fs.blocks { Err(overlap()) } else { Ok(()) }
    })?;
    let marked = builder.finish().ok_or_else(too_large)?.allocated();
    if marked == Some(fs.position(sum)) { Ok(()) } else { Err(overlap()) }
}

/// The clusters in which `blocks` are. Only one cluster can be partial: the last one of the file system.
fn whole_clusters(blocks: Blocks, cluster_bits: u32) -> Blocks {
    // Where clusters are larger than blocks, the first cluster begins with block 0.
    let Some(last) = blocks.end.checked_sub(1).filter(|_| !blocks.is_empty()) else { return blocks };
    (blocks.start >> cluster_bits << cluster_bits)..((last >> cluster_bits) + 1) << cluster_bits
}

/// The free blocks of the finished map are those that the descriptors and the superblock count. They are fewer where
/// a bitmap has metadata as free.
fn check_counts(device: &dyn ReadBytes, fs: &Superblock, map: &FillMap) -> Result<(), DenseReason> {
    let unit = Bytes::new(fs.block_size);
    let mut sum = 0_u64;
    descriptor::for_each(device, fs, |group, descriptor| {
        let blocks = fs.group(group);
        let used = map.count_data(&(fs.position(blocks.start)..fs.position(blocks.end)), unit);
        let used = used.ok_or_else(too_large)?.get() / fs.block_size;
        // A last cluster that is partial counts as a whole one.
        let free = (blocks.end - blocks.start - used).div_ceil(1 << fs.cluster_bits);
        sum += free << fs.cluster_bits;
        if free == descriptor.free_clusters {
            return Ok(());
        }
        let count = descriptor.free_clusters;
        Err(damaged(match descriptor.has_bitmap {
            true => format!("the block bitmap of group {group} has blocks of metadata as free"),
            false => format!("group {group} has {free} free clusters, and its descriptor has {count}"),
        }))
    })?;
    match sum == fs.free_blocks {
        true => Ok(()),
        false => Err(damaged(format!("it has {sum} free blocks, and its superblock has {}", fs.free_blocks))),
    }
}
