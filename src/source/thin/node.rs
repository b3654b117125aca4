//! A node of a B+tree (`struct btree_node` of `drivers/md/persistent-data/dm-btree-internal.h`).

use super::error::Damage;
use super::{DeviceDetails, METADATA_BLOCK, MetaBlock, RawBlock, checksum_ok, u32_at, u64_at};

/// `BTREE_CSUM_XOR` of `drivers/md/persistent-data/dm-btree-spine.c`.
pub const SALT: u32 = 121_107;
/// Bytes before the first key (`struct node_header`).
const HEADER: usize = 32;
/// Bytes of a key.
const KEY: usize = 8;

/// The kind of a node (`enum node_flags`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// Its values are the block numbers of its children.
    Internal,
    /// Its values are those of the tree, see [`LeafValues`].
    Leaf,
}

/// The format of the values in the leaves of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeafValues {
    /// 64-bit numbers: roots of mapping trees in the top-level tree, `data block << 24 | time` in a mapping tree.
    Numbers,
    /// `struct disk_device_details`.
    Details,
}

impl LeafValues {
    fn size(self) -> usize {
        match self {
            Self::Numbers => 8,
            Self::Details => 24,
        }
    }
}

/// The positions in a node that its checks found. With them, the node can be read again without the checks.
#[derive(Clone, Copy, Debug)]
pub struct NodeShape {
    kind: NodeKind,
    entries: usize,
    /// The position of the first value.
    values: usize,
}

/// A node that passed every check that can be made without its parent.
#[derive(Clone, Copy, Debug)]
pub struct TreeNode<'a> {
    block: &'a RawBlock,
    shape: NodeShape,
}

impl<'a> TreeNode<'a> {
    /// Checks the node at `location` of a tree with these leaf values.
    ///
    /// # Errors
    /// When its checksum, block number, kind, size of values or number of entries is wrong, or its keys are not
    /// strictly ascending. A node with few entries is valid, because the kernel makes such nodes. A leaf without
    /// entries is valid here. It may only be the root of an empty tree, which the caller must check.
    pub fn parse(block: &'a RawBlock, location: MetaBlock, values: LeafValues) -> Result<Self, Damage> {
        if !checksum_ok(block, SALT) {
            return Err(Damage::Checksum);
        }
        if u64_at(block, 8) != location.get() {
            return Err(Damage::Location);
        }
        let (kind, value_size) = match u32_at(block, 4) {
            1 => (NodeKind::Internal, LeafValues::Numbers.size()),
            2 => (NodeKind::Leaf, values.size()),
            _ => return Err(Damage::Kind),
        };
        if usize::try_from(u32_at(block, 24)) != Ok(value_size) {
            return Err(Damage::ValueSize);
        }
        let room = (METADATA_BLOCK - HEADER) / (KEY + value_size);
        let max = usize::try_from(u32_at(block, 20)).map_err(|_| Damage::Entries)?;
        let entries = usize::try_from(u32_at(block, 16)).map_err(|_| Damage::Entries)?;
        // `calc_max_entries` makes the maximum a multiple of three, so that two nodes can be rebalanced into three.
        if max > room || !max.is_multiple_of(3) || entries > max || (entries == 0 && kind == NodeKind::Internal) {
            return Err(Damage::Entries);
        }
        let node = Self { block, shape: NodeShape { kind, entries, values: HEADER + KEY * max } };
        if !node.keys_ascend() {
            return Err(Damage::KeyOrder);
        }
        Ok(node)
    }

    /// The node in a `block` that passed the checks before, with the result `shape`, and has not changed since.
    pub(super) fn checked(block: &'a RawBlock, shape: NodeShape) -> Self {
        Self { block, shape }
    }

    /// The result of the checks.
    pub(super) fn shape(&self) -> NodeShape {
        self.shape
    }

    /// Compares all keys, without an early end: the compiler makes faster code for that, and damage is rare.
    fn keys_ascend(&self) -> bool {
        let keys = self.raw_keys();
        let following = keys.get(1..).unwrap_or_default();
        keys.iter().zip(following).fold(true, |ok, (a, b)| ok & (u64::from_le_bytes(*a) < u64::from_le_bytes(*b)))
    }

    fn raw_keys(&self) -> &'a [[u8; KEY]] {
        self.block[HEADER..HEADER + KEY * self.shape.entries].as_chunks().0
    }

    /// Whether it is a leaf or an internal node.
    pub fn kind(&self) -> NodeKind {
        self.shape.kind
    }

    /// The number of entries.
    pub fn len(&self) -> usize {
        self.shape.entries
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.shape.entries == 0
    }

    /// The keys, strictly ascending.
    pub fn keys(&self) -> impl DoubleEndedIterator<Item = u64> + ExactSizeIterator + Clone + use<'a> {
        self.raw_keys().iter().map(|key| u64::from_le_bytes(*key))
    }

    /// The first and the last key.
    pub fn bounds(&self) -> Option<(u64, u64)> {
        let mut keys = self.keys();
        let first = keys.next()?;
        Some((first, keys.next_back().unwrap_or(first)))
    }

    /// The index of the first key that is not below `key`.
    pub fn lower_bound(&self, key: u64) -> usize {
        self.raw_keys().partition_point(|raw| u64::from_le_bytes(*raw) < key)
    }

    /// The key of entry `index`.
    pub fn key(&self, index: usize) -> Option<u64> {
        self.raw_keys().get(index).map(|key| u64::from_le_bytes(*key))
    }

    /// The value of entry `index` of an internal node, or of a leaf with [`LeafValues::Numbers`].
    pub fn number(&self, index: usize) -> Option<u64> {
        (index < self.shape.entries).then(|| u64_at(self.block, self.shape.values + 8 * index))
    }

    /// The child of entry `index` of an internal node.
    pub fn child(&self, index: usize) -> Option<MetaBlock> {
        self.number(index).map(MetaBlock::new)
    }

    /// The value of entry `index` of a leaf with [`LeafValues::Details`].
    pub fn details(&self, index: usize) -> Option<DeviceDetails> {
        let at = self.shape.values + 24 * index;
        (index < self.shape.entries).then(|| DeviceDetails {
            mapped_blocks: u64_at(self.block, at),
            transaction: u64_at(self.block, at + 8),
            created: u32_at(self.block, at + 16),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::superblock::tests::stamp;
    use super::*;

    /// A node with a valid checksum.
    pub(crate) fn node(kind: u32, location: u64, max: u32, value_size: u32, entries: &[(u64, u64)]) -> RawBlock {
        let mut block = [0; METADATA_BLOCK];
        block[4..8].copy_from_slice(&kind.to_le_bytes());
        block[8..16].copy_from_slice(&location.to_le_bytes());
        block[16..20].copy_from_slice(&u32::try_from(entries.len()).unwrap().to_le_bytes());
        block[20..24].copy_from_slice(&max.to_le_bytes());
        block[24..28].copy_from_slice(&value_size.to_le_bytes());
        for (at, (key, value)) in entries.iter().enumerate() {
            block[32 + 8 * at..][..8].copy_from_slice(&key.to_le_bytes());
            let at = 32 + 8 * max as usize + value_size as usize * at;
            if let Some(place) = block.get_mut(at..at + 8) {
                place.copy_from_slice(&value.to_le_bytes());
            }
        }
        stamp(&mut block, SALT);
        block
    }

    #[test]
    fn a_leaf_and_an_internal_node() {
        let leaf = node(2, 7, 252, 8, &[(3, 30), (5, 50), (9, 90)]);
        let leaf = TreeNode::parse(&leaf, MetaBlock::new(7), LeafValues::Numbers).unwrap();
        assert_eq!((leaf.kind(), leaf.len(), leaf.bounds()), (NodeKind::Leaf, 3, Some((3, 9))));
        assert_eq!(leaf.keys().collect::<Vec<_>>(), [3, 5, 9]);
        assert_eq!((0..4).map(|at| leaf.number(at)).collect::<Vec<_>>(), [Some(30), Some(50), Some(90), None]);
        assert_eq!([0, 3, 4, 9, 10].map(|key| leaf.lower_bound(key)), [0, 0, 1, 2, 3]);

        let internal = node(1, 8, 252, 8, &[(0, 7)]);
        let internal = TreeNode::parse(&internal, MetaBlock::new(8), LeafValues::Details).unwrap();
        assert_eq!((internal.kind(), internal.child(0)), (NodeKind::Internal, Some(MetaBlock::new(7))));

        let details = node(2, 9, 126, 24, &[(1, 11), (2, 22)]);
        let details = TreeNode::parse(&details, MetaBlock::new(9), LeafValues::Details).unwrap();
        assert_eq!(details.details(1), Some(DeviceDetails { mapped_blocks: 22, transaction: 0, created: 0 }));
        assert_eq!(details.details(2), None);
    }

    #[test]
    fn a_full_leaf_and_an_empty_one() {
        let entries: Vec<_> = (0..252).map(|at| (at, at)).collect();
        assert_eq!(
            TreeNode::parse(&node(2, 1, 252, 8, &entries), MetaBlock::new(1), LeafValues::Numbers).unwrap().len(),
            252
        );
        assert!(TreeNode::parse(&node(2, 1, 252, 8, &[]), MetaBlock::new(1), LeafValues::Numbers).unwrap().is_empty());
    }

    #[test]
    fn each_field_is_checked() {
        let two = &[(1, 1), (2, 2)][..];
        for (block, damage) in [
            (node(0, 1, 252, 8, two), Damage::Kind),
            (node(3, 1, 252, 8, two), Damage::Kind),
            (node(4, 1, 252, 8, two), Damage::Kind),
            (node(2, 2, 252, 8, two), Damage::Location),
            (node(2, 1, 252, 24, two), Damage::ValueSize),
            (node(1, 1, 252, 0, two), Damage::ValueSize),
            (node(1, 1, 126, 24, two), Damage::ValueSize),
            (node(2, 1, 0, 8, two), Damage::Entries),
            (node(2, 1, 251, 8, two), Damage::Entries),
            (node(2, 1, 255, 8, two), Damage::Entries),
            (node(2, 1, u32::MAX, 8, &[]), Damage::Entries),
            (node(1, 1, 252, 8, &[]), Damage::Entries),
            (node(2, 1, 3, 8, &[(1, 1), (2, 2), (3, 3), (4, 4)]), Damage::Entries),
            (node(2, 1, 252, 8, &[(2, 1), (2, 2)]), Damage::KeyOrder),
            (node(1, 1, 252, 8, &[(2, 1), (1, 2)]), Damage::KeyOrder),
        ] {
            assert_eq!(TreeNode::parse(&block, MetaBlock::new(1), LeafValues::Numbers).err(), Some(damage));
            let mut unstamped = block;
            unstamped[4095] ^= 1;
            let error = TreeNode::parse(&unstamped, MetaBlock::new(1), LeafValues::Numbers).err();
            assert_eq!(error, Some(Damage::Checksum));
        }
    }
}
