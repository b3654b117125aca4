//! The superblock: the geometry of the file system, its features, and its counters.
//!
//! Source: `struct xfs_dsb` in `fs/xfs/libxfs/xfs_format.h`; the checks are those of `xfs_validate_sb_common` in
//! `fs/xfs/libxfs/xfs_sb.c`, and stricter ones where another value was never written.

use std::ops::Range;

use super::super::ReadBytes;
use super::super::fields::array_at;
use super::bytes::{be16, be32, be64, damaged, has_checksum, read};
use super::log::Lsn;
use crate::reason::DenseReason;

/// `XFS_SB_MAGIC`.
pub(super) const MAGIC: [u8; 4] = *b"XFSB";

/// Features of version 4 in `sb_versionnum`, named `XFS_SB_VERSION_*BIT`.
mod version {
    /// The number of the version.
    pub const NUMBER: u16 = 0x000f;
    /// `SHAREDBIT`: nobody knows its meaning.
    pub const SHARED: u16 = 0x0200;
    /// `LOGV2BIT`: the log has records of version 2.
    pub const LOG_V2: u16 = 0x0400;
    /// `SECTORBIT`: `sb_logsectsize` is valid.
    pub const SECTOR: u16 = 0x0800;
    /// `MOREBITSBIT`: `sb_features2` is valid.
    pub const MORE_BITS: u16 = 0x8000;
    /// `EXTFLGBIT` and `DIRV2BIT`, without which the kernel mounts no file system.
    pub const NEEDED: u16 = 0x1000 | 0x2000;
    /// `NLINKBIT` and `ALIGNBIT`, `LOG_V2`, `NEEDED` and `MORE_BITS`: version 5 has them always.
    pub const NEEDED_IN_5: u16 = 0x0020 | 0x0080 | LOG_V2 | NEEDED | MORE_BITS;
}

/// Features in `sb_features2`, named `XFS_SB_VERSION2_*`.
mod features2 {
    /// `LAZYSBCOUNTBIT`, `ATTR2BIT`, `PROJID32BIT` and `FTYPE`.
    pub const KNOWN: u32 = 0x2 | 0x8 | 0x80 | 0x200;
    /// `CRCBIT`, which only version 5 has.
    pub const CRC: u32 = 0x100;
    /// `LAZYSBCOUNTBIT`, `ATTR2BIT`, `PROJID32BIT` and `CRC`: version 5 has them always.
    pub const NEEDED_IN_5: u32 = 0x2 | 0x8 | 0x80 | CRC;
}

/// Features of version 5 that a kernel which does not know them must not write, named `XFS_SB_FEAT_RO_COMPAT_*`.
mod ro_compat {
    /// `RMAPBT`: a tree of the owners of blocks.
    pub const RMAP: u32 = 0x2;
    /// `REFLINK`: a tree of the shared blocks.
    pub const REFLINK: u32 = 0x4;
    /// `FINOBT`, `RMAP`, `REFLINK` and `INOBTCNT`.
    pub const KNOWN: u32 = 0x1 | RMAP | REFLINK | 0x8;
}

/// Features of version 5 that a kernel must know, named `XFS_SB_FEAT_INCOMPAT_*`.
mod incompat {
    /// `META_UUID`: metadata has the UUID of `sb_meta_uuid`.
    pub const META_UUID: u32 = 0x4;
    /// `NEEDSREPAIR`.
    pub const NEEDS_REPAIR: u32 = 0x10;
    /// `FTYPE`, `SPINODES`, `META_UUID`, `BIGTIME`, `NREXT64`, `EXCHRANGE` and `PARENT`: none concerns the free space.
    /// Not known are `METADIR`, `ZONED` and `ZONE_GAPS`: with them, realtime blocks may be on the same device.
    pub const KNOWN: u32 = 0x1 | 0x2 | META_UUID | 0x8 | 0x20 | 0x40 | 0x80;
}

/// The largest group: `XFS_MAX_AG_BYTES`.
const MAX_GROUP_BYTES: u64 = 1 << 40;
/// The smallest group other than the last one: `XFS_MIN_AG_BYTES`.
const MIN_GROUP_BYTES: u64 = 1 << 24;
/// The smallest last group: `XFS_MIN_AG_BLOCKS`.
const MIN_GROUP_BLOCKS: u64 = 64;
/// The largest log: `XFS_MAX_LOG_BLOCKS` and `XFS_MAX_LOG_BYTES`.
const MAX_LOG_BLOCKS: u64 = 1 << 20;
const MAX_LOG_BYTES: u64 = 1 << 31;
/// The largest stripe unit of a log: `XLOG_MAX_RECORD_BSIZE`.
const MAX_LOG_STRIPE: u64 = 1 << 18;

/// What a superblock says, after all checks.
#[derive(Debug)]
pub(super) struct Superblock {
    /// In bytes.
    pub block_size: u64,
    /// In bytes.
    pub sector_size: u64,
    /// The length of the file system.
    pub blocks: u64,
    /// The length of each group but the last one, in blocks.
    pub group_blocks: u32,
    pub group_count: u32,
    /// `sb_fdblocks`.
    pub free_blocks: u64,
    /// Whether the version is 5, in which metadata has checksums.
    pub has_checksums: bool,
    pub has_rmap: bool,
    pub has_reflink: bool,
    pub has_log_v2: bool,
    /// The UUID in the log.
    pub uuid: [u8; 16],
    /// The UUID in all other metadata.
    pub metadata_uuid: [u8; 16],
    /// The log record that wrote this superblock. Version 4 does not store it.
    pub lsn: Option<Lsn>,
    log_start: u64,
    log_length: u32,
    root_inode: u64,
    /// The bits of a number of a block within its group, and those of an inode within its block.
    group_log: u8,
    inodes_log: u8,
}

impl Superblock {
    /// Reads and checks the superblock of the first group.
    ///
    /// # Errors
    /// If it is damaged, or the state or a feature of the file system is not supported.
    pub(super) fn read(device: &dyn ReadBytes) -> Result<Self, DenseReason> {
        let mut bytes = read(device, 0, 512, "the superblock")?;
        if !bytes.starts_with(&MAGIC) {
            return Err(damaged("it has no superblock of XFS"));
        }
        let number = be16(&bytes, 100) & version::NUMBER;
        if number != 4 && number != 5 {
            return Err(format!("version {number} of XFS is not supported").into());
        }
        let sector_size = power_of_two(be16(&bytes, 102).into(), bytes[121], 9..=15, "sectors")?;
        if number == 5 {
            bytes = read(device, 0, sector_size as usize, "the superblock")?;
            if !has_checksum(&bytes, 224) {
                return Err(damaged("the checksum of the superblock is wrong"));
            }
        }
        check_features(&bytes, number)?;
        check_state(&bytes)?;
        let superblock = Self::parse(&bytes, number, sector_size)?;
        superblock.check_groups(device, &bytes)?;
        superblock.check_log(&bytes)?;
        Ok(superblock)
    }

    fn parse(bytes: &[u8], number: u16, sector_size: u64) -> Result<Self, DenseReason> {
        let block_size = power_of_two(be32(bytes, 4).into(), bytes[120], 9..=16, "blocks")?;
        let inode_size = power_of_two(be16(bytes, 104).into(), bytes[122], 8..=11, "inodes")?;
        let inodes = block_size / inode_size;
        let inodes_log = bytes[123];
        if inodes == 0 || u64::from(be16(bytes, 106)) != inodes || 1_u64.checked_shl(inodes_log.into()) != Some(inodes)
        {
            return Err(damaged("the number of inodes in a block is wrong"));
        }
        if sector_size > block_size || number == 5 && block_size < 1024 || bytes[192].saturating_add(bytes[120]) > 16 {
            return Err(damaged("the sizes of blocks, directory blocks and sectors do not fit"));
        }
        let checked = number == 5;
        let other_uuid = checked && be32(bytes, 216) & incompat::META_UUID != 0;
        Ok(Self {
            block_size,
            sector_size,
            blocks: be64(bytes, 8),
            group_blocks: be32(bytes, 84),
            group_count: be32(bytes, 88),
            free_blocks: be64(bytes, 144),
            has_checksums: checked,
            has_rmap: checked && be32(bytes, 212) & ro_compat::RMAP != 0,
            has_reflink: checked && be32(bytes, 212) & ro_compat::REFLINK != 0,
            has_log_v2: has(bytes, version::LOG_V2),
            uuid: array_at(bytes, 32),
            metadata_uuid: array_at(bytes, if other_uuid { 248 } else { 32 }),
            lsn: checked.then(|| Lsn::new(be64(bytes, 240))),
            log_start: be64(bytes, 48),
            log_length: be32(bytes, 96),
            root_inode: be64(bytes, 56),
            group_log: bytes[124],
            inodes_log,
        })
    }

    /// Checks the number and the lengths of the groups, and that they lie on the device.
    fn check_groups(&self, device: &dyn ReadBytes, bytes: &[u8]) -> Result<(), DenseReason> {
        let group = u64::from(self.group_blocks);
        let group_bytes = group * self.block_size;
        if !(MIN_GROUP_BYTES..=MAX_GROUP_BYTES).contains(&group_bytes)
            || group.next_power_of_two().ilog2() != u32::from(bytes[124])
        {
            return Err(damaged("the length of its groups is wrong"));
        }
        let last = self.blocks.checked_sub(u64::from(self.group_count.saturating_sub(1)) * group);
        if self.group_count == 0 || last.is_none_or(|last| !(MIN_GROUP_BLOCKS..=group).contains(&last)) {
            return Err(damaged("the number of its groups is wrong"));
        }
        if self.free_blocks > self.blocks {
            return Err(damaged("it has more free blocks than blocks"));
        }
        match self.blocks.checked_mul(self.block_size) {
            Some(end) if end <= device.len().get() => Ok(()),
            _ => Err(damaged(format!("the device is shorter than its {} blocks of {}", self.blocks, self.block_size))),
        }
    }

    /// Checks that the log lies in one group, and the sizes of its sectors and stripes.
    fn check_log(&self, bytes: &[u8]) -> Result<(), DenseReason> {
        if self.log_start == 0 {
            return Err("its log is on another device, whose state is not known".into());
        }
        let (group, block) = self.split(self.log_start);
        let length = u64::from(self.log_length);
        let inside = group < u64::from(self.group_count)
            && block >= u64::from(self.header_blocks())
            && block + length <= u64::from(self.length_of(group as u32));
        if !inside || length == 0 || length > MAX_LOG_BLOCKS || length * self.block_size > MAX_LOG_BYTES {
            return Err(damaged("the place of its log is wrong"));
        }
        let (sector, sector_log, stripe) = (be16(bytes, 194), bytes[193], u64::from(be32(bytes, 196)));
        match has(bytes, version::SECTOR) {
            true => drop(power_of_two(sector.into(), sector_log, 9..=15, "sectors of its log")?),
            false if sector != 0 || sector_log != 0 => {
                return Err(damaged("the size of the sectors of its log is wrong"));
            }
            false => {}
        }
        if stripe > 1 && (stripe % self.block_size != 0 || stripe > MAX_LOG_STRIPE) {
            return Err(damaged("the stripe unit of its log is wrong"));
        }
        Ok(())
    }

    /// The blocks of the log.
    pub(super) fn log_blocks(&self) -> Range<u64> {
        let (group, block) = self.split(self.log_start);
        let start = group * u64::from(self.group_blocks) + block;
        start..start + u64::from(self.log_length)
    }

    /// The first block of a group.
    pub(super) fn first_block_of(&self, group: u32) -> u64 {
        u64::from(group) * u64::from(self.group_blocks)
    }

    /// The length of a group in blocks.
    pub(super) fn length_of(&self, group: u32) -> u32 {
        let rest = self.blocks.saturating_sub(self.first_block_of(group));
        u32::try_from(rest).map_or(self.group_blocks, |rest| rest.min(self.group_blocks))
    }

    /// The blocks at the start of each group that its four sectors occupy.
    pub(super) fn header_blocks(&self) -> u32 {
        (4 * self.sector_size).div_ceil(self.block_size) as u32
    }

    /// The block of the inode of the root directory.
    ///
    /// # Errors
    /// If there is no such block.
    pub(super) fn root_inode_block(&self) -> Result<u64, DenseReason> {
        let (group, block) = self.split(self.root_inode >> self.inodes_log);
        if group >= u64::from(self.group_count) || block >= u64::from(self.length_of(group as u32)) {
            return Err(damaged("the number of the inode of its root directory is wrong"));
        }
        Ok(group * u64::from(self.group_blocks) + block)
    }

    /// The group and the block in it, of a number that has both (`XFS_FSB_TO_AGNO` and `XFS_FSB_TO_AGBNO`).
    fn split(&self, number: u64) -> (u64, u64) {
        (number >> self.group_log, number & ((1 << self.group_log) - 1))
    }
}

/// Whether `sb_versionnum` has a feature.
fn has(bytes: &[u8], feature: u16) -> bool {
    be16(bytes, 100) & feature != 0
}

/// Checks a size that is stored together with its logarithm.
fn power_of_two(size: u64, log: u8, allowed: std::ops::RangeInclusive<u8>, what: &str) -> Result<u64, DenseReason> {
    match allowed.contains(&log) && size == 1 << log {
        true => Ok(size),
        false => Err(damaged(format!("the size of its {what} is wrong"))),
    }
}

/// Checks that all features are known, and that those are there without which the kernel mounts no file system.
fn check_features(bytes: &[u8], number: u16) -> Result<(), DenseReason> {
    let unknown = |kind: &str, bits: u32| match bits {
        0 => Ok(()),
        bits => Err(DenseReason::from(format!("it has {kind}features that are not supported: {bits:#x}"))),
    };
    let (versions, second) = (be16(bytes, 100), be32(bytes, 200));
    unknown("", (versions & version::SHARED).into())?;
    if second != be32(bytes, 204) {
        return Err(damaged("the two copies of its feature bits differ"));
    }
    let more = if has(bytes, version::MORE_BITS) { second } else { 0 };
    let (needed, needed2, known2) = match number {
        5 => (version::NEEDED_IN_5, features2::NEEDED_IN_5, features2::KNOWN | features2::CRC),
        _ => (version::NEEDED, 0, features2::KNOWN),
    };
    unknown("second ", more & !known2)?;
    if versions & needed != needed || more & needed2 != needed2 {
        return Err("it lacks features that the kernel requires".into());
    }
    if number == 5 {
        if be32(bytes, 216) & incompat::NEEDS_REPAIR != 0 {
            return Err(DenseReason::State("it needs a repair: run xfs_repair".into()));
        }
        unknown("compatible ", be32(bytes, 208))?;
        unknown("read-only compatible ", be32(bytes, 212) & !ro_compat::KNOWN)?;
        unknown("incompatible ", be32(bytes, 216) & !incompat::KNOWN)?;
        unknown("incompatible log ", be32(bytes, 220))?;
    }
    Ok(())
}

/// Checks that the file system is complete.
fn check_state(bytes: &[u8]) -> Result<(), DenseReason> {
    match (bytes[126], bytes[179]) {
        (0, 0) => Ok(()),
        (0, _) => Err("it is of a shared version, which is not supported".into()),
        _ => Err(DenseReason::State("mkfs.xfs has not completed it".into())),
    }
}
