//! Errors of thin metadata.

use std::fmt;
use std::io;

use super::{MetaBlock, ThinId};
use crate::error::plain;
use crate::reason::DenseReason;

/// The result of reading thin metadata.
pub type ThinResult<T> = Result<T, ThinError>;

/// Why thin metadata cannot be read or used.
#[derive(Debug)]
pub enum ThinError {
    /// A read of the metadata device failed.
    Io(MetaBlock, io::Error),
    /// A block is not valid.
    Damaged(MetaBlock, Damage),
    /// The pool has no such device in its last transaction.
    Unknown(ThinId),
    /// The mapping tree of a device has another number of mappings than the details tree states.
    Miscounted {
        /// The device.
        id: ThinId,
        /// The number of mappings in its tree.
        found: u64,
        /// The number in the details tree.
        stated: u64,
    },
    /// The mapping trees of two devices do not differ by as many mappings as their details state.
    OtherDifference {
        /// One device.
        older: ThinId,
        /// The other one.
        newer: ThinId,
    },
    /// The kernel marked the metadata as inconsistent.
    NeedsCheck,
    /// The metadata has another size of data blocks than the pool's table.
    OtherBlockSize,
    /// The kernel has mappings that are not on disk, and cannot write them because the pool is read-only.
    Behind,
    /// The map needs more memory than there is.
    TooLarge,
}

/// What is wrong with one metadata block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// The checksum does not match.
    Checksum,
    /// The block has the number of another block.
    Location,
    /// The magic number of the superblock does not match.
    Magic,
    /// The version of the format is not supported, or incompatible features are set.
    Features,
    /// The size of data blocks, metadata blocks or of the metadata is out of range.
    Sizes,
    /// A tree's root, or a child of a node, is not a block of the metadata.
    Pointer,
    /// A node is not exactly one of leaf and internal, or is not of the kind that its depth requires.
    Kind,
    /// A node's values have the wrong size.
    ValueSize,
    /// A node has more entries than it has room for, or none.
    Entries,
    /// A node's keys are not in ascending order.
    KeyOrder,
    /// A node has keys outside the range that its parent states.
    KeyRange,
    /// Two entries point to one node.
    Twice,
    /// A tree is deeper than the format allows.
    Depth,
    /// A device's number is out of range.
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
            Self::Twice => "two entries point to it",
            Self::Depth => "tree too deep",
            Self::DeviceId => "impossible device id",
        })
    }
}

impl fmt::Display for ThinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(block, error) => write!(f, "cannot read {block}: {}", plain(error)),
            Self::Damaged(block, damage) => write!(f, "{block}: {damage}"),
            Self::Unknown(id) => write!(f, "the pool has no thin device {id}"),
            Self::Miscounted { id, found, stated } => {
                write!(f, "thin device {id} maps {found} blocks, but its details state {stated}")
            }
            Self::OtherDifference { older, newer } => {
                write!(f, "thin devices {older} and {newer} do not differ by as many blocks as their details state")
            }
            Self::NeedsCheck => f.write_str("the metadata needs a check (thin_check)"),
            Self::OtherBlockSize => f.write_str("the metadata is of another block size than its pool"),
            Self::Behind => {
                f.write_str("its pool is read-only, and not all of its mappings are in the metadata on disk")
            }
            Self::TooLarge => f.write_str("the map is too large"),
        }
    }
}

impl std::error::Error for ThinError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(_, error) => Some(error),
            _ => None,
        }
    }
}

/// For the cause of an [`crate::error::Error`].
impl From<ThinError> for io::Error {
    fn from(error: ThinError) -> Self {
        Self::other(error)
    }
}

impl From<ThinError> for DenseReason {
    fn from(error: ThinError) -> Self {
        match error {
            ThinError::Io(block, error) => Self::cannot(format!("read {block}"), &error),
            ThinError::Behind => Self::NotNow(error.to_string().into()),
            ThinError::TooLarge => Self::Unsupported(error.to_string().into()),
            _ => Self::Damaged(error.to_string().into()),
        }
    }
}
