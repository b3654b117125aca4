//! A node of a tree (`struct btrfs_node` and `struct btrfs_leaf` of `include/uapi/linux/btrfs_tree.h`).

use super::damaged;
use super::superblock::{Root, checksum_ok};
use crate::filesystem::fields::{array_at, u8_at, u32_at, u64_at};
use crate::reason::DenseReason;

/// The length of a header, of an item of a leaf, and of a pointer of another node.
const HEADER: usize = 101;
const ITEM: usize = 25;
const POINTER: usize = 33;
/// The length of a key.
pub const KEY: usize = 17;
/// The flags of a node at rest: `BTRFS_HEADER_FLAG_WRITTEN`, and `BTRFS_MIXED_BACKREF_REV` in the upper eight bits.
/// `BTRFS_HEADER_FLAG_RELOC` may be there too: the block was written by a balance.
const FLAGS: u64 = 1 | 1 << 56;
const RELOCATED: u64 = 2;

/// A key, in the order of the trees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub object: u64,
    pub kind: u8,
    pub offset: u64,
}

impl Key {
    /// The key at the start of `bytes`.
    pub fn parse(bytes: &[u8]) -> Self {
        Self { object: u64_at(bytes, 0), kind: u8_at(bytes, 8), offset: u64_at(bytes, 9) }
    }
}

/// What is known of a node before it is read.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// The tree that the node belongs to.
    pub tree: u64,
    pub root: Root,
    /// The first key of the node, if it has a parent.
    pub first: Option<Key>,
    /// The first key behind the node, if there is one.
    pub end: Option<Key>,
    /// The UUID of the file system, and that of its chunk tree.
    pub uuids: [[u8; 16]; 2],
}

/// A node that passed all checks.
pub struct Node<'a> {
    bytes: &'a [u8],
    count: usize,
}

/// The UUID of the chunk tree in a node that has not been checked.
pub fn chunk_tree_uuid(bytes: &[u8]) -> [u8; 16] {
    array_at(bytes, 64)
}

impl<'a> Node<'a> {
    /// Checks a node.
    ///
    /// # Errors
    /// When its checksum is wrong, when it is not the node that is expected, or when its keys or items are out of order.
    pub fn parse(bytes: &'a [u8], expected: &Expected) -> Result<Self, DenseReason> {
        if !checksum_ok(bytes) {
            return Err(damaged("the checksum of a node is wrong"));
        }
        let root = expected.root;
        let is_expected = u64_at(bytes, 48) == root.node
            && u64_at(bytes, 80) == root.generation
            && u64_at(bytes, 88) == expected.tree
            && u8_at(bytes, 100) == root.level
            && u64_at(bytes, 56) & !RELOCATED == FLAGS
            && [array_at(bytes, 32), chunk_tree_uuid(bytes)] == expected.uuids;
        if !is_expected {
            return Err(damaged("a node is not the one that its parent names"));
        }
        let size = if root.level == 0 { ITEM } else { POINTER };
        let count = usize::try_from(u32_at(bytes, 96)).ok();
        let count = count.filter(|&count| count <= bytes.len().saturating_sub(HEADER) / size);
        let node = Self { bytes, count: count.ok_or_else(|| damaged("a node has too many entries"))? };
        node.check_keys(expected, size)?;
        if root.level == 0 {
            node.check_items()?;
        }
        Ok(node)
    }

    fn check_keys(&self, expected: &Expected, size: usize) -> Result<(), DenseReason> {
        let keys = || (0..self.count).map(|index| self.key(index, size));
        let is_ascending = keys().zip(keys().skip(1)).all(|(key, next)| key < next);
        let is_inside = keys().next_back().is_none_or(|last| expected.end.is_none_or(|end| last < end));
        // Only the leaf of an empty tree has no keys.
        let starts = match expected.first {
            Some(first) => keys().next() == Some(first),
            None => self.count > 0 || expected.root.level == 0,
        };
        if is_ascending && is_inside && starts { Ok(()) } else { Err(damaged("the keys of a node are out of order")) }
    }

    /// Checks that the items of a leaf lie one before the other, the first of them at the end of the leaf.
    fn check_items(&self) -> Result<(), DenseReason> {
        let mut end = self.bytes.len() - HEADER;
        for index in 0..self.count {
            let (offset, size) = self.place(index);
            if offset.checked_add(size) != Some(end) {
                return Err(damaged("the items of a node overlap"));
            }
            end = offset;
        }
        if end < self.count * ITEM { Err(damaged("the items of a node overlap")) } else { Ok(()) }
    }

    fn key(&self, index: usize, size: usize) -> Key {
        Key::parse(self.bytes.get(HEADER + index * size..).unwrap_or_default())
    }

    /// The position of an item behind the header, and its length.
    fn place(&self, index: usize) -> (usize, usize) {
        let at = HEADER + index * ITEM + KEY;
        (u32_at(self.bytes, at) as usize, u32_at(self.bytes, at + 4) as usize)
    }

    /// The items of a leaf.
    pub fn items(&self) -> impl Iterator<Item = (Key, &'a [u8])> {
        (0..self.count).map(|index| {
            let (offset, size) = self.place(index);
            let item = self.bytes.get(HEADER + offset..).and_then(|rest| rest.get(..size)).unwrap_or_default();
            (self.key(index, ITEM), item)
        })
    }

    /// The children of a node that is no leaf, each with the first key behind it, if `end` is the one behind the node.
    pub fn children(&self, expected: &Expected) -> impl Iterator<Item = Expected> {
        (0..self.count).map(|index| {
            let at = HEADER + index * POINTER + KEY;
            let child = Root {
                node: u64_at(self.bytes, at),
                generation: u64_at(self.bytes, at + 8),
                level: expected.root.level.saturating_sub(1),
            };
            let next = (index + 1 < self.count).then(|| self.key(index + 1, POINTER));
            let first = Some(self.key(index, POINTER));
            Expected { root: child, first, end: next.or(expected.end), ..*expected }
        })
    }
}
