//! Reads a complete tree, level by level, each level in the order of its blocks on disk.
//!
//! The nodes of a tree are scattered over the metadata, so a walk in the order of keys would be a random read for each
//! node. Here the few internal nodes are read first. Then all leaves are read in the order of their blocks, in requests
//! of up to 1 MiB. A request includes blocks between two nodes that do not belong to the tree, if that saves a request.
//! A leaf is not kept after the visitor has seen it.
//!
//! A tree that was filled in ascending order, as `thin_restore` does, has most of its internal nodes right after their
//! children on disk: when a full node is split, its second half moves to a new block, which is after these children, and
//! the children that are added later move to the next new node. A disk takes as long for a request of one block as for
//! 60 KiB and more of leaves. So when the children of one internal node were found before it, the request for the next
//! ones includes the blocks before them. Those of their children that are in this request are visited from it, and not
//! read with their level.
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

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::error::{Damage, ThinError, ThinResult};
use super::node::{LeafValues, NodeKind, TreeNode};
use super::reader::MetadataReader;
use super::{METADATA_BLOCK, MetaBlock, RawBlock};
use crate::sys::buffer::AlignedBuffer;

/// The maximum number of blocks in one read request: nearly 1 MiB. A virtio disk with the usual queue of 256 entries
/// takes 254 pages in one request. Two more would be a request of their own.
const REQUEST: usize = 254;
/// The least number of read requests of each thread: starting a thread takes about as long as one or two of them.
const REQUESTS_OF_A_THREAD: usize = 2;
/// The maximum number of blocks between two nodes of one read request.
const GAP: u64 = 8;
/// The maximum number of blocks that are read before an internal node for its children: those of a node that was split.
const BEFORE: u64 = 127;
/// The number of children among these blocks that makes it likely that the next node has as many.
const MANY: usize = 64;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
        let kinds = [const { OnceLock::new() }; MAX_DEPTH];
        // Fresh memory is slow, so all levels use the same buffers.
        let mut buffers: Vec<_> = (0..threads.max(1)).map(|_| AlignedBuffer::new()).collect();
        let mut level = vec![self.root()];
        for depth in 0..MAX_DEPTH {
            level.sort_unstable_by_key(|child| child.block);
            let kinds = (&kinds[depth], kinds.get(depth + 1));
            let progress = Progress::default();
            let work = LevelWalk { tree: self, reader, nodes: &level, visited: &visited, progress, kinds };
            level = work.read(&mut buffers, &visitor)?;
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
    progress: Progress,
    /// The kind of the first node that was read, of this level and of the next one, which the last level that a tree
    /// can have does not have. All nodes of a level have one kind.
    kinds: (&'a OnceLock<NodeKind>, Option<&'a OnceLock<NodeKind>>),
}

/// What the threads of a [`LevelWalk`] share.
#[derive(Default)]
struct Progress {
    /// The index of the first node that no thread has taken.
    next: Mutex<usize>,
    /// Whether a thread had an error.
    failed: AtomicBool,
    /// Whether the children of the internal node that was read last are before it on disk.
    children_before: AtomicBool,
}

/// One read request.
struct Request<'a> {
    /// The nodes that it is for.
    nodes: &'a [ChildNode],
    /// The blocks from the first node to the last one.
    needed: Range<u64>,
    /// The blocks to read: `needed`, and blocks before that are expected to be children of the nodes.
    blocks: Range<u64>,
}

/// The blocks of one read request.
struct ReadBlocks<'b> {
    first: u64,
    blocks: &'b [RawBlock],
}

impl<'b> ReadBlocks<'b> {
    fn get(&self, block: MetaBlock) -> Option<&'b RawBlock> {
        let index = usize::try_from(block.get().checked_sub(self.first)?).ok()?;
        self.blocks.get(index)
    }
}

impl LevelWalk<'_> {
    /// Reads and checks all nodes of the level, in up to one thread for each of `buffers`. Each thread calls `visitor`
    /// once, and passes the leaves that it reads to the result. Returns the pointers to the nodes of the next level that
    /// were not read, in no particular order. A level of leaves has none.
    ///
    /// # Errors
    /// As [`Tree::walk`].
    fn read<V: FnMut(&TreeNode<'_>)>(
        &self,
        buffers: &mut [AlignedBuffer],
        visitor: &(impl Fn() -> V + Sync),
    ) -> ThinResult<Vec<ChildNode>> {
        let work = |buffer: &mut AlignedBuffer| {
            let result = self.read_requests(buffer, visitor());
            self.progress.failed.fetch_or(result.is_err(), Relaxed);
            result
        };
        let work = &work;
        let useful = self.useful_threads(buffers.len());
        std::thread::scope(|scope| {
            let (first, others) = buffers[..useful].split_at_mut(1);
            let thread = || std::thread::Builder::new().name("thin-walk".to_owned());
            let helpers: Vec<_> =
                others.iter_mut().filter_map(|buffer| thread().spawn_scoped(scope, || work(buffer)).ok()).collect();
            let mut result = work(&mut first[0]);
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

    /// How many threads, from one to `most`, have enough read requests.
    fn useful_threads(&self, most: usize) -> usize {
        let mut next = 0;
        let requests = std::iter::from_fn(|| self.request_at(&mut next, false));
        (requests.take(most * REQUESTS_OF_A_THREAD).count() / REQUESTS_OF_A_THREAD).clamp(1, most)
    }

    /// The work of one thread of [`LevelWalk::read`]: sends read requests until none is left or a thread has failed.
    /// Calls `visit` for each leaf, and returns the pointers to nodes of the next level that were not read.
    fn read_requests(
        &self,
        buffer: &mut AlignedBuffer,
        mut visit: impl FnMut(&TreeNode<'_>),
    ) -> ThinResult<Vec<ChildNode>> {
        // Memory that is not used costs nothing, but a buffer that grows is fresh memory each time.
        buffer.resize(REQUEST * METADATA_BLOCK);
        let mut children = Vec::new();
        while let Some(request) = self.next_request().filter(|_| !self.progress.failed.load(Relaxed)) {
            let read = self.read_blocks(&request, buffer)?;
            for child in request.nodes {
                let node = self.parse(child, &read, self.kinds.0)?;
                match node.kind() {
                    NodeKind::Leaf => visit(&node),
                    NodeKind::Internal => {
                        let from = children.len();
                        self.add_children(child, &node, &mut children)?;
                        self.progress.children_before.store(are_before(&children[from..], child), Relaxed);
                        self.visit_leaves_in(&read, from, &mut children, &mut visit)?;
                    }
                }
            }
        }
        Ok(children)
    }

    fn read_blocks<'b>(&self, request: &Request<'_>, buffer: &'b mut AlignedBuffer) -> ThinResult<ReadBlocks<'b>> {
        let mut read = |range: &Range<u64>| {
            let count = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
            self.reader.read(MetaBlock::new(range.start), count, buffer).map(|_| range.start)
        };
        // A block that may not belong to the tree may be unreadable.
        let first = match read(&request.blocks) {
            Err(_) if request.blocks != request.needed => read(&request.needed)?,
            first => first?,
        };
        Ok(ReadBlocks { first, blocks: buffer.bytes().as_chunks().0 })
    }

    /// The node that `child` points to, whose block was read, and whose level has nodes of `kind`.
    fn parse<'b>(
        &self,
        child: &ChildNode,
        read: &ReadBlocks<'b>,
        kind: &OnceLock<NodeKind>,
    ) -> ThinResult<TreeNode<'b>> {
        let block = read.get(child.block).ok_or(ThinError::Damaged(child.block, Damage::Pointer))?;
        let node = self.tree.parse(child, block)?;
        if *kind.get_or_init(|| node.kind()) != node.kind() {
            return Err(ThinError::Damaged(child.block, Damage::Kind));
        }
        Ok(node)
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

    /// Calls `visit` for each leaf of `children[from..]` whose block was read, and removes it from `children`. Internal
    /// nodes remain, to be read with their level.
    fn visit_leaves_in(
        &self,
        read: &ReadBlocks<'_>,
        from: usize,
        children: &mut Vec<ChildNode>,
        visit: &mut impl FnMut(&TreeNode<'_>),
    ) -> ThinResult<()> {
        let Some(kind) = self.kinds.1 else { return Ok(()) };
        let mut kept = from;
        for index in from..children.len() {
            let child = children[index];
            if read.get(child.block).is_some() {
                let node = self.parse(&child, read, kind)?;
                if node.kind() == NodeKind::Leaf {
                    visit(&node);
                    continue;
                }
            }
            children[kept] = child;
            kept += 1;
        }
        children.truncate(kept);
        Ok(())
    }

    /// Takes the nodes of the next read request.
    fn next_request(&self) -> Option<Request<'_>> {
        let mut next = self.progress.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.request_at(&mut next, self.progress.children_before.load(Relaxed))
    }

    /// The request for the nodes from `next` on, which becomes the index of the first node that it is not for. With
    /// `children_before`, it also reads the blocks before each of its nodes.
    fn request_at(&self, next: &mut usize, children_before: bool) -> Option<Request<'_>> {
        let (done, rest) = self.nodes.split_at_checked(*next)?;
        let first = rest.first()?.block.get();
        // What is before the preceding node of the level are its own children.
        let limit = done.last().map_or(1, |preceding| preceding.block.get() + 1);
        let (before, gap) = if children_before { (BEFORE, BEFORE) } else { (0, GAP) };
        let start = first.saturating_sub(before).max(limit).min(first);
        let together = rest.windows(2).take_while(|pair| {
            let (this, following) = (pair[0].block.get(), pair[1].block.get());
            following - this <= gap + 1 && following - start < REQUEST as u64
        });
        let nodes = &rest[..=together.count()];
        *next += nodes.len();
        let end = nodes.last()?.block.get() + 1;
        Some(Request { nodes, needed: first..end, blocks: start..end })
    }
}

/// Whether many of the blocks before the node at `parent` are some of its `children`.
fn are_before(children: &[ChildNode], parent: &ChildNode) -> bool {
    let near = |child: &&ChildNode| (1..=BEFORE).contains(&parent.block.get().wrapping_sub(child.block.get()));
    children.iter().filter(near).count() >= MANY
}
