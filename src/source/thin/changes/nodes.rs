//! Reads some nodes of one level of a tree, and keeps them.
//!
//! The nodes of a comparison are scattered over the metadata: each is the leaf of one change. A disk takes long for
//! each of them and can serve many at the same time. So they are read by several threads, unless they are few requests.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::super::TIME_BITS;
use super::super::error::{Damage, ThinError, ThinResult};
use super::super::node::{NodeKind, NodeShape, TreeNode};
use super::super::reader::MetadataReader;
use super::super::walk::{ChildNode, Tree};
use super::super::{METADATA_BLOCK, MetaBlock, RawBlock};
use crate::sys::buffer::AlignedBuffer;

/// The maximum number of blocks of one read request.
const REQUEST: u64 = 254;
/// The maximum number of blocks between two nodes of one read request.
const GAP: u64 = 8;
/// The number of requests that a thread takes at a time.
const REQUESTS_OF_A_PART: usize = 8;
/// The maximum number of threads. They wait for the disk, so it does not depend on the number of processors.
const THREADS: usize = 8;

/// Nodes that were read and checked.
#[derive(Default)]
pub struct ReadNodes {
    /// The nodes in the order of their blocks on disk.
    blocks: Vec<RawBlock>,
    /// The result of the checks of each.
    shapes: Vec<Option<NodeShape>>,
    /// The places of the nodes in both lists, in the order of their keys.
    places: Vec<usize>,
}

/// Nodes that one thread reads, with the places for them.
struct Part<'a> {
    /// In the order of their blocks.
    pointers: &'a [ChildNode],
    blocks: &'a mut [RawBlock],
    shapes: &'a mut [Option<NodeShape>],
}

/// What is the same for all parts.
struct Reading<'a> {
    reader: &'a MetadataReader,
    tree: &'a Tree,
    kind: NodeKind,
}

impl ReadNodes {
    /// Forgets all nodes.
    pub fn clear(&mut self) {
        self.places.clear();
    }

    /// Reads and checks the nodes to which `pointers` of `tree` point, in the order of their keys, and keeps them in
    /// place of those that were read before.
    ///
    /// # Errors
    /// When a node cannot be read, fails a check or is not of that kind.
    pub fn read(
        &mut self,
        reader: &MetadataReader,
        tree: &Tree,
        pointers: &[ChildNode],
        kind: NodeKind,
    ) -> ThinResult<()> {
        self.blocks.resize(pointers.len(), [0; METADATA_BLOCK]);
        self.shapes.clear();
        self.shapes.resize(pointers.len(), None);
        let mut order: Vec<usize> = (0..pointers.len()).collect();
        order.sort_unstable_by_key(|index| pointers[*index].block);
        let sorted: Vec<ChildNode> = order.iter().map(|index| pointers[*index]).collect();
        self.places.resize(pointers.len(), 0);
        for (place, index) in order.iter().enumerate() {
            self.places[*index] = place;
        }
        let parts = parts(&sorted, &mut self.blocks, &mut self.shapes);
        Reading { reader, tree, kind }.read_all(parts)
    }

    /// The nodes in the order of their keys.
    pub fn nodes(&self) -> impl Iterator<Item = TreeNode<'_>> {
        self.places.iter().filter_map(|place| Some(TreeNode::checked(&self.blocks[*place], self.shapes[*place]?)))
    }

    /// The keys in `keys` and the data blocks of leaves.
    pub fn mappings(&self, keys: &Range<u64>) -> impl Iterator<Item = (u64, u64)> {
        let keys = keys.clone();
        self.nodes().flat_map(move |node| {
            let end = node.lower_bound(keys.end);
            let entries = (node.lower_bound(keys.start)..end).map(move |index| (node.key(index), node.number(index)));
            entries.filter_map(|(key, value)| Some((key?, value? >> TIME_BITS)))
        })
    }
}

/// The number of the first nodes that are read with one request.
fn request(pointers: &[ChildNode]) -> usize {
    let Some(first) = pointers.first() else { return 0 };
    let fits = |pair: &&[ChildNode]| {
        let (this, next) = (pair[0].block.get(), pair[1].block.get());
        next - this <= GAP + 1 && next - first.block.get() < REQUEST
    };
    1 + pointers.windows(2).take_while(fits).count()
}

/// Divides nodes into parts of some requests each.
fn parts<'a>(
    mut pointers: &'a [ChildNode],
    mut blocks: &'a mut [RawBlock],
    mut shapes: &'a mut [Option<NodeShape>],
) -> Vec<Part<'a>> {
    let mut parts = Vec::new();
    while !pointers.is_empty() {
        let mut count = 0;
        for _ in 0..REQUESTS_OF_A_PART {
            count += request(&pointers[count..]);
        }
        let (these_pointers, these_blocks, these_shapes);
        (these_pointers, pointers) = pointers.split_at(count);
        (these_blocks, blocks) = blocks.split_at_mut(count);
        (these_shapes, shapes) = shapes.split_at_mut(count);
        parts.push(Part { pointers: these_pointers, blocks: these_blocks, shapes: these_shapes });
    }
    parts
}

impl Reading<'_> {
    fn read_all(&self, parts: Vec<Part<'_>>) -> ThinResult<()> {
        let threads = parts.len().min(THREADS);
        let parts = Mutex::new(parts);
        let work = || {
            let mut buffer = AlignedBuffer::new();
            loop {
                let part = parts.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let Some(part) = part else { return Ok(()) };
                self.read_part(part, &mut buffer)?;
            }
        };
        thread::scope(|scope| {
            let thread = || thread::Builder::new().name("thin-compare".to_owned());
            // The parts of a thread that cannot be started are read by the others.
            let helpers: Vec<_> = (1..threads).filter_map(|_| thread().spawn_scoped(scope, work).ok()).collect();
            let mut result = work();
            for helper in helpers {
                let other = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                result = result.and(other);
            }
            result
        })
    }

    fn read_part(&self, part: Part<'_>, buffer: &mut AlignedBuffer) -> ThinResult<()> {
        let mut done = 0;
        while done < part.pointers.len() {
            let nodes = done..done + request(&part.pointers[done..]);
            let (first, last) = (part.pointers[nodes.start].block.get(), part.pointers[nodes.end - 1].block.get());
            let count = usize::try_from(last - first + 1).unwrap_or(usize::MAX);
            let read = self.reader.read(MetaBlock::new(first), count, buffer)?;
            for place in nodes.clone() {
                let pointer = &part.pointers[place];
                let at = usize::try_from(pointer.block.get() - first).unwrap_or(usize::MAX);
                let block = read.get(at).ok_or(ThinError::Damaged(pointer.block, Damage::Pointer))?;
                let node = self.tree.parse(pointer, block)?;
                if node.kind() != self.kind {
                    return Err(ThinError::Damaged(pointer.block, Damage::Kind));
                }
                part.shapes[place] = Some(node.shape());
                part.blocks[place] = *block;
            }
            done = nodes.end;
        }
        Ok(())
    }
}
