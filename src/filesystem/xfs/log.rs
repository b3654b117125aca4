//! The log: whether its last record is that of an unmount, after which there is nothing to replay.
//!
//! The log is a ring of blocks of 512 bytes. Each block begins with the number of the cycle in which it was written, or with
//! a magic number and then the cycle: that is the header of a record. The words whose place the cycle takes are in the
//! header. The head is where the next record goes: the blocks before it are of the current cycle, those from it on of the
//! cycle before.
//!
//! Source: `struct xlog_rec_header` in `fs/xfs/libxfs/xfs_log_format.h`; `xlog_find_head`, `xlog_find_tail` and
//! `xlog_check_unmount_rec` in `fs/xfs/xfs_log_recover.c`; `xlog_cksum` in `fs/xfs/xfs_log.c`. The kernel repairs a log whose
//! cycles are not in this order, as after a crash. Here such a log is refused.

use std::ops::Range;

use super::super::ReadBytes;
use super::super::fields::{array_at, u32_at};
use super::bytes::{be32, be64, damaged, read};
use super::superblock::Superblock;
use crate::reason::DenseReason;

/// The size of a block of the log: `BBSIZE`.
const BLOCK: u64 = 512;
/// `XLOG_HEADER_MAGIC_NUM`.
const MAGIC: u32 = 0xfeed_babe;
/// The blocks on each side of the head whose cycles are verified: as many as the kernel has in flight at most
/// (`XLOG_TOTAL_REC_SHIFT`).
const VERIFIED: u64 = 8 * MAX_RECORD / BLOCK;
/// The longest record without its headers: `XLOG_MAX_RECORD_BSIZE`.
const MAX_RECORD: u64 = 256 << 10;
/// The bytes of a record for each of which there is a header: `XLOG_HEADER_CYCLE_SIZE`.
const PER_HEADER: u64 = 32 << 10;
/// The blocks of the longest record with its headers.
const MAX_RECORD_BLOCKS: u64 = MAX_RECORD / BLOCK + MAX_RECORD / PER_HEADER;
/// The bytes of a further header that its record's checksum covers: `XLOG_REC_EXT_SIZE`.
const EXTENDED_SIZE: usize = 260;
/// The bytes of a first header that the checksum covers: `XLOG_REC_SIZE` and `XLOG_REC_SIZE_OTHER`.
const HEADER_SIZES: [usize; 2] = [328, 324];
/// `XFS_LOG` and `XLOG_UNMOUNT_TRANS`: the client and the flags of the operation that an unmount writes.
const UNMOUNT: [u8; 2] = [0xaa, 0x20];

/// A log sequence number: a cycle, and a block in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Lsn(u64);

impl Lsn {
    /// The number that is stored in metadata.
    pub(super) fn new(number: u64) -> Self {
        Self(number)
    }

    /// Whether metadata with this number was written by a record before this head (`xfs_log_check_lsn` in
    /// `fs/xfs/xfs_log.c`). Metadata that no record wrote has `NULLCOMMITLSN`, which is all ones.
    pub(super) fn covers(self, of_metadata: Self) -> bool {
        of_metadata <= self || of_metadata.0 == u64::MAX
    }
}

/// The head of a log that has nothing to replay.
///
/// # Errors
/// If the last record is not that of an unmount, or the log is damaged.
pub(super) fn clean_head(device: &dyn ReadBytes, superblock: &Superblock) -> Result<Lsn, DenseReason> {
    let log = Log::new(device, superblock);
    let ring = log.find_head()?;
    log.verify_cycles(&ring)?;
    log.check_unmount(&ring, superblock)?;
    Ok(match ring.head == log.blocks {
        true => Lsn((u64::from(ring.before) + 1) << 32),
        false => Lsn(u64::from(ring.before) << 32 | ring.head),
    })
}

fn not_empty() -> DenseReason {
    DenseReason::State("its log is not empty: mount it once (mount -o nouuid for a snapshot) and unmount it".into())
}

/// The cycles of a log.
struct Ring {
    /// The head, from 1 to the length of the log.
    head: u64,
    /// The cycle of the blocks before the head.
    before: u32,
    /// The cycle of the blocks from the head on.
    behind: u32,
}

impl Ring {
    fn cycle_of(&self, block: u64) -> u32 {
        if block < self.head { self.before } else { self.behind }
    }
}

struct Log<'a> {
    device: &'a dyn ReadBytes,
    /// The first byte on the device.
    start: u64,
    /// The length, in blocks of the log.
    blocks: u64,
}

impl<'a> Log<'a> {
    fn new(device: &'a dyn ReadBytes, superblock: &Superblock) -> Self {
        let blocks = superblock.log_blocks();
        let start = blocks.start * superblock.block_size;
        Self { device, start, blocks: (blocks.end - blocks.start) * superblock.block_size / BLOCK }
    }

    /// Reads blocks that do not wrap around the end.
    fn read(&self, blocks: Range<u64>) -> Result<Vec<u8>, DenseReason> {
        let len = (blocks.end - blocks.start) * BLOCK;
        read(self.device, self.start + blocks.start * BLOCK, len as usize, "its log")
    }

    fn cycle(&self, block: u64) -> Result<u32, DenseReason> {
        Ok(cycle(&self.read(block..block + 1)?))
    }

    /// Finds the first block of the cycle before the current one, by a binary search.
    fn find_head(&self) -> Result<Ring, DenseReason> {
        let (mut low, mut high) = (0, self.blocks - 1);
        let (before, behind) = (self.cycle(low)?, self.cycle(high)?);
        if before == 0 {
            return Err(damaged("its log has no record"));
        }
        if before == behind {
            return Ok(Ring { head: self.blocks, before, behind });
        }
        if before - 1 != behind {
            return Err(not_empty());
        }
        while high - low > 1 {
            let middle = low.midpoint(high);
            match self.cycle(middle)? {
                cycle if cycle == before => low = middle,
                cycle if cycle == behind => high = middle,
                _ => return Err(not_empty()),
            }
        }
        Ok(Ring { head: high, before, behind })
    }

    /// Checks the cycles of the blocks around the head.
    fn verify_cycles(&self, ring: &Ring) -> Result<(), DenseReason> {
        let start = ring.head as i128 - VERIFIED.min(self.blocks) as i128;
        let end = ring.head + VERIFIED.min(self.blocks);
        let before_start =
            u64::try_from(start).map_or_else(|_| self.blocks - start.unsigned_abs() as u64, |_| self.blocks);
        let ranges =
            [before_start..self.blocks, start.max(0) as u64..end.min(self.blocks), 0..end.saturating_sub(self.blocks)];
        for range in ranges {
            let bytes = self.read(range.clone())?;
            let (blocks, _) = bytes.as_chunks::<{ BLOCK as usize }>();
            if range.zip(blocks).any(|(at, block)| cycle(block) != ring.cycle_of(at)) {
                return Err(not_empty());
            }
        }
        Ok(())
    }

    /// Checks that the record before the head is that of an unmount.
    fn check_unmount(&self, ring: &Ring, superblock: &Superblock) -> Result<(), DenseReason> {
        let (first, record) = self.last_record(ring)?;
        let header = &record[..BLOCK as usize];
        if array_at::<16>(header, 304) != superblock.uuid {
            return Err(damaged("its log has the UUID of another file system"));
        }
        let cycle = ring.cycle_of(first);
        let expected = (cycle, if superblock.has_log_v2 { 2 } else { 1 }, u64::from(cycle) << 32 | first);
        if (be32(header, 4), be32(header, 8), be64(header, 16)) != expected {
            return Err(damaged("the last record of its log has a wrong cycle, version or place"));
        }
        let (length, size) = (u64::from(be32(header, 12)), u64::from(be32(header, 320)));
        let headers = if superblock.has_log_v2 { size.div_ceil(PER_HEADER).max(1) } else { 1 };
        let data = (headers * BLOCK) as usize;
        if record.len() as u64 != (headers + length.div_ceil(BLOCK)) * BLOCK || length < 16 {
            return Err(not_empty());
        }
        let crc = u32_at(header, 32);
        // mkfs.xfs and xfs_repair write the record of an unmount without a checksum, in version 5 too.
        if superblock.has_checksums && crc != 0 && !checksums(&record, data, length as usize).contains(&crc) {
            return Err(damaged("the checksum of the last record of its log is wrong"));
        }
        // The record has one operation, whose client and flags are at 8 and 9.
        match be32(header, 40) == 1 && record[data + 8..].starts_with(&UNMOUNT) {
            true => Ok(()),
            false => Err(not_empty()),
        }
    }

    /// The block at which the last record before the head begins, and the record, which may wrap around the end.
    fn last_record(&self, ring: &Ring) -> Result<(u64, Vec<u8>), DenseReason> {
        let count = MAX_RECORD_BLOCKS.min(self.blocks);
        let wrapped = count.saturating_sub(ring.head);
        let mut bytes = self.read(self.blocks - wrapped..self.blocks)?;
        bytes.extend(self.read(ring.head - (count - wrapped)..ring.head)?);
        let (blocks, _) = bytes.as_chunks::<{ BLOCK as usize }>();
        let Some(at) = blocks.iter().rposition(|block| be32(block, 0) == MAGIC) else { return Err(not_empty()) };
        let first = (ring.head + self.blocks - (count - at as u64)) % self.blocks;
        Ok((first, bytes.split_off(at * BLOCK as usize)))
    }
}

/// The cycle of a block (`xlog_get_cycle`).
fn cycle(block: &[u8]) -> u32 {
    match be32(block, 0) {
        MAGIC => be32(block, 4),
        cycle => cycle,
    }
}

/// The two checksums that a record may have: the kernel's structure of the header has another size on i386.
fn checksums(record: &[u8], data: usize, length: usize) -> [u32; 2] {
    HEADER_SIZES.map(|size| {
        let crc = crc32c::crc32c_append(crc32c::crc32c(&record[..32]), &[0; 4]);
        let crc = crc32c::crc32c_append(crc, &record[36..size]);
        let further = record[BLOCK as usize..data].chunks(BLOCK as usize);
        let crc = further.fold(crc, |crc, header| crc32c::crc32c_append(crc, &header[..EXTENDED_SIZE]));
        crc32c::crc32c_append(crc, &record[data..data + length])
    })
}
