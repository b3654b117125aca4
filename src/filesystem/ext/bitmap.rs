//! The block bitmaps: which clusters of each group are used.

use super::descriptor::{self, Descriptor};
use super::layout::Blocks;
use super::superblock::Superblock;
use super::{LONGEST_READ, Marker, ReadBytes, damaged};
use crate::reason::DenseReason;

/// Marks what the block bitmaps of all groups have as used.
///
/// The bitmaps of neighbouring groups are often neighbours on the device (`flex_bg`), and are then read together.
///
/// # Errors
/// If a bitmap cannot be read, or does not agree with its checksum or its group descriptor.
pub(super) fn mark_all(device: &dyn ReadBytes, fs: &Superblock, marker: &mut Marker) -> Result<(), DenseReason> {
    let mut run: Vec<(u32, Descriptor)> = Vec::new();
    let longest = (LONGEST_READ / fs.block_size) as usize;
    descriptor::for_each(device, fs, |group, descriptor| {
        let next = run.first().map(|(_, first)| first.block_bitmap.saturating_add(run.len() as u64));
        if next.is_some_and(|next| next != descriptor.block_bitmap) || run.len() == longest {
            mark_run(device, fs, &run, marker)?;
            run.clear();
        }
        run.push((group, descriptor));
        Ok(())
    })?;
    mark_run(device, fs, &run, marker)
}

/// Marks the used clusters of groups whose bitmaps are neighbours.
fn mark_run(
    device: &dyn ReadBytes,
    fs: &Superblock,
    run: &[(u32, Descriptor)],
    marker: &mut Marker,
) -> Result<(), DenseReason> {
    // Bitmaps that are not on the device are not read at the begin and the end of the run.
    let Some(first) = run.iter().position(|(_, descriptor)| descriptor.has_bitmap) else { return Ok(()) };
    let end = run.iter().rposition(|(_, descriptor)| descriptor.has_bitmap).map_or(first, |last| last + 1);
    let run = &run[first..end];
    let (first_group, first) = run[0];
    let block_size = fs.block_size as usize;
    let mut buffer = vec![0; run.len() * block_size];
    let read = device.read_exact(fs.position(first.block_bitmap), &mut buffer);
    read.map_err(|error| DenseReason::cannot(format!("read the block bitmap of group {first_group}"), &error))?;
    for ((group, descriptor), bitmap) in run.iter().zip(buffer.chunks_exact(block_size)) {
        if descriptor.has_bitmap {
            mark_group(fs, (*group, descriptor), bitmap, marker)?;
        }
    }
    Ok(())
}

/// Checks the bitmap of a group, and marks its used clusters.
fn mark_group(
    fs: &Superblock,
    (group, descriptor): (u32, &Descriptor),
    bitmap: &[u8],
    marker: &mut Marker,
) -> Result<(), DenseReason> {
    let bytes_in_use = (fs.clusters_per_group() / 8) as usize;
    if !descriptor.bitmap_is_right(&bitmap[..bytes_in_use], fs) {
        return Err(damaged(format!("the checksum of the block bitmap of group {group} is wrong")));
    }
    let blocks = fs.group(group);
    let clusters = (blocks.end - blocks.start).div_ceil(1 << fs.cluster_bits);
    let all = 8 * bitmap.len() as u64;
    let mut used = 0;
    for run in used_runs(bitmap) {
        // The bits behind the end of the group are set.
        if run.end > clusters && (run.start > clusters || run.end != all) {
            return Err(padding(group));
        }
        let in_group = run.start.min(clusters)..run.end.min(clusters);
        used += in_group.end - in_group.start;
        marker.mark(&cluster_blocks(&blocks, &in_group, fs.cluster_bits));
    }
    if clusters < all && bitmap.last().is_some_and(|last| last & 0x80 == 0) {
        return Err(padding(group));
    }
    if clusters - used != descriptor.free_clusters {
        let (group, free) = (group, clusters - used);
        let text = format!("the block bitmap of group {group} has {free} free clusters, and its descriptor has ");
        return Err(damaged(text + &descriptor.free_clusters.to_string()));
    }
    Ok(())
}

fn padding(group: u32) -> DenseReason {
    damaged(format!("the block bitmap of group {group} has free space behind its end"))
}

/// The blocks of clusters of a group.
fn cluster_blocks(group: &Blocks, clusters: &Blocks, cluster_bits: u32) -> Blocks {
    let block = |cluster: u64| (group.start + (cluster << cluster_bits)).min(group.end);
    block(clusters.start)..block(clusters.end)
}

/// The runs of set bits in a bitmap, in ascending order, as long as they can be.
fn used_runs(bitmap: &[u8]) -> impl Iterator<Item = Blocks> {
    // Blocks are multiples of eight bytes.
    let word =
        |at: usize| bitmap.get(8 * at..).and_then(|rest| rest.first_chunk()).map(|bytes| u64::from_le_bytes(*bytes));
    // The first bit at or after `from` that is set, or that is not.
    let find = move |from: u64, inverted: u64| {
        let mut at = (from / 64) as usize;
        let mut mask = u64::MAX << (from % 64);
        while let Some(bits) = word(at) {
            match (bits ^ inverted) & mask {
                0 => (at, mask) = (at + 1, u64::MAX),
                found => return Some(64 * at as u64 + u64::from(found.trailing_zeros())),
            }
        }
        None
    };
    let all = 8 * bitmap.len() as u64;
    let mut from = 0;
    std::iter::from_fn(move || {
        let start = find(from, 0)?;
        let end = find(start, u64::MAX).unwrap_or(all);
        from = end;
        Some(start..end)
    })
}
