//! The trees that are found through the root tree: what is in use, and the checks that they agree.

use super::chunks::{CHUNKS_OBJECT, Chunks, DATA};
use super::damaged;
use super::node::Key;
use super::superblock::{Root, Superblock};
use super::tree::Trees;
use crate::filesystem::fields::{u8_at, u64_at};
use crate::reason::DenseReason;

/// The numbers of trees (`BTRFS_*_TREE_OBJECTID`).
const ROOT_TREE: u64 = 1;
const EXTENT_TREE: u64 = 2;
const DEVICE_TREE: u64 = 4;
const BLOCK_GROUP_TREE: u64 = 11;
/// The kinds of items (`BTRFS_*_KEY`).
const ROOT_ITEM: u8 = 132;
const EXTENT_ITEM: u8 = 168;
const METADATA_ITEM: u8 = 169;
const BLOCK_GROUP_ITEM: u8 = 192;
const DEV_EXTENT: u8 = 204;
const DEV_STATS: u8 = 249;
const DEV_REPLACE: u8 = 250;
/// References to an extent, which are too many for its item: TREE_BLOCK_REF, EXTENT_DATA_REF, SHARED_BLOCK_REF and
/// SHARED_DATA_REF.
const REFERENCES: [u8; 4] = [176, 178, 182, 184];
/// `BTRFS_EXTENT_FLAG_DATA` and `BTRFS_EXTENT_FLAG_TREE_BLOCK`.
const IS_DATA: u64 = 1;
const IS_NODE: u64 = 2;
/// `BTRFS_IOCTL_DEV_REPLACE_STATE_STARTED` and `_SUSPENDED` of `include/uapi/linux/btrfs.h`.
const REPLACING: [u64; 2] = [1, 4];
/// The lengths of items: `struct btrfs_extent_item`, `btrfs_block_group_item`, `btrfs_dev_extent`, and the older part of
/// `btrfs_root_item`.
const EXTENT: usize = 24;
const BLOCK_GROUP: usize = 24;
const DEVICE_EXTENT: usize = 48;
const OLDER_ROOT: usize = 239;

/// The roots of the trees that are read.
pub struct Roots {
    extents: Root,
    devices: Root,
    /// Where block groups have a tree of their own.
    block_groups: Option<Root>,
}

/// Used bytes, by the index of the chunk.
pub struct Used {
    /// The sum of the extents.
    extents: Vec<u64>,
    /// What the block group of the chunk says.
    block_groups: Vec<Option<u64>>,
}

/// Reads the root tree.
///
/// # Errors
/// When a tree is missing, and when the root tree is damaged or cannot be read.
pub fn read_roots(trees: &mut Trees<'_>) -> Result<Roots, DenseReason> {
    let mut found = [(EXTENT_TREE, None), (DEVICE_TREE, None), (BLOCK_GROUP_TREE, None)];
    let (root, has_group_tree) = (trees.superblock.root_tree, trees.superblock.has_block_group_tree);
    trees.walk(ROOT_TREE, root, &mut |key, item| {
        let place = found.iter_mut().find(|(tree, _)| (*tree, ROOT_ITEM) == (key.object, key.kind));
        let Some((_, place)) = place else { return Ok(()) };
        if item.len() < OLDER_ROOT || key.offset != 0 || place.is_some() {
            return Err(damaged("a root of a tree is damaged"));
        }
        *place = Some(Root { node: u64_at(item, 176), generation: u64_at(item, 160), level: u8_at(item, 238) });
        Ok(())
    })?;
    match found.map(|(_, root)| root) {
        [Some(extents), Some(devices), block_groups] if block_groups.is_some() == has_group_tree => {
            Ok(Roots { extents, devices, block_groups })
        }
        _ => Err(damaged("a root of a tree is missing")),
    }
}

/// Checks that the extents of the device tree are the copies of the chunks.
///
/// # Errors
/// When they are not, when the device is being replaced, and when the tree is damaged or cannot be read.
pub fn check_device_tree(trees: &mut Trees<'_>, roots: &Roots) -> Result<(), DenseReason> {
    let device = trees.superblock.device;
    let copies = trees.chunks.copies();
    let mut expected = copies.iter();
    trees.walk(DEVICE_TREE, roots.devices, &mut |key, item| match key.kind {
        DEV_EXTENT => {
            let extent = (key.offset, u64_at(item, 24), u64_at(item, 16));
            let is_copy = expected.next() == Some(&extent) && item.len() == DEVICE_EXTENT && key.object == device.id;
            let is_chunk = u64_at(item, 8) == CHUNKS_OBJECT;
            if is_copy && is_chunk { Ok(()) } else { Err(damaged("its device tree differs from its chunk tree")) }
        }
        DEV_REPLACE if REPLACING.contains(&u64_at(item, 32)) => Err("its device is being replaced".into()),
        DEV_STATS | DEV_REPLACE => Ok(()),
        _ => Err(damaged("its device tree has an item of an unknown kind")),
    })?;
    let is_disjoint = copies.windows(2).all(|pair| pair[0].0.saturating_add(pair[0].1) <= pair[1].0);
    let sum = copies.iter().try_fold(0_u64, |sum, (_, len, _)| sum.checked_add(*len));
    if expected.next().is_some() || !is_disjoint || sum != Some(device.in_chunks) {
        return Err(damaged("its device tree differs from its chunk tree"));
    }
    Ok(())
}

/// Calls `mark` with the position on the device and the length of each copy of all extents.
///
/// # Errors
/// When extents overlap or lie in no chunk of their kind, and when a tree is damaged or cannot be read.
pub fn mark_used(trees: &mut Trees<'_>, roots: &Roots, mark: &mut dyn FnMut(u64, u64)) -> Result<Used, DenseReason> {
    let (chunks, superblock) = (trees.chunks, trees.superblock);
    let count = chunks.all().len();
    let mut used = Used { extents: vec![0; count], block_groups: vec![None; count] };
    let mut end = 0;
    trees.walk(EXTENT_TREE, roots.extents, &mut |key, item| match key.kind {
        EXTENT_ITEM | METADATA_ITEM => {
            let len = if key.kind == EXTENT_ITEM { key.offset } else { superblock.node_size as u64 };
            let index = chunk_of_extent(superblock, chunks, key, len, item)?;
            if key.object < end {
                return Err(damaged("its extents overlap"));
            }
            // The end fits, since the chunk holds the extent.
            end = key.object.saturating_add(len);
            used.extents[index] += len;
            chunks.all()[index].copies_of(key.object).for_each(|copy| mark(copy, len));
            Ok(())
        }
        BLOCK_GROUP_ITEM if roots.block_groups.is_none() => used.add_block_group(chunks, key, item),
        other if REFERENCES.contains(&other) => Ok(()),
        _ => Err(damaged("its extent tree has an item of an unknown kind")),
    })?;
    if let Some(root) = roots.block_groups {
        trees.walk(BLOCK_GROUP_TREE, root, &mut |key, item| match key.kind {
            BLOCK_GROUP_ITEM => used.add_block_group(chunks, key, item),
            _ => Err(damaged("its block group tree has an item of an unknown kind")),
        })?;
    }
    Ok(used)
}

/// Checks an extent. Returns the index of the chunk that holds it.
fn chunk_of_extent(
    superblock: &Superblock,
    chunks: &Chunks,
    key: Key,
    len: u64,
    item: &[u8],
) -> Result<usize, DenseReason> {
    let flags = u64_at(item, 16);
    let index = chunks.index_at(key.object).filter(|&index| chunks.all()[index].holds(key.object, len));
    let index = index.ok_or_else(|| damaged("an extent lies in no chunk"))?;
    let chunk = &chunks.all()[index];
    let is_node = flags & (IS_NODE | IS_DATA) == IS_NODE;
    let fits = match is_node {
        true => !chunk.is_only_data() && len == superblock.node_size as u64,
        false => flags & IS_DATA != 0 && flags & IS_NODE == 0 && chunk.flags & DATA != 0 && key.kind == EXTENT_ITEM,
    };
    let is_aligned = (key.object | len).is_multiple_of(superblock.sector_size);
    let is_whole = item.len() >= EXTENT && len > 0 && u64_at(item, 0) > 0;
    if !fits || !is_aligned || !is_whole || u64_at(item, 8) > superblock.generation {
        return Err(damaged("an extent does not fit the chunk that it lies in"));
    }
    Ok(index)
}

impl Used {
    /// Adds a block group, which must be one of the chunks.
    fn add_block_group(&mut self, chunks: &Chunks, key: Key, item: &[u8]) -> Result<(), DenseReason> {
        let index = chunks.index_at(key.object);
        let index =
            index.filter(|&index| (chunks.all()[index].start, chunks.all()[index].len) == (key.object, key.offset));
        let index = index.ok_or_else(|| damaged("a block group is no chunk"))?;
        let is_same = item.len() == BLOCK_GROUP
            && u64_at(item, 8) == CHUNKS_OBJECT
            && u64_at(item, 16) == chunks.all()[index].flags;
        if !is_same || self.block_groups[index].replace(u64_at(item, 0)).is_some() {
            return Err(damaged("a block group differs from its chunk"));
        }
        Ok(())
    }
}

impl Chunks {
    /// Checks that the extents in each chunk are as many as its block group says, and all together as many as the superblock
    /// says.
    ///
    /// # Errors
    /// When they are not, and when a chunk has no block group.
    pub fn check_used(&self, used: &Used, superblock: &Superblock) -> Result<(), DenseReason> {
        let each = used.extents.iter().zip(&used.block_groups).all(|(sum, said)| *said == Some(*sum));
        let sum = used.extents.iter().try_fold(0_u64, |sum, of_chunk| sum.checked_add(*of_chunk));
        if each && sum == Some(superblock.used) {
            return Ok(());
        }
        Err(damaged("the sums of its extents differ from those of its block groups"))
    }
}
