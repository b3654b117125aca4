//! Reads the nodes of trees.

use super::chunks::Chunks;
use super::damaged;
use super::node::{Expected, Key, Node, chunk_tree_uuid};
use super::superblock::{Root, Superblock};
use crate::filesystem::ReadBytes;
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The most levels of a tree (`BTRFS_MAX_LEVEL` of `include/uapi/linux/btrfs_tree.h`).
const MAX_LEVEL: u8 = 8;

/// What a walk does with the items of a tree.
pub type Visit<'a> = dyn FnMut(Key, &[u8]) -> Result<(), DenseReason> + 'a;

/// The trees of a file system.
pub struct Trees<'a> {
    device: &'a dyn ReadBytes,
    pub superblock: &'a Superblock,
    /// The chunks in which the nodes are.
    pub chunks: &'a Chunks,
    chunk_tree_uuid: [u8; 16],
    /// The logical positions of all nodes that were read.
    pub nodes: Vec<u64>,
}

impl<'a> Trees<'a> {
    /// The trees whose nodes are in these chunks.
    ///
    /// # Errors
    /// When the root of the chunk tree cannot be read.
    pub fn new(device: &'a dyn ReadBytes, superblock: &'a Superblock, chunks: &'a Chunks) -> Result<Self, DenseReason> {
        let mut trees = Self { device, superblock, chunks, chunk_tree_uuid: [0; 16], nodes: Vec::new() };
        trees.chunk_tree_uuid = chunk_tree_uuid(&trees.read(superblock.chunk_tree.node)?);
        Ok(trees)
    }

    /// Calls `visit` with all items of a tree, in the order of their keys.
    ///
    /// # Errors
    /// When a node is damaged or cannot be read, and when `visit` fails.
    pub fn walk(&mut self, tree: u64, root: Root, visit: &mut Visit<'_>) -> Result<(), DenseReason> {
        if root.level >= MAX_LEVEL || root.generation > self.superblock.generation {
            return Err(damaged("a root of a tree has a wrong level or is newer than the superblock"));
        }
        let uuids = [self.superblock.node_uuid, self.chunk_tree_uuid];
        self.walk_node(&Expected { tree, root, first: None, end: None, uuids }, visit)
    }

    /// The level of `expected` falls with each call, so that the depth is bounded.
    fn walk_node(&mut self, expected: &Expected, visit: &mut Visit<'_>) -> Result<(), DenseReason> {
        let bytes = self.read(expected.root.node)?;
        let node = Node::parse(&bytes, expected)?;
        // The keys of all nodes of a level ascend. So a node that occurs twice is found, and the number of nodes is bounded
        // by the length of the device.
        self.nodes.push(expected.root.node);
        if expected.root.level == 0 {
            return node.items().try_for_each(|(key, item)| visit(key, item));
        }
        node.children(expected).try_for_each(|child| {
            if child.root.generation > expected.root.generation {
                return Err(damaged("a node is newer than its parent"));
            }
            self.walk_node(&child, visit)
        })
    }

    /// The bytes of the node at a logical position.
    fn read(&self, node: u64) -> Result<Vec<u8>, DenseReason> {
        let size = self.superblock.node_size;
        let chunk = self.chunks.at(node).filter(|chunk| chunk.holds(node, size as u64) && !chunk.is_only_data());
        let chunk = chunk.filter(|_| node.is_multiple_of(self.superblock.sector_size));
        let copy = chunk.and_then(|chunk| chunk.copies_of(node).next());
        let at = copy.ok_or_else(|| damaged("a node lies in no chunk"))?;
        let mut bytes = vec![0; size];
        self.device
            .read_exact(Bytes::new(at), &mut bytes)
            .map_err(|error| DenseReason::cannot("read its trees", &error))?;
        Ok(bytes)
    }
}
