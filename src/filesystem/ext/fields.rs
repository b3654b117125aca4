//! Little-endian fields of records on disk.

/// The 16-bit number at byte `at`, or zero if the record ends before it.
pub(super) fn le16(record: &[u8], at: usize) -> u16 {
    record.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u16::from_le_bytes(*bytes))
}

/// The 32-bit number at byte `at`, or zero if the record ends before it.
pub(super) fn le32(record: &[u8], at: usize) -> u32 {
    record.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// A 64-bit number of which both halves have a place of their own.
pub(super) fn halves(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}
