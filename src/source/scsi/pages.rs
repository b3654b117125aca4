//! Parsers of the data that SCSI disks return about their holes, without I/O.
//!
//! Formats from SPC-4 (INQUIRY, vital product data, sense data) and SBC-3 (READ CAPACITY(16), the Logical Block
//! Provisioning page, GET LBA STATUS). All numbers are big-endian. The data is untrusted: every input gives a
//! value or an error, and a block is a hole only if the bytes leave no doubt of it.

use crate::error::{Error, Result};
use crate::map::{Extent, ExtentKind};
use crate::units::Bytes;

/// Vital product data page 00h: the list of the supported pages.
pub const SUPPORTED_PAGES: u8 = 0x00;
/// Vital product data page B2h: Logical Block Provisioning.
pub const PROVISIONING_PAGE: u8 = 0xb2;

/// The length of the header of GET LBA STATUS data, before the descriptors.
const STATUS_HEADER: usize = 8;
/// The length of an LBA status descriptor.
const DESCRIPTOR: usize = 16;

fn malformed(what: &str) -> Error {
    Error::failed(format!("malformed {what}"))
}

fn byte(data: &[u8], at: usize) -> Option<u8> {
    data.get(at).copied()
}

fn be16(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(data.get(at..)?.first_chunk().copied()?))
}

fn be32(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(data.get(at..)?.first_chunk().copied()?))
}

fn be64(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(data.get(at..)?.first_chunk().copied()?))
}

/// Standard INQUIRY data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InquiryData {
    /// A direct-access device, connected: peripheral qualifier 0 and type 0.
    pub disk: bool,
    /// An ATA disk behind a translation (vendor `ATA`, SAT-3).
    pub ata: bool,
}

/// Reads standard INQUIRY data.
///
/// # Errors
///
/// Data that ends before the vendor.
pub fn inquiry(data: &[u8]) -> Result<InquiryData> {
    let vendor = data.get(8..16).ok_or_else(|| malformed("INQUIRY data"))?;
    Ok(InquiryData { disk: data[0] == 0, ata: vendor == b"ATA     " })
}

/// READ CAPACITY(16) data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// The length of the disk.
    pub len: Bytes,
    /// The logical block length.
    pub block: Bytes,
    /// LBPME: the disk can have unmapped blocks.
    pub provisioning: bool,
    /// LBPRZ: unmapped blocks read as zeros.
    pub zeros: bool,
}

/// Reads READ CAPACITY(16) data.
///
/// # Errors
///
/// Data that is too short, a block length of zero, a length beyond 64 bits.
pub fn capacity(data: &[u8]) -> Result<Capacity> {
    let read = || {
        let block = be32(data, 8).filter(|block| *block > 0).map(u64::from)?;
        let len = be64(data, 0)?.checked_add(1)?.checked_mul(block)?;
        let flags = byte(data, 14)?;
        Some(Capacity {
            len: Bytes::new(len),
            block: Bytes::new(block),
            provisioning: flags & 0x80 != 0,
            zeros: flags & 0x40 != 0,
        })
    };
    read().ok_or_else(|| malformed("READ CAPACITY(16) data"))
}

/// The payload of vital product data page `page` of a disk.
fn vpd_payload(data: &[u8], page: u8) -> Option<&[u8]> {
    // Byte 0: peripheral qualifier and type, both zero for a disk.
    if byte(data, 0)? != 0 || byte(data, 1)? != page {
        return None;
    }
    let len = usize::from(be16(data, 2)?);
    data.get(4..4_usize.checked_add(len)?)
}

/// Whether page 00h lists `page`.
///
/// # Errors
///
/// Data that is not page 00h of a disk, or is cut off.
pub fn lists_page(data: &[u8], page: u8) -> Result<bool> {
    let pages = vpd_payload(data, SUPPORTED_PAGES).ok_or_else(|| malformed("list of VPD pages"))?;
    Ok(pages.contains(&page))
}

/// Whether page B2h reports that unmapped blocks read as zeros: LBPRZ is xx1b.
///
/// # Errors
///
/// Data that is not page B2h of a disk, or is cut off.
pub fn provisioning_zeros(data: &[u8]) -> Result<bool> {
    let flags = vpd_payload(data, PROVISIONING_PAGE).and_then(|payload| byte(payload, 1));
    // LBPRZ is bits 4 to 2 in SBC-4, and only bit 2 in SBC-3. Without bit 2, unmapped blocks can read as anything
    // (000b) or as a pattern that need not be zeros (010b), or the value is reserved.
    flags.map(|flags| flags & 0x04 != 0).ok_or_else(|| malformed("VPD page B2h"))
}

/// GET LBA STATUS data: consecutive extents from the requested block on, neighbours of one kind merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LbaStatus {
    /// The extents; the first starts at the requested block.
    pub extents: Vec<Extent>,
    /// Why the list cannot be used after these extents.
    pub fault: Option<&'static str>,
}

/// Reads the GET LBA STATUS data for the block at `start`, which is a multiple of the disk's `block` and below `len`.
///
/// The list is used up to the first descriptor that is out of place. A block is a hole only if its status is
/// deallocated or anchored and the descriptor has no additional status.
pub fn lba_status(data: &[u8], start: Bytes, block: Bytes, len: Bytes) -> LbaStatus {
    let mut status = LbaStatus::default();
    let descriptors = match descriptors(data) {
        Ok(descriptors) => descriptors,
        Err(fault) => return LbaStatus { fault: Some(fault), ..status },
    };
    let mut next = start;
    for descriptor in descriptors {
        if next >= len {
            break;
        }
        let extent = match extent(descriptor, next, block) {
            Ok(extent) => Extent { end: extent.end.min(len), kind: extent.kind },
            Err(fault) => {
                status.fault = Some(fault);
                break;
            }
        };
        next = extent.end;
        match status.extents.last_mut() {
            Some(last) if last.kind == extent.kind => last.end = extent.end,
            _ => status.extents.push(extent),
        }
    }
    status
}

/// The complete descriptors of GET LBA STATUS data, at least one.
fn descriptors(data: &[u8]) -> std::result::Result<impl Iterator<Item = &[u8; DESCRIPTOR]>, &'static str> {
    // The header begins with the number of bytes after that number: the other 4 of the header, and 16 for each
    // descriptor. It includes descriptors that did not fit into the buffer.
    let listed = be32(data, 0).ok_or("it is too short")?;
    if listed < 20 || listed % 16 != 4 {
        return Err("its length is not that of a descriptor list");
    }
    let listed = usize::try_from(listed).unwrap_or(usize::MAX).saturating_add(4);
    let list = data.get(STATUS_HEADER..listed.min(data.len())).unwrap_or_default();
    let (whole, _cut_off) = list.as_chunks();
    if whole.is_empty() { Err("it has no descriptor") } else { Ok(whole.iter()) }
}

/// The extent of one descriptor, which must start at `start`.
fn extent(descriptor: &[u8; DESCRIPTOR], start: Bytes, block: Bytes) -> std::result::Result<Extent, &'static str> {
    let [l0, l1, l2, l3, l4, l5, l6, l7, n0, n1, n2, n3, status, additional, _, _] = *descriptor;
    let lba = u64::from_be_bytes([l0, l1, l2, l3, l4, l5, l6, l7]);
    let blocks = u64::from(u32::from_be_bytes([n0, n1, n2, n3]));
    if lba.checked_mul(block.get()) != Some(start.get()) {
        return Err("a descriptor does not start where it should");
    }
    if blocks == 0 {
        return Err("a descriptor is empty");
    }
    let end = blocks.checked_mul(block.get()).and_then(|len| start.checked_add(Bytes::new(len)));
    // Status 1 is deallocated and 2 is anchored. The upper half of the byte and the next one are not zero
    // for blocks that cannot be read; such a block is not known to read as zeros.
    let kind = if matches!(status, 1 | 2) && additional == 0 { ExtentKind::Hole } else { ExtentKind::Data };
    Ok(Extent { end: end.ok_or("a descriptor goes beyond 64 bits")?, kind })
}

/// Sense data: why a command failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// The sense key.
    pub key: u8,
    /// The additional sense code and its qualifier.
    pub code: (u8, u8),
}

impl Sense {
    /// Whether the device reports UNIT ATTENTION instead of executing the command, which can be sent again.
    pub fn is_unit_attention(self) -> bool {
        self.key == 0x06
    }

    /// Whether the device does not support the command (ILLEGAL REQUEST, INVALID COMMAND OPERATION CODE or INVALID
    /// FIELD).
    pub fn is_refusal(self) -> bool {
        self.key == 0x05 && matches!(self.code.0, 0x20 | 0x24)
    }
}

/// Reads sense data in fixed or descriptor format, or `None` if it is neither or too short.
pub fn sense(data: &[u8]) -> Option<Sense> {
    let (key, code) = match byte(data, 0)? & 0x7f {
        0x70 | 0x71 => (byte(data, 2)?, (byte(data, 12).unwrap_or(0), byte(data, 13).unwrap_or(0))),
        0x72 | 0x73 => (byte(data, 1)?, (byte(data, 2)?, byte(data, 3)?)),
        _ => return None,
    };
    Some(Sense { key: key & 0x0f, code })
}

#[cfg(test)]
mod tests;
