//! The superblock: what the file system is, and whether its free space may be used at all.
//!
//! Source of the offsets and limits: e2fsprogs, `lib/ext2fs/ext2_fs.h` (`struct ext2_super_block`) and
//! `lib/ext2fs/openfs.c` (`ext2fs_open2`); Linux, `fs/ext4/super.c`.

use super::super::fields::{u16_at, u32_at};
use super::checksum::{Checksums, crc16, crc32c};
use super::features::{Features, orphans};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// Where the superblock is on the device.
pub(super) const OFFSET: usize = 1024;
/// The size of the superblock.
pub(super) const SIZE: usize = 1024;
/// The place of `s_magic`.
const MAGIC_AT: usize = 0x38;
const MAGIC: u16 = 0xef53;
/// The place of `s_checksum`, which is the last field.
const CHECKSUM_AT: usize = 0x3fc;
/// `s_checksum_type`: the only type there is.
const CRC32C: u8 = 1;
/// `s_state`: unmounted cleanly, no errors detected, no orphans being recovered.
const CLEAN: u16 = 1;
const ERRORS_DETECTED: u16 = 2;
/// `s_flags`: the variants of the directory hash, and a file system for test code. Other flags belong to snapshots inside
/// the file system, which the kernel never had.
const FLAGS_UNDERSTOOD: u32 = 0x1 | 0x2 | 0x4;
/// The largest `s_log_block_size`: 64 KiB.
const MAX_LOG_BLOCK_SIZE: u32 = 6;
/// The largest `s_log_cluster_size`: 512 MiB (`EXT2_MAX_CLUSTER_LOG_SIZE` is 29).
const MAX_LOG_CLUSTER_SIZE: u32 = 19;
/// The size of the inodes of revision 0.
const OLD_INODE_SIZE: u32 = 128;
/// The size of group descriptors without the feature `64bit`.
const OLD_DESCRIPTOR_SIZE: usize = 32;

/// Which groups have a copy of the superblock. Group 0 always has it.
#[derive(Clone, Copy)]
pub(super) enum Backups {
    /// All groups.
    All,
    /// The groups 1 and the powers of 3, 5 and 7 (`sparse_super`).
    Powers,
    /// These groups (`sparse_super2`), where 0 stands for none.
    These([u32; 2]),
}

/// The geometry of a file system that may be used. All numbers are in blocks unless they have a unit.
pub(super) struct Superblock {
    pub block_size: u64,
    /// The blocks of a cluster, as a power of two. Bits of bitmaps are clusters.
    pub cluster_bits: u32,
    /// The end of the file system.
    pub blocks: u64,
    /// Where group 0 begins.
    pub first_data_block: u64,
    pub blocks_per_group: u64,
    pub free_blocks: u64,
    /// The number of groups.
    pub groups: u32,
    /// The length of the inode table of each group.
    pub inode_table: u64,
    /// The size of a group descriptor in bytes.
    pub descriptor_size: usize,
    /// What is reserved behind the group descriptors, so that they can grow.
    pub reserved_descriptors: u64,
    /// From this block of descriptors on, each is in the groups that it describes (`meta_bg`).
    pub first_meta_bg: Option<u64>,
    pub backups: Backups,
    /// Whether the bitmaps and the inode table of a group may lie in other groups.
    pub flex_bg: bool,
    pub checksums: Checksums,
    /// The block of the protection against two mounts at once.
    pub mmp_block: Option<u64>,
}

/// Whether the first bytes of a device, which begin at offset 0, have the magic number of a superblock.
pub(super) fn has_magic(head: &[u8]) -> bool {
    u16_at(head, OFFSET + MAGIC_AT) == MAGIC
}

impl Superblock {
    /// Reads the superblock of a device of `len` bytes.
    ///
    /// # Errors
    /// If the file system is not clean, is damaged, or has features that are not understood.
    pub(super) fn parse(record: &[u8; SIZE], len: Bytes) -> Result<Self, DenseReason> {
        if u16_at(record, MAGIC_AT) != MAGIC {
            return Err(damaged("its superblock has no magic number"));
        }
        let features = features(record)?;
        let checksums = checksums(record, features)?;
        check_state(record)?;
        let block = Blocks::parse(record, features)?;
        let blocks = of_64bit(record, features, 0x4, 0x150)?;
        let first_data_block = u64::from(u32_at(record, 0x14));
        let group_blocks = blocks.checked_sub(first_data_block).filter(|&blocks| blocks > 0);
        // With blocks of 1 KiB, block 0 is before the first group, unless clusters are larger than blocks.
        if first_data_block != u64::from(block.log_cluster_size == 0) {
            return Err(damaged("the first data block in its superblock is wrong"));
        }
        let bytes = blocks.checked_mul(block.size).map(Bytes::new);
        if bytes.is_none_or(|bytes| bytes > len) {
            return Err(damaged("it is longer than its device"));
        }
        let groups = group_blocks.and_then(|blocks| u32::try_from(blocks.div_ceil(block.per_group)).ok());
        let groups = groups.ok_or_else(|| damaged("the number of blocks in its superblock is wrong"))?;
        let descriptor_size = descriptor_size(record, features)?;
        let first_meta_bg = features.meta_bg().then(|| u64::from(u32_at(record, 0x104)));
        let per_block = block.size / descriptor_size as u64;
        if first_meta_bg.is_some_and(|first| first > u64::from(groups).div_ceil(per_block)) {
            return Err(damaged("the first meta block group in its superblock is wrong"));
        }
        Ok(Self {
            block_size: block.size,
            cluster_bits: block.cluster_bits,
            blocks,
            first_data_block,
            blocks_per_group: block.per_group,
            free_blocks: of_64bit(record, features, 0xc, 0x158)?,
            groups,
            inode_table: inode_table(record, block.size, groups)?,
            descriptor_size,
            reserved_descriptors: u64::from(u16_at(record, 0xce)),
            first_meta_bg,
            backups: backups(record, features),
            flex_bg: features.flex_bg(),
            checksums,
            mmp_block: features.mmp().then(|| halves(u32_at(record, 0x168), u32_at(record, 0x16c))),
        })
    }

    /// The number of clusters of a whole group.
    pub(super) fn clusters_per_group(&self) -> u64 {
        self.blocks_per_group >> self.cluster_bits
    }

    /// The position of a block, which must lie in the file system.
    pub(super) fn position(&self, block: u64) -> Bytes {
        Bytes::new(block.saturating_mul(self.block_size))
    }
}

/// The sizes of blocks, clusters and groups.
struct Blocks {
    size: u64,
    log_cluster_size: u32,
    cluster_bits: u32,
    per_group: u64,
}

impl Blocks {
    fn parse(record: &[u8; SIZE], features: Features) -> Result<Self, DenseReason> {
        let (log_block_size, log_cluster_size) = (u32_at(record, 0x18), u32_at(record, 0x1c));
        let cluster_bits = log_cluster_size.checked_sub(log_block_size);
        let limits = log_block_size <= MAX_LOG_BLOCK_SIZE && log_cluster_size <= MAX_LOG_CLUSTER_SIZE;
        let Some(cluster_bits) = cluster_bits.filter(|&bits| limits && (bits == 0 || features.bigalloc())) else {
            return Err(damaged("the size of blocks or clusters in its superblock is wrong"));
        };
        let size = 1024 << log_block_size;
        let (per_group, clusters) = (u64::from(u32_at(record, 0x20)), u64::from(u32_at(record, 0x24)));
        // The bitmap of a group is one block, of which whole bytes are used.
        if clusters == 0 || clusters % 8 != 0 || clusters > 8 * size || clusters << cluster_bits != per_group {
            return Err(damaged("the number of blocks per group in its superblock is wrong"));
        }
        Ok(Self { size, log_cluster_size, cluster_bits, per_group })
    }
}

fn damaged(text: &'static str) -> DenseReason {
    DenseReason::Damaged(text.into())
}

/// The features, which revision 0 does not have.
fn features(record: &[u8; SIZE]) -> Result<Features, DenseReason> {
    let features =
        Features { compat: u32_at(record, 0x5c), incompat: u32_at(record, 0x60), ro_compat: u32_at(record, 0x64) };
    match u32_at(record, 0x4c) {
        0 if (features.compat, features.incompat, features.ro_compat) != (0, 0, 0) => {
            Err(damaged("its revision has no features, and its superblock has some"))
        }
        0 | 1 => features.check().map(|()| features),
        revision => Err(format!("its revision {revision} is not supported").into()),
    }
}

/// Verifies the checksum of the superblock, if it has one.
fn checksums(record: &[u8; SIZE], features: Features) -> Result<Checksums, DenseReason> {
    let uuid = &record[0x68..0x78];
    if features.metadata_csum() {
        if record[0x175] != CRC32C {
            return Err(format!("its checksums of type {} are not supported", record[0x175]).into());
        }
        if crc32c(!0, &record[..CHECKSUM_AT]) != u32_at(record, CHECKSUM_AT) {
            return Err(damaged("the checksum of its superblock is wrong"));
        }
        let seed = if features.csum_seed() { u32_at(record, 0x270) } else { crc32c(!0, uuid) };
        return Ok(Checksums::Crc32c { seed });
    }
    Ok(match features.gdt_csum() {
        true => Checksums::Crc16 { of_uuid: crc16(!0, uuid) },
        false => Checksums::Absent,
    })
}

/// Whether the file system was unmounted cleanly, or frozen, and has no known errors.
fn check_state(record: &[u8; SIZE]) -> Result<(), DenseReason> {
    let state = u16_at(record, 0x3a);
    let error_count = u32_at(record, 0x194);
    if state & ERRORS_DETECTED != 0 || error_count != 0 {
        return Err(DenseReason::State("errors were found in it: run e2fsck".into()));
    }
    if state != CLEAN {
        return Err(DenseReason::State("it was not unmounted cleanly: run e2fsck".into()));
    }
    // `s_last_orphan`: the start of the list of orphans.
    if u32_at(record, 0xe8) != 0 {
        return Err(orphans());
    }
    let unknown = u32_at(record, 0x160) & !FLAGS_UNDERSTOOD;
    if unknown != 0 {
        return Err(format!("it has flags that are not supported: {unknown:#x}").into());
    }
    Ok(())
}

/// A number whose upper half has a meaning only with the feature `64bit`.
fn of_64bit(record: &[u8; SIZE], features: Features, low: usize, high: usize) -> Result<u64, DenseReason> {
    let high = u32_at(record, high);
    if high != 0 && !features.has_64bit() {
        return Err(damaged("its superblock has numbers of 64 bits without that feature"));
    }
    Ok(halves(u32_at(record, low), high))
}

fn descriptor_size(record: &[u8; SIZE], features: Features) -> Result<usize, DenseReason> {
    if !features.has_64bit() {
        return Ok(OLD_DESCRIPTOR_SIZE);
    }
    match usize::from(u16_at(record, 0xfe)) {
        size @ 64..=1024 if size.is_power_of_two() => Ok(size),
        _ => Err(damaged("the size of group descriptors in its superblock is wrong")),
    }
}

/// The number of blocks of each inode table.
fn inode_table(record: &[u8; SIZE], block_size: u64, groups: u32) -> Result<u64, DenseReason> {
    let inode_size = if u32_at(record, 0x4c) == 0 { OLD_INODE_SIZE } else { u32::from(u16_at(record, 0x58)) };
    let per_group = u64::from(u32_at(record, 0x28));
    let size_is_valid = inode_size >= OLD_INODE_SIZE && inode_size.is_power_of_two();
    // The bitmap of the inodes of a group is one block, too.
    let count_is_valid = per_group > 0 && per_group <= 8 * block_size;
    let all = u64::from(groups).checked_mul(per_group);
    if !size_is_valid || u64::from(inode_size) > block_size || !count_is_valid || all != Some(u32_at(record, 0).into())
    {
        return Err(damaged("the number or the size of inodes in its superblock is wrong"));
    }
    Ok((per_group * u64::from(inode_size)).div_ceil(block_size))
}

fn backups(record: &[u8; SIZE], features: Features) -> Backups {
    if features.sparse_super2() {
        Backups::These([u32_at(record, 0x24c), u32_at(record, 0x250)])
    } else if features.sparse_super() {
        Backups::Powers
    } else {
        Backups::All
    }
}

/// A 64-bit number of which both halves have a place of their own.
pub(super) fn halves(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}
