//! The protection against two mounts at once (`mmp`): a block that says whether another computer uses the file system.
//!
//! Source: e2fsprogs, `lib/ext2fs/ext2_fs.h` (`struct mmp_struct`) and `lib/ext2fs/mmp.c`.

use super::super::fields::u32_at;
use super::superblock::Superblock;
use super::{ReadBytes, damaged};
use crate::reason::DenseReason;

const SIZE: usize = 1024;
const MAGIC: u32 = 0x004d_4d50;
/// `EXT4_MMP_SEQ_CLEAN`: nobody uses the file system.
const CLEAN: u32 = 0xff4d_4d50;
/// The place of `mmp_checksum`, which is the last field.
const CHECKSUM_AT: usize = 0x3fc;

/// # Errors
/// If the file system is in use according to this block, or the block cannot be read or is damaged.
pub(super) fn check(device: &dyn ReadBytes, fs: &Superblock) -> Result<(), DenseReason> {
    let Some(block) = fs.mmp_block else { return Ok(()) };
    if block <= fs.first_data_block || block >= fs.blocks {
        return Err(damaged("its block against two mounts (mmp) is not inside of it"));
    }
    let mut record = [0; SIZE];
    let read = device.read_exact(fs.position(block), &mut record);
    read.map_err(|error| DenseReason::cannot("read its block against two mounts (mmp)", &error))?;
    let checksum = fs.checksums.crc32c(&record[..CHECKSUM_AT]);
    if u32_at(&record, 0) != MAGIC || checksum.is_some_and(|sum| sum != u32_at(&record, CHECKSUM_AT)) {
        return Err(damaged("its block against two mounts (mmp) is wrong"));
    }
    if u32_at(&record, 4) != CLEAN {
        let text = "its block against two mounts (mmp) says that it is mounted or being checked";
        return Err(DenseReason::State(text.into()));
    }
    Ok(())
}
