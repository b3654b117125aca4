//! Reads a whole tree, level by level, each level in the order in which it lies on disk.
//!
//! Nodes of one tree are scattered over the metadata, so a walk in key order would be a random read per node. Here the
//! few internal nodes come first; then all leaves, sorted by position, are read in requests of up to 1 MiB, and foreign
//! blocks between them are read too where that saves a request. Nothing is kept of a leaf but what its visitor takes.
//!
//! Every node is checked by itself (see [`TreeNode::parse`]) and against its parent: its block is one of the metadata's and
//! is reached once, so there is no loop and no work beyond the metadata's size; its keys are in the range that the
//! parent gives it; all leaves are equally deep. The first failure ends the walk with an error.
//!
//! An earlier walk is never reused in part, tempting as it is to skip a subtree whose top is the same block with the
//! same content as before. A parent holds its children's block numbers but not their checksums, and blocks that are
//! freed are used again: after two commits the same parent in the same place, byte for byte, can lead to a child that was
//! freed, and rewritten with other keys. Equal block numbers prove equal subtrees only from one commit to the very
//! next, or while a metadata snapshot holds the blocks; the first cannot be seen from outside, the second costs the
//! pool space. So a map is reused whole, while the counters of its devices prove that nothing was written (see
//! [`crate::source::Guard`]), or read anew.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::error::{Damage, ThinError, ThinResult};
use super::node::{LeafValues, NodeKind, TreeNode};
use super::reader::MetadataReader;
use super::{MetaBlock, RawBlock};
use crate::sys::buffer::AlignedBuffer;

/// Blocks of one read request: 1 MiB.
const REQUEST: usize = 256;
/// Foreign blocks between two nodes that are read rather than split the request.
const GAP: u64 = 8;
/// Levels of a tree (`MAX_SPINE_DEPTH` is 64 in `drivers/md/persistent-data/dm-btree-internal.h`; a tree of 2^64 keys
/// in thinly filled nodes has fewer).
pub(super) const MAX_DEPTH: usize = 64;

/// A tree of the metadata.
#[derive(Clone, Copy, Debug)]
pub struct Tree {
    /// Its topmost node.
    pub root: MetaBlock,
    /// What its leaves hold.
    pub values: LeafValues,
    /// The number of metadata blocks, none of whose numbers is as large.
    pub blocks: u64,
}

/// A node that a parent points to: where it is, and which keys it may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChildNode {
    pub(super) block: MetaBlock,
    pub(super) low: u64,
    /// Half-open, so that no node may have a key of `u64::MAX`; no device has so many blocks.
    pub(super) high: u64,
}

impl Tree {
    pub(super) fn root(&self) -> ChildNode {
        ChildNode { block: self.root, low: 0, high: u64::MAX }
    }

    /// The node that `child` points to, read from `block`.
    pub(super) fn parse<'b>(&self, child: &ChildNode, block: &'b RawBlock) -> ThinResult<TreeNode<'b>> {
        let damaged = |damage| ThinError::Damaged(child.block, damage);
        let node = TreeNode::parse(block, child.block, self.values).map_err(damaged)?;
        self.check_range(child, &node)?;
        Ok(node)
    }

    /// Whether `node` has keys, unless it is the root, and only those that its parent gives it.
    pub(super) fn check_range(&self, child: &ChildNode, node: &TreeNode<'_>) -> ThinResult<()> {
        match node.bounds() {
            Some((first, last)) if first < child.low || last >= child.high => {
                Err(ThinError::Damaged(child.block, Damage::KeyRange))
            }
            None if child.block != self.root => Err(ThinError::Damaged(child.block, Damage::Entries)),
            _ => Ok(()),
        }
    }

    /// Entry `index` of an internal `node`, which `parent` points to.
    pub(super) fn child(&self, parent: &ChildNode, node: &TreeNode<'_>, index: usize) -> ThinResult<ChildNode> {
        let damaged = |damage| ThinError::Damaged(parent.block, damage);
        let block = node.child(index).ok_or(damaged(Damage::Entries))?;
        if block == MetaBlock::SUPERBLOCK || block.get() >= self.blocks {
            return Err(damaged(Damage::Pointer));
        }
        let low = node.key(index).ok_or(damaged(Damage::Entries))?;
        Ok(ChildNode { block, low, high: node.key(index + 1).unwrap_or(parent.high) })
    }

    /// Shows every leaf once, in no order, to one of the visitors: `visitor` makes one for each of at most `threads`
    /// threads.
    ///
    /// # Errors
    /// When a node cannot be read or fails a check. Visitors may have seen any part of the tree by then.
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

/// The blocks that a walk has come to.
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
    /// What the first node was; the others must be the same.
    kind: OnceLock<NodeKind>,
}

impl LevelWalk<'_> {
    /// Reads all nodes; the children of those that have some.
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
        // A thread costs about what reading a few requests does.
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

    /// Takes one request after the other until none is left, or another thread failed.
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

    /// The next nodes that one read request brings.
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
