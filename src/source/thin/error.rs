//! What can be wrong with thin metadata.

use std::fmt;
use std::io;

use super::{MetaBlock, ThinId};
use crate::error::Error;

/// The result of reading thin metadata.
pub type Result<T> = std::result::Result<T, ThinError>;

/// Why thin metadata cannot be read or believed.
#[derive(Debug)]
pub enum ThinError {
    /// The metadata device refused a read.
    Io(MetaBlock, io::Error),
    /// A block is not what it should be.
    Damaged(MetaBlock, Damage),
    /// The pool has no such device, or not yet.
    Unknown(ThinId),
    /// A device maps another number of blocks than its details say.
    Miscounted {
        /// The device.
        id: ThinId,
        /// The number of mappings in its tree.
        found: u64,
        /// The number that the details tree has.
        stated: u64,
    },
    /// The kernel marked the metadata as inconsistent.
    NeedsCheck,
    /// The metadata has another size of data blocks than the pool's table.
    OtherBlockSize,
    /// The kernel knows of mappings that are not on disk.
    Behind,
    /// The map would need more memory than any real device's.
    TooLarge,
}

/// What is wrong with one metadata block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// The checksum does not match.
    Checksum,
    /// The block says that it belongs elsewhere.
    Location,
    /// The superblock's magic number is another.
    Magic,
    /// A version of the format that is not known, or incompatible features.
    Features,
    /// The size of data blocks, metadata blocks or of the metadata is impossible.
    Sizes,
    /// A tree's root, or a child of a node, is not a block of the metadata.
    Pointer,
    /// A node is not exactly one of leaf and internal, or not the one that its depth asks for.
    Kind,
    /// A node's values have another size than they must.
    ValueSize,
    /// A node has more entries than room, or none.
    Entries,
    /// A node's keys do not ascend.
    KeyOrder,
    /// A node has keys outside the range that its parent gives it.
    KeyRange,
    /// A node is reached twice.
    Twice,
    /// A tree is deeper than any can be.
    Depth,
    /// A device has an impossible number.
    DeviceId,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Checksum => "wrong checksum",
            Self::Location => "wrong block number",
            Self::Magic => "no thin-pool superblock",
            Self::Features => "unknown version or features",
            Self::Sizes => "impossible sizes",
            Self::Pointer => "points outside the metadata",
            Self::Kind => "wrong kind of node",
            Self::ValueSize => "wrong size of values",
            Self::Entries => "impossible number of entries",
            Self::KeyOrder => "keys out of order",
            Self::KeyRange => "keys outside the parent's range",
            Self::Twice => "reached twice",
            Self::Depth => "tree too deep",
            Self::DeviceId => "impossible device id",
        })
    }
}

impl fmt::Display for ThinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(block, error) => write!(f, "cannot read {block}: {}", crate::error::plain(error)),
            Self::Damaged(block, damage) => write!(f, "{block}: {damage}"),
            Self::Unknown(id) => write!(f, "the pool has no thin device {id}"),
            Self::Miscounted { id, found, stated } => {
                write!(f, "thin device {id} maps {found} blocks, but its details say {stated}")
            }
            Self::NeedsCheck => f.write_str("the metadata needs a check (thin_check)"),
            Self::OtherBlockSize => f.write_str("the metadata is of another block size than its pool"),
            Self::Behind => f.write_str("its pool is read-only, and knows more than its metadata on disk"),
            Self::TooLarge => f.write_str("the map is too large"),
        }
    }
}

impl std::error::Error for ThinError {}

impl From<ThinError> for Error {
    fn from(error: ThinError) -> Self {
        let text = error.to_string();
        match error {
            ThinError::Io(block, error) => Self::failed(format!("cannot read {block}")).because(error),
            _ => Self::failed(text),
        }
    }
}
