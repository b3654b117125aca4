//! Fields of structures on disk, checksums, and reading from the device.

use std::borrow::Cow;

use super::super::ReadBytes;
use super::super::fields::{array_at, u32_at};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The big-endian number at `at`. Beyond the end of a structure there are zeros.
pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array_at(bytes, at))
}

/// As [`be16`].
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array_at(bytes, at))
}

/// As [`be16`].
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array_at(bytes, at))
}

/// Whether the CRC-32C of `bytes`, in which the checksum itself counts as zeros, is the little-endian number at `at`
/// (`xfs_verify_cksum` in `fs/xfs/libxfs/xfs_cksum.h`).
pub(super) fn has_checksum(bytes: &[u8], at: usize) -> bool {
    let (Some(before), Some(behind)) = (bytes.get(..at), bytes.get(at + 4..)) else { return false };
    let crc = crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]), behind);
    crc == u32_at(bytes, at)
}

/// The `len` bytes at `offset`, which are `what`.
///
/// # Errors
/// If they cannot be read.
pub(super) fn read(device: &dyn ReadBytes, offset: u64, len: usize, what: &str) -> Result<Vec<u8>, DenseReason> {
    let mut bytes = vec![0; len];
    device
        .read_exact(Bytes::new(offset), &mut bytes)
        .map_err(|error| DenseReason::cannot(format!("read {what}"), &error))?;
    Ok(bytes)
}

/// The reason of damaged metadata.
pub(super) fn damaged(text: impl Into<Cow<'static, str>>) -> DenseReason {
    DenseReason::Damaged(text.into())
}
