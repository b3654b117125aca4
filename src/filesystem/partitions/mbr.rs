//! A master boot record: four partitions, one of which may be a container of further ones ("extended", with "logical" ones).
//!
//! The container holds a chain of boot records. The first entry of each is a logical partition, relative to the record; the
//! second one is the next record, relative to the container (`parse_extended` of `block/partitions/msdos.c`).

use super::{BootEntry, Claim, Partition, SECTOR_SIZES, boot_entries, disjoint, only_one, read_at};
use crate::filesystem::ReadBytes;
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The most boot records of the chain.
const MAX_RECORDS: u32 = 128;
/// The number of the first logical partition.
const FIRST_LOGICAL: u32 = 5;
/// The type of the entry that protects a GPT.
pub const PROTECTIVE: u8 = 0xee;

/// Whether an entry is a container or the next record of a chain (`is_extended_partition` of `block/partitions/msdos.c`).
const fn is_extended(entry: BootEntry) -> bool {
    matches!(entry.kind, 0x05 | 0x0f | 0x85)
}

/// The partitions of a disk that begins with this record.
///
/// The record does not say how large a sector is. Where it is valid for both sizes, the positions are not certain.
///
/// # Errors
/// When the table is inconsistent or ambiguous, and when the disk cannot be read.
pub fn read(disk: &dyn ReadBytes, record: [BootEntry; 4]) -> Result<Vec<Partition>, DenseReason> {
    only_one(SECTOR_SIZES.map(|sector| read_sectors(disk, record, sector)))
}

/// The partitions of a disk whose sectors have `sector` bytes.
fn read_sectors(disk: &dyn ReadBytes, record: [BootEntry; 4], sector: u64) -> Result<Vec<Partition>, DenseReason> {
    let mut claims = vec![Claim { first: 0, end: 1, number: None }];
    let mut container = None;
    for (entry, number) in record.into_iter().zip(1..) {
        let Some(claim) = claim(entry, 0, number)? else { continue };
        if entry.kind == PROTECTIVE {
            return Err(DenseReason::Damaged("its GUID partition table is missing".into()));
        }
        if is_extended(entry) && container.replace(claim.first..claim.end).is_some() {
            return Err("it has two extended partitions".into());
        }
        claims.push(claim);
    }
    let Some(container) = container else { return disjoint(disk, sector, claims) };
    // The container must not overlap the other partitions. Then the logical partitions within it are compared.
    disjoint(disk, sector, claims.iter().map(|claim| Claim { ..*claim }).collect())?;
    claims.retain(|claim| claim.first != container.start);
    claims.extend(chain(disk, sector, &container)?);
    disjoint(disk, sector, claims)
}

/// The logical partitions of a container, and their boot records.
fn chain(disk: &dyn ReadBytes, sector: u64, container: &std::ops::Range<u64>) -> Result<Vec<Claim>, DenseReason> {
    let mut claims = Vec::new();
    let mut at = container.start;
    let mut number = FIRST_LOGICAL;
    // Records at the same place overlap, so that a chain that returns to an earlier record is refused at its end.
    for _ in 0..MAX_RECORDS {
        let mut record = [0; 512];
        let position =
            at.checked_mul(sector).filter(|_| container.contains(&at)).ok_or("its chain leaves its container")?;
        read_at(disk, Bytes::new(position), &mut record)?;
        let damaged = || DenseReason::Damaged("a boot record of its logical partitions is damaged".into());
        let [logical, next, third, fourth] = boot_entries(&record).ok_or_else(damaged)?;
        if !third.is_empty() || !fourth.is_empty() || is_extended(logical) || logical.kind == PROTECTIVE {
            return Err(damaged());
        }
        claims.push(Claim { first: at, end: at + 1, number: None });
        if let Some(claim) = claim(logical, at, number)? {
            if claim.end > container.end {
                return Err(damaged());
            }
            claims.push(claim);
            number += 1;
        }
        if next.is_empty() {
            return Ok(claims);
        }
        if !is_extended(next) {
            return Err(damaged());
        }
        at = container.start.checked_add(u64::from(next.start)).ok_or_else(damaged)?;
    }
    Err("its chain of logical partitions is too long".into())
}

/// The sectors of an entry, whose start is relative to `base`; `None` if the entry is empty.
fn claim(entry: BootEntry, base: u64, number: u32) -> Result<Option<Claim>, DenseReason> {
    if entry.is_empty() {
        return Ok(None);
    }
    if entry.kind == 0 || entry.sectors == 0 || entry.start == 0 {
        return Err(DenseReason::Damaged(
            "an entry of its table has a type but no place, or a place but no type".into(),
        ));
    }
    let first = base + u64::from(entry.start);
    Ok(Some(Claim { first, end: first + u64::from(entry.sectors), number: Some(number) }))
}
