//! Reads a complete tree, level by level, each level in the order of its blocks on disk.
//!
//! The nodes of a tree are scattered over the metadata, so a walk in the order of keys would be a random read for each
//! node. Here the few internal nodes are read first. Then all leaves are read in the order of their blocks, in requests
//! of up to 1 MiB. A request includes blocks between two nodes that do not belong to the tree, if that saves a request.
//! A leaf is not kept after the visitor has seen it.
//!
//! Each node is checked by itself (see [`TreeNode::parse`]) and against its parent. Its block is inside the metadata
//! and is visited only once, so that a loop is an error and the work is bounded by the size of the metadata. Its keys
//! are in the range that the parent states. All leaves have the same depth. The first failure ends the walk with an
//! error.
//!
//! No part of an earlier walk is reused, not even a subtree whose root is the same block with the same content. A
//! parent has the block numbers of its children, but not their checksums, and freed blocks are used again. After two
//! commits, an identical parent in the same block can point to a child that was freed and rewritten with other keys.
//! Equal block numbers prove equal subtrees only between two consecutive commits, which cannot be observed from
//! outside, or while a metadata snapshot holds the blocks, which costs space in the pool. So a map is reused only as a
//! whole, as long as the counters of its devices prove that nothing was written (see [`crate::source::Guard`]).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::error::{Damage, ThinError, ThinResult};
use super::node::{LeafValues, NodeKind, TreeNode};
use super::reader::MetadataReader;
use super::{MetaBlock, RawBlock};
use crate::sys::buffer::AlignedBuffer;

/// The maximum number of blocks in one read request: 1 MiB.
const REQUEST: usize = 256;
/// The maximum number of blocks between two nodes of one read request.
const GAP: u64 = 8;
/// The maximum number of levels of a tree (`MAX_SPINE_DEPTH` of `drivers/md/persistent-data/dm-btree-internal.h`). A
/// tree of 2^64 keys has fewer, even if its nodes have few entries.
pub(super) const MAX_DEPTH: usize = 64;

/// A tree of the metadata.
#[derive(Clone, Copy, Debug)]
pub struct Tree {
    /// The block of its root node.
    pub root: MetaBlock,
    /// The format of the values in its leaves.
    pub values: LeafValues,
    /// The number of metadata blocks. Each block number of a node is smaller.
    pub blocks: u64,
}

/// A pointer to a node: its block, and the range of keys that its parent states for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChildNode {
    pub(super) block: MetaBlock,
    pub(super) low: u64,
    /// Exclusive, so no node may have the key `u64::MAX`. No device has that many blocks.
    pub(super) high: u64,
}

impl Tree {
    pub(super) fn root(&self) -> ChildNode {
        ChildNode { block: self.root, low: 0, high: u64::MAX }
    }

    /// Checks the node that `child` points to, whose bytes are in `block`.
    pub(super) fn parse<'b>(&self, child: &ChildNode, block: &'b RawBlock) -> ThinResult<TreeNode<'b>> {
        let damaged = |damage| ThinError::Damaged(child.block, damage);
        let node = TreeNode::parse(block, child.block, self.values).map_err(damaged)?;
        self.check_range(child, &node)?;
        Ok(node)
    }

    /// Checks that `node` has only keys in the range that its parent states, and at least one unless it is the root.
    pub(super) fn check_range(&self, child: &ChildNode, node: &TreeNode<'_>) -> ThinResult<()> {
        match node.bounds() {
            Some((first, last)) if first < child.low || last >= child.high => {
                Err(ThinError::Damaged(child.block, Damage::KeyRange))
            }
            None if child.block != self.root => Err(ThinError::Damaged(child.block, Damage::Entries)),
            _ => Ok(()),
        }
    }

    /// The pointer in entry `index` of an internal `node`, to which `parent` points.
    pub(super) fn child(&self, parent: &ChildNode, node: &TreeNode<'_>, index: usize) -> ThinResult<ChildNode> {
        let damaged = |damage| ThinError::Damaged(parent.block, damage);
        let block = node.child(index).ok_or(damaged(Damage::Entries))?;
        if block == MetaBlock::SUPERBLOCK || block.get() >= self.blocks {
            return Err(damaged(Damage::Pointer));
        }
        let low = node.key(index).ok_or(damaged(Damage::Entries))?;
        Ok(ChildNode { block, low, high: node.key(index + 1).unwrap_or(parent.high) })
    }

    /// Calls a visitor once for each leaf, in no particular order. `visitor` makes one visitor for each of up to
    /// `threads` threads.
    ///
    /// # Errors
    /// When a node cannot be read or fails a check. The visitors may have been called for any part of the tree by then.
    pub fn walk<V: FnMut(&TreeNode<'_>)>(
        &self,
        reader: &MetadataReader,
        threads: usize,
        visitor: impl Fn() -> V + Sync,
    ) -> ThinResult<()> {
        let visited = VisitedBlocks::new(self.blocks);
        visited.mark(self.root)?;
        let mut level = vec![self.root()];
        for _ in 0..MAX_DEPTH {
            level.sort_unstable_by_key(|child| child.block);
            let work = LevelWalk { tree: self, reader, nodes: &level, visited: &visited, kind: OnceLock::new() };
            level = work.read(threads, &visitor)?;
            if level.is_empty() {
                return Ok(());
            }
        }
        Err(ThinError::Damaged(self.root, Damage::Depth))
    }
}

/// A bitmap of the blocks that a walk has found pointers to.
struct VisitedBlocks(Vec<AtomicU64>);

impl VisitedBlocks {
    fn new(blocks: u64) -> Self {
        Self((0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn mark(&self, block: MetaBlock) -> ThinResult<()> {
        let bit = 1 << (block.get() % 64);
        let word = usize::try_from(block.get() / 64).ok().and_then(|word| self.0.get(word));
        match word.map(|word| word.fetch_or(bit, Relaxed) & bit) {
            Some(0) => Ok(()),
            Some(_) => Err(ThinError::Damaged(block, Damage::Twice)),
            None => Err(ThinError::Damaged(block, Damage::Pointer)),
        }
    }
}

/// The nodes of one depth, sorted by block.
struct LevelWalk<'a> {
    tree: &'a Tree,
    reader: &'a MetadataReader,
    nodes: &'a [ChildNode],
    visited: &'a VisitedBlocks,
    /// The kind of the first node that was read. All nodes of a level have one kind.
    kind: OnceLock<NodeKind>,
}

impl LevelWalk<'_> {
    /// Reads and checks all nodes of the level, in up to `threads` threads. Each thread calls `visitor` once, and
    /// passes the leaves that it reads to the result. Returns the pointers to the nodes of the next level, in no
    /// particular order. A level of leaves has none.
    ///
    /// # Errors
    /// As [`Tree::walk`].
    fn read<V: FnMut(&TreeNode<'_>)>(
        &self,
        threads: usize,
        visitor: &(impl Fn() -> V + Sync),
    ) -> ThinResult<Vec<ChildNode>> {
        let next = Mutex::new(0);
        let failed = AtomicBool::new(false);
        let work = || {
            let result = self.read_requests(&next, &failed, visitor());
            failed.fetch_or(result.is_err(), Relaxed);
            result
        };
        // Starting a thread takes about as long as a few read requests.
        let helpers = threads.min(self.nodes.len() / REQUEST).saturating_sub(1);
        std::thread::scope(|scope| {
            let helpers: Vec<_> = (0..helpers)
                .filter_map(|_| std::thread::Builder::new().name("thin-walk".to_owned()).spawn_scoped(scope, work).ok())
                .collect();
            let mut result = work();
            for helper in helpers {
                let other = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                result = result.and_then(|mut children| {
                    children.append(&mut other?);
                    Ok(children)
                });
            }
            result
        })
    }

    /// The work of one thread of [`LevelWalk::read`]: sends read requests until none is left or `failed` is set. Calls
    /// `visit` for each leaf, and returns the pointers in internal nodes. `next` is the index of the first node that no
    /// thread has taken.
    fn read_requests(
        &self,
        next: &Mutex<usize>,
        failed: &AtomicBool,
        mut visit: impl FnMut(&TreeNode<'_>),
    ) -> ThinResult<Vec<ChildNode>> {
        let mut buffer = AlignedBuffer::new();
        let mut children = Vec::new();
        while let Some(request) = self.next_request(next).filter(|_| !failed.load(Relaxed)) {
            let first = request[0].block.get();
            let index = |child: &ChildNode| usize::try_from(child.block.get() - first).unwrap_or(usize::MAX);
            let count = request.last().map_or(0, index) + 1;
            let blocks = self.reader.read(request[0].block, count, &mut buffer)?;
            for child in request {
                let node = self.tree.parse(child, &blocks[index(child)])?;
                if *self.kind.get_or_init(|| node.kind()) != node.kind() {
                    return Err(ThinError::Damaged(child.block, Damage::Kind));
                }
                match node.kind() {
                    NodeKind::Leaf => visit(&node),
                    NodeKind::Internal => self.add_children(child, &node, &mut children)?,
                }
            }
        }
        Ok(children)
    }

    fn add_children(&self, parent: &ChildNode, node: &TreeNode<'_>, children: &mut Vec<ChildNode>) -> ThinResult<()> {
        children.reserve(node.len());
        for index in 0..node.len() {
            let child = self.tree.child(parent, node, index)?;
            self.visited.mark(child.block)?;
            children.push(child);
        }
        Ok(())
    }

    /// The nodes of the next read request.
    fn next_request(&self, next: &Mutex<usize>) -> Option<&[ChildNode]> {
        let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = self.nodes.get(*next..)?;
        let first = rest.first()?.block.get();
        let together = rest.windows(2).take_while(|pair| {
            let (this, following) = (pair[0].block.get(), pair[1].block.get());
            following - this <= GAP + 1 && following - first < REQUEST as u64
        });
        let count = 1 + together.count();
        *next += count;
        Some(&rest[..count])
    }
}
