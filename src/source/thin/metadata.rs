//! The metadata of one transaction of a pool, found from its superblock.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use super::error::{Damage, ThinError, ThinResult};
use super::lookup::NodeCache;
use super::node::LeafValues;
use super::reader::MetadataReader;
use super::superblock::{MAX_METADATA_BLOCKS, Superblock};
use super::walk::Tree;
use super::{DeviceDetails, MetaBlock, RawBlock, ThinId};
use crate::map::{Block, FillBuilder, FillMap};
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// The number of nodes in the cache for look-ups of devices.
const CACHED_NODES: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");

/// A superblock and the trees below it.
#[derive(Debug)]
pub struct Metadata {
    reader: MetadataReader,
    superblock: Superblock,
    raw: Box<RawBlock>,
    cache: NodeCache,
}

/// Reads and checks the superblock at `location`. Returns its bytes too, with which a later change is found.
///
/// # Errors
/// When it cannot be read or is not a valid superblock.
pub fn read_superblock(reader: &MetadataReader, location: MetaBlock) -> ThinResult<(Superblock, Box<RawBlock>)> {
    let mut buffer = AlignedBuffer::new();
    let raw = Box::new(reader.read(location, 1, &mut buffer)?[0]);
    let superblock = Superblock::parse(&raw, location).map_err(|damage| ThinError::Damaged(location, damage))?;
    Ok((superblock, raw))
}

impl Metadata {
    /// The metadata below the superblock at `location`. That of a metadata snapshot is a copy in another block than 0.
    ///
    /// # Errors
    /// When the superblock cannot be read or is damaged.
    pub fn open(reader: MetadataReader, location: MetaBlock) -> ThinResult<Self> {
        let (superblock, raw) = read_superblock(&reader, location)?;
        Ok(Self { reader, superblock, raw, cache: NodeCache::new(CACHED_NODES) })
    }

    /// The superblock.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The superblock's bytes.
    pub fn raw_superblock(&self) -> &RawBlock {
        &self.raw
    }

    /// The reader of the metadata device.
    pub fn reader(&self) -> &MetadataReader {
        &self.reader
    }

    fn tree(&self, root: MetaBlock, values: LeafValues) -> Tree {
        // A walk has a bit of memory for each block, which must be bounded for sparse images of any size.
        Tree { root, values, blocks: self.reader.blocks().min(MAX_METADATA_BLOCKS) }
    }

    /// The mapping tree of a device.
    ///
    /// # Errors
    /// [`ThinError::Unknown`] when the pool has no such device. Others when the metadata cannot be read or is damaged.
    pub fn mapping_tree(&self, id: ThinId) -> ThinResult<Tree> {
        let devices = self.tree(self.superblock.mapping_root, LeafValues::Numbers);
        let key = u64::from(id.get());
        match devices.next(key, &self.reader, &self.cache)? {
            Some((found, root)) if found == key => self.root_of(root),
            _ => Err(ThinError::Unknown(id)),
        }
    }

    fn root_of(&self, root: u64) -> ThinResult<Tree> {
        let tree = self.tree(MetaBlock::new(root), LeafValues::Numbers);
        if root == 0 || root >= tree.blocks {
            return Err(ThinError::Damaged(self.superblock.mapping_root, Damage::Pointer));
        }
        Ok(tree)
    }

    /// The details of a device, which are read without its mapping tree.
    ///
    /// # Errors
    /// [`ThinError::Unknown`] when the pool has no such device. Others when the metadata cannot be read or is damaged.
    pub fn details(&self, id: ThinId) -> ThinResult<DeviceDetails> {
        let tree = self.tree(self.superblock.details_root, LeafValues::Details);
        let key = u64::from(id.get());
        let leaf = tree.leaf(key, &self.reader, &self.cache)?;
        let index = leaf.node().lower_bound(key);
        let details = leaf.node().details(index).filter(|_| leaf.node().key(index) == Some(key));
        details.ok_or(ThinError::Unknown(id))
    }

    /// The ids of all devices of the pool, in ascending order: those in either of the two trees, so that a device that
    /// is missing in one of them is not overlooked.
    ///
    /// # Errors
    /// When one of the trees cannot be read or is damaged. The mapping trees of the devices are not read.
    pub fn devices(&self) -> ThinResult<Vec<ThinId>> {
        let trees =
            [(self.superblock.mapping_root, LeafValues::Numbers), (self.superblock.details_root, LeafValues::Details)];
        let mut ids = Vec::new();
        for (root, values) in trees {
            for key in self.keys(&self.tree(root, values))? {
                let id = u32::try_from(key).ok().and_then(ThinId::new);
                ids.push(id.ok_or(ThinError::Damaged(root, Damage::DeviceId))?);
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    fn keys(&self, tree: &Tree) -> ThinResult<Vec<u64>> {
        let keys = Mutex::new(Vec::new());
        tree.walk(&self.reader, 1, || |node| keys.lock().unwrap_or_else(PoisonError::into_inner).extend(node.keys()))?;
        Ok(keys.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// The mapped blocks of a device of `len` bytes, read by up to `threads` threads. Mappings past its end, which a
    /// device can have after it was reduced, are left out.
    ///
    /// # Errors
    /// When the pool has no such device, a node of its tree cannot be read or fails a check, or the number of mappings
    /// in the tree is not the one in its details.
    pub fn map(&self, id: ThinId, len: Bytes, threads: usize) -> ThinResult<FillMap> {
        let tree = self.mapping_tree(id)?;
        let stated = self.details(id)?.mapped_blocks;
        let builder = FillBuilder::new(len, self.superblock.data_block_size.bytes());
        let found = AtomicU64::new(0);
        tree.walk(&self.reader, threads, || {
            let (mut filler, found) = (builder.filler(), &found);
            move |node| {
                found.fetch_add(node.len() as u64, Relaxed);
                filler.set_ascending(node.keys().map(Block::new));
            }
        })?;
        let found = found.into_inner();
        if found != stated {
            return Err(ThinError::Miscounted { id, found, stated });
        }
        builder.finish().ok_or(ThinError::TooLarge)
    }
}
