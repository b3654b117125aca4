//! The superblock of thin metadata (`struct thin_disk_superblock` of `drivers/md/dm-thin-metadata.c`).

use super::error::Damage;
use super::{DataBlockSize, MetaBlock, RawBlock, checksum_ok, u32_at, u64_at};
use crate::units::Sectors;

/// `SUPERBLOCK_CSUM_XOR`.
pub const SALT: u32 = 160_774;
/// `THIN_SUPERBLOCK_MAGIC`.
const MAGIC: u64 = 27_022_010;
/// `THIN_METADATA_NEEDS_CHECK_FLAG`.
const NEEDS_CHECK: u32 = 1;
/// The maximum number of metadata blocks of a pool, rounded up (`THIN_METADATA_MAX_SECTORS` is 255 * 2^14 blocks).
pub const MAX_METADATA_BLOCKS: u64 = 1 << 22;

/// The fields of a superblock that a reader needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Whether the kernel found the metadata inconsistent, so that it must be repaired.
    pub needs_check: bool,
    /// The block of the metadata snapshot, which is a copy of a superblock.
    pub held_root: Option<MetaBlock>,
    /// The number of data blocks of the pool. Zero in a metadata snapshot.
    pub data_blocks: u64,
    /// The root of the top-level tree, which has the roots of the mapping trees.
    pub mapping_root: MetaBlock,
    /// The root of the details tree.
    pub details_root: MetaBlock,
    /// The size of a data block.
    pub data_block_size: DataBlockSize,
}

impl Superblock {
    /// Checks and reads the superblock at `location`.
    ///
    /// # Errors
    /// When it fails the checks of the kernel (`sb_check`, `__check_incompat_features`), or a size or root is out of
    /// range.
    pub fn parse(block: &RawBlock, location: MetaBlock) -> Result<Self, Damage> {
        if u64_at(block, 32) != MAGIC {
            return Err(Damage::Magic);
        }
        if !checksum_ok(block, SALT) {
            return Err(Damage::Checksum);
        }
        if u64_at(block, 8) != location.get() {
            return Err(Damage::Location);
        }
        // Versions 1 and 2 have the same layout. The kernel marks a newer layout by incompatible features.
        if !(1..=2).contains(&u32_at(block, 40)) || u32_at(block, 360) != 0 {
            return Err(Damage::Features);
        }
        if u32_at(block, 340) != 8 {
            return Err(Damage::Sizes);
        }
        let data_block_size = DataBlockSize::new(Sectors::new(u64::from(u32_at(block, 336)))).ok_or(Damage::Sizes)?;
        // The field `metadata_nr_blocks` is the size at the time of formatting: `dm_pool_resize_metadata_dev` does not
        // update it. So the limit of block numbers is the size of the device, which the reader checks.
        let pointer = |at| {
            let number = u64_at(block, at);
            (number < MAX_METADATA_BLOCKS).then_some(MetaBlock::new(number)).ok_or(Damage::Pointer)
        };
        let root = |at| pointer(at).and_then(|root| if root.get() == 0 { Err(Damage::Pointer) } else { Ok(root) });
        Ok(Self {
            needs_check: u32_at(block, 4) & NEEDS_CHECK != 0,
            held_root: Some(pointer(56)?).filter(|root| root.get() != 0),
            data_blocks: u64_at(block, 64),
            mapping_root: root(320)?,
            details_root: root(328)?,
            data_block_size,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::source::thin::METADATA_BLOCK;

    pub(crate) fn stamp(block: &mut RawBlock, salt: u32) {
        let sum = !crc32c::crc32c(&block[4..]) ^ salt;
        block[..4].copy_from_slice(&sum.to_le_bytes());
    }

    fn put(block: &mut RawBlock, at: usize, value: u64, size: usize) {
        block[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }

    fn good() -> RawBlock {
        let mut block = [0; METADATA_BLOCK];
        for (at, value, size) in
            [(32, MAGIC, 8), (40, 2, 4), (64, 1000, 8), (320, 5, 8), (328, 6, 8), (336, 384, 4), (340, 8, 4)]
        {
            put(&mut block, at, value, size);
        }
        stamp(&mut block, SALT);
        block
    }

    #[test]
    fn a_good_superblock() {
        let parsed = Superblock::parse(&good(), MetaBlock::SUPERBLOCK).unwrap();
        assert_eq!(parsed.mapping_root, MetaBlock::new(5));
        assert_eq!(parsed.details_root, MetaBlock::new(6));
        assert_eq!(parsed.data_block_size.bytes().get(), 192 << 10);
        assert_eq!(parsed.data_blocks, 1000);
        assert_eq!((parsed.held_root, parsed.needs_check), (None, false));
    }

    #[test]
    fn each_field_is_checked() {
        for (at, value, size, damage) in [
            (8, 1, 8, Some(Damage::Location)),
            (32, MAGIC + 1, 8, Some(Damage::Magic)),
            (40, 3, 4, Some(Damage::Features)),
            (40, 0, 4, Some(Damage::Features)),
            (40, 1, 4, None),
            (56, MAX_METADATA_BLOCKS, 8, Some(Damage::Pointer)),
            (56, MAX_METADATA_BLOCKS - 1, 8, None),
            (320, 0, 8, Some(Damage::Pointer)),
            (320, MAX_METADATA_BLOCKS, 8, Some(Damage::Pointer)),
            (328, u64::MAX, 8, Some(Damage::Pointer)),
            (336, 100, 4, Some(Damage::Sizes)),
            (336, 0, 4, Some(Damage::Sizes)),
            (340, 16, 4, Some(Damage::Sizes)),
            // Roots past the size at the time of formatting.
            (344, 1, 8, None),
            (360, 1, 4, Some(Damage::Features)),
        ] {
            let mut block = good();
            put(&mut block, at, value, size);
            assert_eq!(
                Superblock::parse(&block, MetaBlock::SUPERBLOCK).err(),
                if at == 32 { damage } else { Some(Damage::Checksum) }
            );
            stamp(&mut block, SALT);
            assert_eq!(Superblock::parse(&block, MetaBlock::SUPERBLOCK).err(), damage, "{value} at {at}");
        }
        assert_eq!(Superblock::parse(&[0; METADATA_BLOCK], MetaBlock::SUPERBLOCK), Err(Damage::Magic));
    }
}
