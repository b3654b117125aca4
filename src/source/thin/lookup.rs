//! Looks up single keys of a tree, from its root down to a leaf.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;

use super::error::{Damage, ThinError, ThinResult};
use super::node::{NodeKind, NodeShape, TreeNode};
use super::reader::MetadataReader;
use super::walk::{ChildNode, MAX_DEPTH, Tree};
use super::{MetaBlock, RawBlock};
use crate::sys::buffer::AlignedBuffer;

/// A node in memory that passed the checks of [`TreeNode::parse`].
#[derive(Debug)]
struct CheckedNode {
    block: Box<RawBlock>,
    shape: NodeShape,
}

impl CheckedNode {
    fn node(&self) -> TreeNode<'_> {
        TreeNode::checked(&self.block, self.shape)
    }
}

/// The leaf that a look-up has found, and the end of its range of keys.
#[derive(Debug)]
pub struct Leaf {
    checked: Arc<CheckedNode>,
    high: u64,
}

impl Leaf {
    /// The leaf's node.
    pub fn node(&self) -> TreeNode<'_> {
        self.checked.node()
    }

    /// The first key that belongs to the next leaf, or `None` in the last one.
    pub fn next(&self) -> Option<u64> {
        (self.high != u64::MAX).then_some(self.high)
    }
}

/// A cache of nodes, for look-ups in metadata that does not change.
#[derive(Debug)]
pub struct NodeCache {
    nodes: Mutex<LruCache<MetaBlock, Arc<CheckedNode>>>,
}

impl NodeCache {
    /// A cache of up to `nodes` nodes of 4 KiB each.
    pub fn new(nodes: NonZeroUsize) -> Self {
        Self { nodes: Mutex::new(LruCache::new(nodes)) }
    }

    /// The node that `child` of `tree` points to. A node in the cache has passed the checks that do not depend on its
    /// parent. The others are made each time, because a node can have parents in several trees.
    fn node(&self, tree: &Tree, child: &ChildNode, reader: &MetadataReader) -> ThinResult<Arc<CheckedNode>> {
        let lock = || self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let cached = lock().get(&child.block).map(Arc::clone);
        if let Some(checked) = cached {
            tree.check_range(child, &checked.node())?;
            return Ok(checked);
        }
        let mut buffer = AlignedBuffer::new();
        let block = Box::new(reader.read(child.block, 1, &mut buffer)?[0]);
        let shape = tree.parse(child, &block)?.shape();
        let checked = Arc::new(CheckedNode { block, shape });
        lock().put(child.block, Arc::clone(&checked));
        Ok(checked)
    }
}

impl Tree {
    /// The leaf whose range of keys includes `key`.
    ///
    /// # Errors
    /// When a node on the way cannot be read or fails a check.
    pub fn leaf(&self, key: u64, reader: &MetadataReader, cache: &NodeCache) -> ThinResult<Leaf> {
        let mut child = self.root();
        for _ in 0..MAX_DEPTH {
            let checked = cache.node(self, &child, reader)?;
            let node = checked.node();
            if node.kind() == NodeKind::Leaf {
                return Ok(Leaf { checked, high: child.high });
            }
            // The last entry that is not above the key. No leaf has keys below the first entry.
            let above = node.lower_bound(key.saturating_add(1));
            child = self.child(&child, &node, above.saturating_sub(1))?;
        }
        Err(ThinError::Damaged(self.root, Damage::Depth))
    }

    /// The key and the value of the first entry at or after `key`, in a tree with
    /// [`super::node::LeafValues::Numbers`].
    ///
    /// # Errors
    /// When a node on the way cannot be read or fails a check.
    pub fn next(&self, key: u64, reader: &MetadataReader, cache: &NodeCache) -> ThinResult<Option<(u64, u64)>> {
        let mut from = key;
        loop {
            let leaf = self.leaf(from, reader, cache)?;
            let node = leaf.node();
            let index = node.lower_bound(key);
            if let Some(found) = node.key(index).zip(node.number(index)) {
                return Ok(Some(found));
            }
            match leaf.next() {
                Some(next) if next > from => from = next,
                _ => return Ok(None),
            }
        }
    }
}
