//! Virtual qcow2 images: where each byte of an image comes from, without storing the image.
//!
//! Pure: no devices and no files. The format is that of QEMU, `docs/interop/qcow2.rst`, version 3; the limits are those of
//! its implementation, `block/qcow2.h`. Integers in an image are big-endian.
//!
//! A [`Builder`] takes the extents of a device. The [`Layout`] that it makes says of each position of the image whether it
//! is metadata or a byte of the device. An image has these parts, each of whole clusters:
//!
//! | part | what it holds |
//! |---|---|
//! | header | one cluster: the header, its extensions, the name of the backing file |
//! | refcount table | the positions of the refcount blocks |
//! | refcount blocks | 16 bits for each cluster of the image: 1 |
//! | L1 table | the positions of the L2 tables |
//! | L2 tables | only those with an entry: the positions of the data clusters |
//! | data clusters | the clusters of the device that hold data, in the order of the device, without gaps |
//!
//! Only which clusters hold data, which are zeros and which L2 tables exist is stored, as [`FillMap`](crate::map::FillMap)s.
//! How many of a kind lie before a cluster, and which is the n-th of a kind, are binary searches in these.

mod builder;
mod header;
mod layout;
mod shape;

use std::fmt;

use crate::units::Bytes;

pub use builder::Builder;
pub use header::{Backing, BackingFormat, LONGEST_BACKING_NAME};
pub use layout::{Content, Layout, Part};

/// The size of the clusters of an image: a power of two from 4 KiB to 2 MiB.
///
/// QEMU supports clusters from 512 bytes (`MIN_CLUSTER_BITS`) to 2 MiB (`MAX_CLUSTER_BITS`). In 4 KiB there is space for the
/// header with the longest name of a backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClusterSize(u64);

impl ClusterSize {
    const SMALLEST: u64 = 4 << 10;
    const LARGEST: u64 = 2 << 20;
    /// The size that `qemu-img create` uses (`DEFAULT_CLUSTER_SIZE`).
    const DEFAULT: u64 = 64 << 10;

    /// Clusters of this size, if it is one that an image can have.
    pub fn new(size: Bytes) -> Option<Self> {
        let size = size.get();
        (size.is_power_of_two() && (Self::SMALLEST..=Self::LARGEST).contains(&size)).then_some(Self(size))
    }

    /// The size for a device of `len` bytes that is allocated in units of `block`: 64 KiB; or the largest power of two that
    /// divides `block`, if that is larger, up to 2 MiB; or what the limits of QEMU require for a device that is all data, if
    /// that is larger. `None` if a device of this length does not fit in any image.
    pub fn for_block(block: Bytes, len: Bytes) -> Option<Self> {
        let divisor = match block.get() {
            0 => Self::DEFAULT,
            block => 1 << block.trailing_zeros(),
        };
        let smallest = divisor.clamp(Self::DEFAULT, Self::LARGEST);
        let sizes = (smallest.trailing_zeros()..=Self::LARGEST.trailing_zeros()).map(|bits| Self(1 << bits));
        sizes.into_iter().find(|size| shape::can_hold(len, *size))
    }

    /// The size in bytes.
    pub const fn bytes(self) -> Bytes {
        Bytes::new(self.0)
    }

    const fn get(self) -> u64 {
        self.0
    }
}

/// Why there is no image of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The device, or its image, is larger than an image of this cluster size can be.
    TooLarge {
        /// The length of the device.
        len: Bytes,
        /// The cluster size.
        cluster: ClusterSize,
    },
    /// The extents do not follow each other from the start of the device to its end.
    Gap {
        /// The end of the extents that did.
        at: Bytes,
    },
    /// The clusters with data are so scattered that the maps of them would take too much memory.
    TooScattered,
    /// The name of the backing file is empty, longer than 1023 bytes, or has a zero byte.
    BackingName,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { len, cluster } => {
                write!(f, "a device of {len} bytes does not fit in a qcow2 image with clusters of {} bytes", cluster.0)
            }
            Self::Gap { at } => write!(f, "the extents of the device have a gap at {at}"),
            Self::TooScattered => write!(f, "the data of the device is too scattered for a qcow2 image"),
            Self::BackingName => {
                write!(f, "the name of a backing file must have 1 to 1023 bytes, none of which is zero")
            }
        }
    }
}

impl std::error::Error for Error {}
