//! The superblock (`struct btrfs_super_block` of `include/uapi/linux/btrfs_tree.h`).

use super::damaged;
use crate::filesystem::ReadBytes;
use crate::filesystem::fields::{array_at, has_at, u8_at, u16_at, u32_at, u64_at};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The positions of the superblock and of its copies (`btrfs_sb_offset` of `fs/btrfs/disk-io.h`). A position beyond the end
/// of the device has none.
pub const POSITIONS: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];
/// `BTRFS_SUPER_INFO_SIZE`.
pub const SIZE: usize = 4096;
/// `BTRFS_MAGIC`, and its position.
pub const MAGIC: &[u8] = b"_BHRfS_M";
pub const MAGIC_AT: usize = 64;
/// The length of a checksum field. The checksum covers what follows it.
pub const CHECKSUM_FIELD: usize = 32;

/// The only flag that a file system at rest has: `BTRFS_HEADER_FLAG_WRITTEN`. Others are errors, seeds, dumps of metadata and
/// changes of the format that are not complete (`BTRFS_SUPER_FLAG_*`).
const FLAGS: u64 = 1;
/// Features that do not change where extents are, or that are read here (`BTRFS_FEATURE_INCOMPAT_*`): MIXED_BACKREF,
/// DEFAULT_SUBVOL, MIXED_GROUPS, COMPRESS_LZO, COMPRESS_ZSTD, BIG_METADATA, EXTENDED_IREF, SKINNY_METADATA, NO_HOLES,
/// METADATA_UUID.
const INCOMPATIBLE: u64 = 0b111_0111_1111 & !(1 << 7);
/// Without MIXED_BACKREF, the extent tree has an older format.
const MIXED_BACKREF: u64 = 1;
const METADATA_UUID: u64 = 1 << 10;
/// Features that a reader may ignore (`BTRFS_FEATURE_COMPAT_RO_*`): FREE_SPACE_TREE, FREE_SPACE_TREE_VALID, VERITY,
/// BLOCK_GROUP_TREE, which is read here.
const READABLE: u64 = 0b1111;
const BLOCK_GROUP_TREE: u64 = 1 << 3;
/// `BTRFS_CSUM_TYPE_CRC32`.
const CRC32C: u16 = 0;
/// `BTRFS_SYSTEM_CHUNK_ARRAY_SIZE`, and the position of the array.
const SYSTEM_CHUNKS: usize = 2048;
const SYSTEM_CHUNKS_AT: usize = 811;
/// The position of the item of the device (`struct btrfs_dev_item`), and the length of the item.
const DEVICE_AT: usize = 201;
pub const DEVICE_ITEM: usize = 98;

/// A reference to the root node of a tree.
#[derive(Clone, Copy, Debug)]
pub struct Root {
    /// The logical position of the node.
    pub node: u64,
    /// The transaction that wrote the node.
    pub generation: u64,
    /// The level of the node. Leaves have level 0.
    pub level: u8,
}

/// The device of the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    pub id: u64,
    /// How much of the device belongs to the file system, in bytes.
    pub len: u64,
    /// How much of it belongs to chunks, in bytes.
    pub in_chunks: u64,
    pub uuid: [u8; 16],
    /// The file system.
    pub file_system: [u8; 16],
}

impl Device {
    /// Parses the item of a device.
    pub fn parse(item: &[u8]) -> Self {
        Self {
            id: u64_at(item, 0),
            len: u64_at(item, 8),
            in_chunks: u64_at(item, 16),
            uuid: array_at(item, 66),
            file_system: array_at(item, 82),
        }
    }
}

/// A superblock that passed all checks that can be made without the trees.
pub struct Superblock {
    pub generation: u64,
    /// The UUID in the header of each node.
    pub node_uuid: [u8; 16],
    pub sector_size: u64,
    pub node_size: usize,
    /// The sum of all used extents, in bytes.
    pub used: u64,
    pub root_tree: Root,
    pub chunk_tree: Root,
    pub has_block_group_tree: bool,
    pub device: Device,
    /// The chunks in which the chunk tree is: a sequence of keys and items.
    pub system_chunks: Vec<u8>,
}

/// Reads the superblock, and compares it with its copies.
///
/// # Errors
/// When it is damaged, older than a copy or not supported, and when it cannot be read.
pub fn read(device: &dyn ReadBytes) -> Result<Superblock, DenseReason> {
    let mut block = [0; SIZE];
    for (position, is_first) in POSITIONS.into_iter().zip([true, false, false]) {
        let end = position + SIZE as u64;
        if device.len().get() < end && !is_first {
            break;
        }
        let mut bytes = [0; SIZE];
        let at = Bytes::new(position);
        device.read_exact(at, &mut bytes).map_err(|error| DenseReason::cannot("read its superblock", &error))?;
        if is_first {
            block = bytes;
            check_type(&block)?;
        }
        let is_valid = has_at(&bytes, MAGIC_AT, MAGIC) && u64_at(&bytes, 48) == position && checksum_ok(&bytes);
        if is_first && !is_valid {
            return Err(damaged("the checksum or the position of its superblock is wrong"));
        }
        // What lies at the position of a copy may be a leftover of another file system.
        let is_copy = is_valid && array_at::<16>(&bytes, 32) == array_at::<16>(&block, 32);
        if is_copy && u64_at(&bytes, 72) > u64_at(&block, 72) {
            return Err(damaged("a copy of its superblock is newer than the superblock"));
        }
    }
    parse(&block, device.len())
}

/// Whether the checksum at the start of a block is right.
pub fn checksum_ok(block: &[u8]) -> bool {
    let rest = block.get(CHECKSUM_FIELD..).unwrap_or_default();
    u32_at(block, 0) == crc32c::crc32c(rest)
}

/// Refuses kinds of checksums that cannot be verified.
fn check_type(block: &[u8]) -> Result<(), DenseReason> {
    match u16_at(block, 196) {
        CRC32C => Ok(()),
        1 => Err("its checksums are of the kind xxhash64, which is not supported".into()),
        2 => Err("its checksums are of the kind sha256, which is not supported".into()),
        3 => Err("its checksums are of the kind blake2, which is not supported".into()),
        other => Err(format!("its checksums are of the unknown kind {other}").into()),
    }
}

fn parse(block: &[u8], len: Bytes) -> Result<Superblock, DenseReason> {
    check_features(block)?;
    let (sector_size, node_size) = (u32_at(block, 144), u32_at(block, 148));
    let is_size = |size: u32| size.is_power_of_two() && (4096..=65536).contains(&size);
    if !is_size(sector_size) || !is_size(node_size) || node_size < sector_size {
        return Err("the sizes of its sectors or nodes are not supported".into());
    }
    let device = Device::parse(block.get(DEVICE_AT..).unwrap_or_default());
    let uuid = array_at(block, if u64_at(block, 188) & METADATA_UUID != 0 { 571 } else { 32 });
    if u64_at(block, 136) != 1 || device.id == 0 {
        return Err("it has several devices".into());
    }
    if device.len > len.get() {
        return Err("it is longer than the device".into());
    }
    if device.file_system != uuid {
        return Err("its device belongs to another file system".into());
    }
    let array = usize::try_from(u32_at(block, 160)).ok().filter(|&size| size <= SYSTEM_CHUNKS);
    let array = array.and_then(|size| block.get(SYSTEM_CHUNKS_AT..SYSTEM_CHUNKS_AT + size));
    let generation = u64_at(block, 72);
    Ok(Superblock {
        generation,
        node_uuid: uuid,
        sector_size: u64::from(sector_size),
        node_size: node_size as usize,
        used: u64_at(block, 120),
        root_tree: Root { node: u64_at(block, 80), generation, level: u8_at(block, 198) },
        chunk_tree: Root { node: u64_at(block, 88), generation: u64_at(block, 164), level: u8_at(block, 199) },
        has_block_group_tree: u64_at(block, 180) & BLOCK_GROUP_TREE != 0,
        device,
        system_chunks: array.ok_or_else(|| damaged("its list of chunks is too long"))?.to_vec(),
    })
}

fn check_features(block: &[u8]) -> Result<(), DenseReason> {
    if u64_at(block, 96) != 0 {
        return Err(DenseReason::State("it has a log tree: it must be mounted and unmounted once".into()));
    }
    if u64_at(block, 56) != FLAGS {
        return Err(format!("its superblock has the flags {:#x}, which are not supported", u64_at(block, 56)).into());
    }
    let incompatible = u64_at(block, 188);
    let unknown = u64_at(block, 172) | u64_at(block, 180) & !READABLE | incompatible & !INCOMPATIBLE;
    if unknown != 0 || incompatible & MIXED_BACKREF == 0 {
        return Err(format!(
            "it has features that are not supported (incompatible ones {incompatible:#x}, others {:#x} and {:#x})",
            u64_at(block, 180),
            u64_at(block, 172)
        )
        .into());
    }
    Ok(())
}
