//! A GUID partition table (UEFI Specification, "GUID Partition Table (GPT) Disk Layout"; `block/partitions/efi.h` of Linux).
//!
//! The second sector holds a header, which says where the array of entries is. The last sector holds a second header, with
//! an array of its own. Both headers and arrays have checksums. The first sector holds a boot record that protects the disk
//! from programs that do not know this format.

use super::mbr::PROTECTIVE;
use super::{BootEntry, Claim, MAX_PARTITIONS, Partition, SECTOR_SIZES, disjoint, only_one, read_at};
use crate::filesystem::ReadBytes;
use crate::filesystem::fields::{array_at, has_at, u32_at, u64_at};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// `GPT_HEADER_SIGNATURE` of `block/partitions/efi.h`.
const SIGNATURE: &[u8] = b"EFI PART";
/// `GPT_HEADER_REVISION_V1`.
const REVISION: u32 = 0x0001_0000;
/// The length of the fields of a header, and of an entry without reserved bytes.
const HEADER: usize = 92;
const ENTRY: usize = 128;
/// The longest array of entries that is read.
const MAX_ARRAY: u64 = 1 << 20;

/// A header whose checksum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    /// The sector of this header.
    this: u64,
    /// The sector of the other one.
    other: u64,
    /// The first sector of the array.
    array: u64,
    /// What both headers have in common.
    common: Common,
}

/// The fields that are the same in both headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Common {
    /// The first and the last sector that partitions may use.
    first_usable: u64,
    last_usable: u64,
    guid: [u8; 16],
    entries: u32,
    entry_size: u32,
    array_checksum: u32,
}

impl Common {
    /// The length of the array in bytes.
    fn array_len(&self) -> u64 {
        u64::from(self.entries) * u64::from(self.entry_size)
    }
}

/// Whether a header is in the head of a disk, for either size of sectors.
pub fn is_gpt(head: &[u8]) -> bool {
    SECTOR_SIZES.into_iter().any(|sector| has_at(head, sector as usize, SIGNATURE))
}

/// Whether the signature of a header is anywhere where one can be.
///
/// # Errors
/// When the disk cannot be read.
pub fn is_on(disk: &dyn ReadBytes) -> Result<bool, DenseReason> {
    for sector in SECTOR_SIZES {
        let last = disk.len().align_down(Bytes::new(sector)).checked_sub(Bytes::new(sector));
        for at in [Some(Bytes::new(sector)), last].into_iter().flatten() {
            let mut signature = [0; SIGNATURE.len()];
            if at.saturating_add(Bytes::new(sector)) <= disk.len() {
                read_at(disk, at, &mut signature)?;
            }
            if signature == SIGNATURE {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The partitions of a disk that begins with this boot record.
///
/// # Errors
/// When any part of either table is damaged or differs from the other one, and when the disk cannot be read.
pub fn read(disk: &dyn ReadBytes, record: [BootEntry; 4]) -> Result<Vec<Partition>, DenseReason> {
    check_protective(record)?;
    let (sector, first) = only_one(SECTOR_SIZES.map(|sector| Ok((sector, header_at(disk, sector, 1)?))))?;
    let last = (disk.len().get() / sector).checked_sub(1).filter(|_| disk.len().get().is_multiple_of(sector));
    if last != Some(first.other) {
        return Err("its backup table is not at its end".into());
    }
    let second = header_at(disk, sector, first.other)?;
    if second.common != first.common || second.other != first.this {
        return Err(DenseReason::Damaged("its two tables differ".into()));
    }
    let array = array_of(disk, sector, &first)?;
    array_of(disk, sector, &second)?;
    let claims = claims(&array, &first, &second, sector)?;
    disjoint(disk, sector, claims)
}

/// Checks that the boot record has one entry, which protects the disk from its second sector on.
fn check_protective([first, others @ ..]: [BootEntry; 4]) -> Result<(), DenseReason> {
    let protects = first.kind == PROTECTIVE && first.start == 1 && first.sectors != 0;
    if !protects || !others.into_iter().all(BootEntry::is_empty) {
        return Err("its boot record has partitions beside those of its GUID partition table".into());
    }
    Ok(())
}

/// Reads and checks the header in that sector.
fn header_at(disk: &dyn ReadBytes, sector: u64, this: u64) -> Result<Header, DenseReason> {
    let mut bytes = vec![0; sector as usize];
    let at = this.checked_mul(sector).ok_or("a table lies beyond its end")?;
    read_at(disk, Bytes::new(at), &mut bytes)?;
    parse_header(&bytes, this).ok_or(DenseReason::Damaged("a header of its table is damaged".into()))
}

/// The header in a sector, if all of its fields are valid.
fn parse_header(sector: &[u8], this: u64) -> Option<Header> {
    let size = usize::try_from(u32_at(sector, 12)).ok().filter(|size| (HEADER..=sector.len()).contains(size))?;
    let mut checked = sector.get(..size)?.to_vec();
    checked.get_mut(16..20)?.fill(0);
    let is_valid =
        has_at(sector, 0, SIGNATURE) && u32_at(sector, 8) == REVISION && crc32(&checked) == u32_at(sector, 16);
    let common = Common {
        first_usable: u64_at(sector, 40),
        last_usable: u64_at(sector, 48),
        guid: array_at(sector, 56),
        entries: u32_at(sector, 80),
        entry_size: u32_at(sector, 84),
        array_checksum: u32_at(sector, 88),
    };
    let header = Header { this, other: u64_at(sector, 32), array: u64_at(sector, 72), common };
    let entry_size = common.entry_size as usize;
    let has_array = entry_size >= ENTRY && entry_size.is_power_of_two() && common.array_len() <= MAX_ARRAY;
    (is_valid && has_array && u64_at(sector, 24) == this).then_some(header)
}

/// The array of entries of a header, whose checksum is right.
fn array_of(disk: &dyn ReadBytes, sector: u64, header: &Header) -> Result<Vec<u8>, DenseReason> {
    let mut array = vec![0; header.common.array_len() as usize];
    let at = header.array.checked_mul(sector).ok_or("a table lies beyond its end")?;
    read_at(disk, Bytes::new(at), &mut array)?;
    if crc32(&array) != header.common.array_checksum {
        return Err(DenseReason::Damaged("the entries of its table are damaged".into()));
    }
    Ok(array)
}

/// The sectors of the partitions, and those of both tables.
fn claims(array: &[u8], first: &Header, second: &Header, sector: u64) -> Result<Vec<Claim>, DenseReason> {
    let sectors = first.common.array_len().div_ceil(sector);
    let table = |first: u64, count: u64| Some(Claim { first, end: first.checked_add(count)?, number: None });
    let tables = [
        table(0, 1),
        table(first.this, 1),
        table(first.array, sectors),
        table(second.array, sectors),
        table(second.this, 1),
    ];
    let mut claims: Vec<_> = tables.into_iter().flatten().filter(|claim| claim.first < claim.end).collect();
    let usable = first.common.first_usable..=first.common.last_usable;
    for (entry, number) in array.chunks(first.common.entry_size.max(1) as usize).zip(1..) {
        if array_at::<16>(entry, 0) == [0; 16] {
            continue;
        }
        let (start, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let end = last.checked_add(1).filter(|_| start <= last && usable.contains(&start) && usable.contains(&last));
        let end = end.ok_or(DenseReason::Damaged("a partition lies where none may be".into()))?;
        claims.push(Claim { first: start, end, number: Some(number) });
        if claims.len() > MAX_PARTITIONS {
            return Err("it has too many partitions".into());
        }
    }
    Ok(claims)
}

/// The CRC-32 of the format (that of Ethernet, not the CRC-32C of file systems).
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = crc32_table();
    !bytes.iter().fold(!0, |crc, &byte| (crc >> 8) ^ TABLE[((crc ^ u32::from(byte)) & 0xff) as usize])
}

/// The remainder of each byte for the reversed polynomial of CRC-32 (`CRC32_POLY_LE` of `include/linux/crc32poly.h`).
const fn crc32_table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut remainder = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            remainder = (remainder >> 1) ^ (0xedb8_8320 * (remainder & 1));
            bit += 1;
        }
        table[byte] = remainder;
        byte += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of CRC-32/ISO-HDLC.
    #[test]
    fn the_checksum_is_that_of_the_format() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }
}
