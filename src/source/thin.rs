//! dm-thin: the holes of thin volumes, read from the metadata of their pool.
//!
//! The metadata is an array of 4096-byte blocks (`drivers/md/dm-thin-metadata.c`). Block 0 is the [`superblock`]. It
//! has the root of the top-level tree, which maps device ids to the roots of mapping trees, and the root of the details
//! tree, which maps device ids to [`DeviceDetails`]. All trees are B+trees with one format of [`node`]s. They are
//! copied on write, so the trees below a committed root are complete until the blocks that only they use are freed and
//! used again.
//!
//! [`reader`] reads blocks, [`lookup`] finds single keys, and [`walk`] reads complete trees. The keys of a mapping tree
//! are the mapped blocks, which are data. Blocks without a key read as zeros, or as the external origin. A key that is
//! overlooked would be a false hole, so a tree that fails any check is an error and not a shorter list of mappings.

pub mod changes;
pub mod error;
pub mod guard;
pub mod held;
pub mod keeper;
pub mod lookup;
pub mod metadata;
pub mod node;
pub mod offline;
pub mod params;
pub mod pool;
pub mod reader;
pub mod record;
pub mod shared_reads;
pub mod single_activation;
pub mod superblock;
pub mod volume;
pub mod walk;

use std::fmt;

use crate::units::{Bytes, Sectors};

/// The size of a metadata block (`THIN_METADATA_BLOCK_SIZE` of `drivers/md/dm-thin-metadata.h`).
pub const METADATA_BLOCK: usize = 4096;

/// The bytes of one metadata block.
pub type RawBlock = [u8; METADATA_BLOCK];

/// The number of a metadata block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MetaBlock(u64);

impl MetaBlock {
    /// The block of the superblock (`THIN_SUPERBLOCK_LOCATION`).
    pub const SUPERBLOCK: Self = Self(0);

    /// The block with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for MetaBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "metadata block {}", self.0)
    }
}

/// The number of a thin device in its pool, of 24 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ThinId(u32);

impl ThinId {
    /// The largest number (`MAX_DEV_ID` of `drivers/md/dm-thin.c`).
    pub const MAX: u32 = (1 << 24) - 1;

    /// The device with this number. `None` when the number is out of range.
    pub const fn new(id: u32) -> Option<Self> {
        if id <= Self::MAX { Some(Self(id)) } else { None }
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for ThinId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The size of a data block of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataBlockSize(u32);

impl DataBlockSize {
    /// A size of `sectors`. `None` unless it is from 64 KiB to 1 GiB and a multiple of 64 KiB
    /// (`DATA_DEV_BLOCK_SIZE_MIN_SECTORS` and `_MAX_SECTORS` of `drivers/md/dm-thin.c`).
    pub fn new(sectors: Sectors) -> Option<Self> {
        let sectors = u32::try_from(sectors.get()).ok()?;
        ((128..=1 << 21).contains(&sectors) && sectors.is_multiple_of(128)).then_some(Self(sectors))
    }

    /// The size in sectors.
    pub fn sectors(self) -> Sectors {
        Sectors::new(self.0.into())
    }

    /// The size in bytes. It is never zero, and not always a power of two.
    pub fn bytes(self) -> Bytes {
        Bytes::new(u64::from(self.0) * Sectors::SIZE.get())
    }
}

/// The low bits of a mapping's value, which are a time. The bits above are the data block (`unpack_block_time` of
/// `drivers/md/dm-thin-metadata.c`).
const TIME_BITS: u32 = 24;

/// An entry of the details tree (`struct disk_device_details`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceDetails {
    /// The number of blocks that the device has mapped, including those past its end.
    pub mapped_blocks: u64,
    /// The transaction of the pool in which the device was created, as the program that manages the pool counts them.
    pub transaction: u64,
    /// The time of the pool at which the device was created: the number of snapshots that were made before.
    pub created: u32,
}

/// The `N` bytes at `at`.
///
/// # Panics
/// When they are not inside the block.
fn bytes_at<const N: usize>(block: &RawBlock, at: usize) -> [u8; N] {
    *block[at..].first_chunk().expect("fields end inside the block")
}

fn u32_at(block: &RawBlock, at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(block, at))
}

fn u64_at(block: &RawBlock, at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(block, at))
}

/// Whether the checksum of `block` matches. `salt` is the number of its kind of block.
///
/// The checksum is the CRC-32C of the bytes after it, without the final inversion, XORed with the salt
/// (`dm_bm_checksum` of `drivers/md/persistent-data/dm-block-manager.c`).
fn checksum_ok(block: &RawBlock, salt: u32) -> bool {
    !crc32c::crc32c(&block[4..]) ^ salt == u32_at(block, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_of_known_blocks() {
        let mut block = [0; METADATA_BLOCK];
        for (salt, stored) in [(160_774, 0x58CF_D397u32), (121_107, 0x58CC_7E82), (240_779, 0x58CE_0B1A)] {
            block[..4].copy_from_slice(&stored.to_le_bytes());
            assert!(checksum_ok(&block, salt));
            assert!(!checksum_ok(&block, salt ^ 1));
        }
        block[4095] = 1;
        assert!(!checksum_ok(&block, 240_779));
    }

    #[test]
    fn data_block_sizes_and_ids_have_their_limits() {
        for (sectors, good) in
            [(0, false), (64, false), (128, true), (192, false), (384, true), (1 << 21, true), ((1 << 21) + 128, false)]
        {
            assert_eq!(DataBlockSize::new(Sectors::new(sectors)).is_some(), good, "{sectors}");
        }
        assert!(DataBlockSize::new(Sectors::new(u64::MAX)).is_none());
        assert_eq!(DataBlockSize::new(Sectors::new(384)).map(DataBlockSize::bytes), Some(Bytes::new(192 << 10)));
        assert!(ThinId::new(ThinId::MAX).is_some() && ThinId::new(ThinId::MAX + 1).is_none());
    }
}
