//! Compares two mapping trees of one committed state, and reads only the nodes in which they differ.
//!
//! Within one committed state a metadata block has one content. So a subtree whose root is the same block in both trees
//! maps the same in both, and it is skipped unread. It must have the same range of keys in both trees too: then
//! everything in it is as valid in one tree as in the other one.
//!
//! Levels are counted from the leaves, which all have the same depth, so that trees of different height meet at nodes
//! of one kind. The comparison goes down from the roots. Its unit is a part of the keys for which few nodes of each
//! tree are needed. These are read together, in the order of their blocks, with several requests in progress at the same
//! time where the device is slow: see [`super::super::reader::requests`]. For each level there is one list of pointers
//! in memory, and the leaves of one part.
//!
//! Each node that is read passes the checks of a walk over the whole tree: see [`super::super::walk`]. A loop is no
//! danger, because each step goes down by one level. A node cannot be read twice for two pointers of one tree: it has a
//! key, and the key is in the range of one pointer only.

use std::ops::Range;

use super::super::TIME_BITS;
use super::super::error::{Damage, ThinError, ThinResult};
use super::super::node::{NodeKind, NodeShape, TreeNode};
use super::super::reader::MetadataReader;
use super::super::reader::requests::{Request, Requests};
use super::super::walk::{ChildNode, MAX_DEPTH, Tree};
use super::super::{METADATA_BLOCK, MetaBlock, RawBlock};
use crate::sys::buffer::AlignedBuffer;

/// The maximum number of leaves of one tree that are in memory at a time: 1 MiB.
const LEAVES: usize = 256;
/// The maximum number of internal nodes of one level of one tree whose children are in memory at a time.
const INTERNAL_NODES: usize = 32;
/// The maximum number of blocks of one read request.
const REQUEST: u64 = 254;
/// The maximum number of blocks between two nodes of one read request.
const GAP: u64 = 8;

/// How two trees differ at one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// Only the older tree has the key.
    OnlyOlder,
    /// Only the newer tree has the key.
    OnlyNewer,
    /// Both have the key, with different data blocks.
    Moved,
}

/// Pointers to nodes of one level of a tree, in the order of their keys.
#[derive(Clone)]
struct Nodes {
    /// Zero for leaves.
    level: usize,
    pointers: Vec<ChildNode>,
}

impl Nodes {
    /// The pointers whose ranges of keys overlap `keys`.
    fn overlapping(&self, keys: &Range<u64>) -> &[ChildNode] {
        let first = self.pointers.partition_point(|pointer| pointer.high <= keys.start);
        let end = self.pointers.partition_point(|pointer| pointer.low < keys.end);
        self.pointers.get(first..end).unwrap_or_default()
    }

    /// The end of the keys from `from` on for which no more than `most` nodes are needed. `None` if that is all keys.
    fn end_of_part(&self, from: u64, most: usize) -> Option<u64> {
        let first = self.pointers.partition_point(|pointer| pointer.high <= from);
        self.pointers.get(first + most).and_then(|_| self.pointers.get(first + most - 1)).map(|last| last.high)
    }

    /// The pointers that `other`, a list of the same level, does not have.
    fn without(&self, other: &Self) -> Self {
        let mut others = other.pointers.iter().peekable();
        let mut is_own = |pointer: &&ChildNode| {
            while others.next_if(|other| other.low < pointer.low).is_some() {}
            others.peek() != Some(pointer)
        };
        let pointers = self.pointers.iter().filter(|pointer| is_own(pointer)).copied().collect();
        Self { level: self.level, pointers }
    }
}

/// Nodes that were read and checked, in the order of their keys.
#[derive(Default)]
struct ReadNodes {
    blocks: Vec<RawBlock>,
    shapes: Vec<Option<NodeShape>>,
}

impl ReadNodes {
    fn nodes(&self) -> impl Iterator<Item = TreeNode<'_>> {
        let both = self.blocks.iter().zip(&self.shapes);
        both.filter_map(|(block, shape)| Some(TreeNode::checked(block, (*shape)?)))
    }

    /// The keys in `keys` and the data blocks of leaves.
    fn mappings(&self, keys: &Range<u64>) -> impl Iterator<Item = (u64, u64)> {
        let keys = keys.clone();
        self.nodes().flat_map(move |node| {
            let end = node.lower_bound(keys.end);
            let entries = (node.lower_bound(keys.start)..end).map(move |index| (node.key(index), node.number(index)));
            entries.filter_map(|(key, value)| Some((key?, value? >> TIME_BITS)))
        })
    }
}

/// The comparison of two trees.
pub struct Comparison<'a> {
    reader: &'a MetadataReader,
    /// The older tree and the newer one. `None` stands for an empty tree.
    trees: [Option<Tree>; 2],
    requests: Requests,
    /// The nodes of both trees that were read last.
    read: [ReadNodes; 2],
}

impl<'a> Comparison<'a> {
    /// The comparison of an `older` tree, or of an empty tree, with a `newer` one.
    pub fn new(reader: &'a MetadataReader, older: Option<Tree>, newer: Tree) -> Self {
        Self { reader, trees: [older, Some(newer)], requests: Requests::default(), read: Default::default() }
    }

    /// Calls `visit` for each of `keys` at which the trees differ, in ascending order.
    ///
    /// # Errors
    /// When a node cannot be read or fails a check. `visit` may have been called for some keys by then.
    pub fn differences(mut self, keys: Range<u64>, visit: &mut dyn FnMut(u64, Difference)) -> ThinResult<()> {
        let [older, newer] = self.trees.map(|tree| tree.map(|tree| tree.root));
        if older == newer {
            return Ok(());
        }
        let mut sides = [0, 1].map(|_| Nodes { level: 0, pointers: Vec::new() });
        for (side, tree) in sides.iter_mut().zip(self.trees) {
            if let Some(tree) = tree {
                *side = Nodes { level: self.level_of_root(&tree)?, pointers: vec![tree.root()] };
            }
        }
        self.compare(&sides, keys, visit)
    }

    /// The number of levels below the root of a tree, found on the way to its first leaf.
    fn level_of_root(&self, tree: &Tree) -> ThinResult<usize> {
        let mut buffer = AlignedBuffer::new();
        let mut pointer = tree.root();
        for level in 0..MAX_DEPTH {
            let block = &self.reader.read(pointer.block, 1, &mut buffer)?[0];
            let node = tree.parse(&pointer, block)?;
            if node.kind() == NodeKind::Leaf {
                return Ok(level);
            }
            pointer = tree.child(&pointer, &node, 0)?;
        }
        Err(ThinError::Damaged(tree.root, Damage::Depth))
    }

    /// Compares what is below the nodes of `sides` for `keys`.
    fn compare(
        &mut self,
        sides: &[Nodes; 2],
        keys: Range<u64>,
        visit: &mut dyn FnMut(u64, Difference),
    ) -> ThinResult<()> {
        let level = sides[0].level.max(sides[1].level);
        let most = if level == 0 { LEAVES } else { INTERNAL_NODES };
        let mut from = keys.start;
        while from < keys.end {
            let ends = sides.iter().filter(|side| side.level == level).filter_map(|side| side.end_of_part(from, most));
            let part = from..ends.min().unwrap_or(keys.end).min(keys.end);
            from = part.end;
            if level == 0 {
                self.compare_leaves(sides, &part, visit)?;
                continue;
            }
            let below = [self.below(0, &sides[0], level, &part)?, self.below(1, &sides[1], level, &part)?];
            let below = match below[0].level == below[1].level {
                true => [below[0].without(&below[1]), below[1].without(&below[0])],
                false => below,
            };
            if below.iter().any(|side| !side.pointers.is_empty()) {
                self.compare(&below, part, visit)?;
            }
        }
        Ok(())
    }

    /// The children in `keys` of the nodes of a side, if these are nodes of `level`, else the nodes themselves.
    fn below(&mut self, which: usize, side: &Nodes, level: usize, keys: &Range<u64>) -> ThinResult<Nodes> {
        let pointers = side.overlapping(keys);
        let Some(tree) = self.trees[which].filter(|_| side.level == level) else {
            return Ok(Nodes { level: side.level.min(level - 1), pointers: pointers.to_vec() });
        };
        self.read_nodes(which, &tree, pointers, NodeKind::Internal)?;
        let mut children = Vec::new();
        for (parent, node) in pointers.iter().zip(self.read[which].nodes()) {
            for index in 0..node.len() {
                children.push(tree.child(parent, &node, index)?);
            }
        }
        let below = Nodes { level: level - 1, pointers: children };
        Ok(Nodes { pointers: below.overlapping(keys).to_vec(), ..below })
    }

    /// Compares the mappings in `keys` of leaves.
    fn compare_leaves(
        &mut self,
        sides: &[Nodes; 2],
        keys: &Range<u64>,
        visit: &mut dyn FnMut(u64, Difference),
    ) -> ThinResult<()> {
        for (which, side) in sides.iter().enumerate() {
            match self.trees[which] {
                Some(tree) => self.read_nodes(which, &tree, side.overlapping(keys), NodeKind::Leaf)?,
                None => self.read[which] = ReadNodes::default(),
            }
        }
        let [mut older, mut newer] = [0, 1].map(|which| self.read[which].mappings(keys).peekable());
        loop {
            match (older.peek().copied(), newer.peek().copied()) {
                (None, None) => return Ok(()),
                (Some((key, older_block)), Some((other, newer_block))) if key == other => {
                    if older_block != newer_block {
                        visit(key, Difference::Moved);
                    }
                    older.next();
                    newer.next();
                }
                (Some((key, _)), other) if other.is_none_or(|(other, _)| key < other) => {
                    visit(key, Difference::OnlyOlder);
                    older.next();
                }
                (_, Some((key, _))) => {
                    visit(key, Difference::OnlyNewer);
                    newer.next();
                }
                (Some(_), None) => unreachable!("the arm before takes a key that has no other"),
            }
        }
    }

    /// Reads and checks nodes of one tree, in requests in the order of their blocks.
    fn read_nodes(&mut self, which: usize, tree: &Tree, pointers: &[ChildNode], kind: NodeKind) -> ThinResult<()> {
        let into = &mut self.read[which];
        into.blocks.resize(pointers.len(), [0; METADATA_BLOCK]);
        into.shapes.clear();
        into.shapes.resize(pointers.len(), None);
        let mut order: Vec<usize> = (0..pointers.len()).collect();
        order.sort_unstable_by_key(|index| pointers[*index].block);
        let groups = groups(&order, pointers);
        let requests: Vec<Request> = groups.iter().map(|(request, _)| *request).collect();
        self.requests.read(self.reader, &requests, |at, read| {
            let (request, group) = &groups[at];
            for index in *group {
                let pointer = &pointers[*index];
                let at = usize::try_from(pointer.block.get() - request.first.get()).unwrap_or(usize::MAX);
                let block = read.get(at).ok_or(ThinError::Damaged(pointer.block, Damage::Pointer))?;
                let node = tree.parse(pointer, block)?;
                if node.kind() != kind {
                    return Err(ThinError::Damaged(pointer.block, Damage::Kind));
                }
                into.shapes[*index] = Some(node.shape());
                into.blocks[*index] = *block;
            }
            Ok(())
        })
    }
}

/// Divides indices of pointers, in the order of their blocks, into those that one request each reads.
fn groups<'a>(order: &'a [usize], pointers: &[ChildNode]) -> Vec<(Request, &'a [usize])> {
    let block = |index: &usize| pointers[*index].block.get();
    let mut groups = Vec::new();
    let mut rest = order;
    while let Some(first) = rest.first().map(block) {
        let fits = |pair: &&[usize]| block(&pair[1]) - block(&pair[0]) <= GAP + 1 && block(&pair[1]) - first < REQUEST;
        let (group, others) = rest.split_at(1 + rest.windows(2).take_while(fits).count());
        rest = others;
        let count = group.last().map_or(1, block) - first + 1;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        groups.push((Request { first: MetaBlock::new(first), count }, group));
    }
    groups
}
