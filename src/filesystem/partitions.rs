//! The partitions of a disk or of its image: a GUID partition table (GPT) or a master boot record (MBR).
//!
//! The table must be consistent to the last field: both copies of a GPT with right checksums, no second table beside it, and
//! no partition that overlaps another or the table itself. The sectors of a disk have 512 or 4096 bytes; which of them is found
//! out from the table.

mod gpt;
mod mbr;

use super::ReadBytes;
use super::fields::{has_at, u8_at, u32_at};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The sizes that a sector of a disk can have.
const SECTOR_SIZES: [u64; 2] = [512, 4096];
/// The most partitions that are read: Linux itself shows 256 at most (`DISK_MAX_PARTS` of `include/linux/blkdev.h`).
const MAX_PARTITIONS: usize = 1024;

/// A partition: the range from `start` to `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, as in its name in Linux.
    pub number: u32,
    /// Its first byte.
    pub start: Bytes,
    /// The first byte after it.
    pub end: Bytes,
}

/// One of the four entries of a boot record (`struct msdos_partition` of `include/linux/msdos_partition.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BootEntry {
    status: u8,
    kind: u8,
    /// The first sector, relative to a position that depends on the entry.
    start: u32,
    sectors: u32,
}

impl BootEntry {
    const fn is_empty(self) -> bool {
        self.kind == 0 && self.sectors == 0
    }
}

/// The entries of a boot record, or `None` if the sector has not the signature of one (`MSDOS_LABEL_MAGIC` of
/// `block/partitions/msdos.c`), or if an entry has a status that no entry can have.
fn boot_entries(sector: &[u8]) -> Option<[BootEntry; 4]> {
    let entry = |index: usize| {
        let at = 446 + 16 * index;
        let (start, sectors) = (u32_at(sector, at + 8), u32_at(sector, at + 12));
        BootEntry { status: u8_at(sector, at), kind: u8_at(sector, at + 4), start, sectors }
    };
    let entries = [0, 1, 2, 3].map(entry);
    let is_record = has_at(sector, 510, b"\x55\xaa") && entries.iter().all(|entry| entry.status & 0x7f == 0);
    is_record.then_some(entries)
}

/// Whether a device of `len` bytes that begins with `head` has a table of partitions.
pub fn is_partitioned(head: &[u8], len: Bytes) -> bool {
    let has_entries = boot_entries(head).is_some_and(|entries| entries.iter().any(|entry| !entry.is_empty()));
    len > Bytes::ZERO && (has_entries || gpt::is_gpt(head))
}

/// The partitions of a disk, in the order of their positions. They lie within the disk and do not overlap.
///
/// # Errors
/// When there is no table, when it is damaged or inconsistent, and when the disk cannot be read.
pub fn read(disk: &dyn ReadBytes) -> Result<Vec<Partition>, DenseReason> {
    let mut record = [0; 512];
    read_at(disk, Bytes::ZERO, &mut record)?;
    let record = boot_entries(&record).ok_or("it has no boot record with a table of partitions")?;
    if gpt::is_on(disk)? { gpt::read(disk, record) } else { mbr::read(disk, record) }
}

/// A range of sectors that is in use: the table itself, if it is no partition.
struct Claim {
    first: u64,
    end: u64,
    number: Option<u32>,
}

/// The partitions among `claims`, none of which may overlap another or leave the disk.
fn disjoint(disk: &dyn ReadBytes, sector: u64, mut claims: Vec<Claim>) -> Result<Vec<Partition>, DenseReason> {
    claims.sort_unstable_by_key(|claim| claim.first);
    if claims.windows(2).any(|pair| pair[0].end > pair[1].first) {
        return Err(DenseReason::Damaged("its partitions overlap".into()));
    }
    let bytes = |at: u64| at.checked_mul(sector).map(Bytes::new).filter(|&at| at <= disk.len());
    let partitions = claims.iter().filter_map(|claim| Some((claim, claim.number?))).map(|(claim, number)| {
        let range = bytes(claim.first).zip(bytes(claim.end)).filter(|(start, end)| start < end);
        let (start, end) = range.ok_or(DenseReason::Damaged("a partition lies beyond its end".into()))?;
        Ok(Partition { number, start, end })
    });
    partitions.collect()
}

/// What is read for one of the two sizes of sectors. Only one of them may give a table.
///
/// # Errors
/// When neither or both do, and when a part of the disk cannot be read, so that it is not certain.
fn only_one<T>(by_size: [Result<T, DenseReason>; 2]) -> Result<T, DenseReason> {
    match by_size {
        [Err(reason @ DenseReason::Unreadable { .. }), _] | [_, Err(reason @ DenseReason::Unreadable { .. })] => {
            Err(reason)
        }
        [Ok(_), Ok(_)] => Err("its sectors may have 512 or 4096 bytes, and its table is valid for both".into()),
        [Ok(found), Err(_)] | [Err(_), Ok(found)] => Ok(found),
        [Err(reason), Err(_)] => Err(reason),
    }
}

fn read_at(disk: &dyn ReadBytes, at: Bytes, buffer: &mut [u8]) -> Result<(), DenseReason> {
    if at.checked_add(Bytes::new(buffer.len() as u64)).is_none_or(|end| end > disk.len()) {
        return Err(DenseReason::Damaged("its table of partitions lies beyond its end".into()));
    }
    disk.read_exact(at, buffer).map_err(|error| DenseReason::cannot("read its table of partitions", &error))
}

#[cfg(test)]
mod tests;
