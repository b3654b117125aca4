//! The checksums of the metadata: crc32c with `metadata_csum`, crc16 with `gdt_csum` (also named `uninit_bg`).
//!
//! Source: e2fsprogs, `lib/ext2fs/csum.c`; Linux, `fs/ext4/super.c` (`ext4_group_desc_csum`) and `fs/ext4/bitmap.c`.

/// The place of the checksum in a group descriptor (`bg_checksum`).
const IN_DESCRIPTOR: usize = 0x1e;
/// The size of that checksum.
const SIZE_IN_DESCRIPTOR: usize = 2;

/// Which checksums a file system has, and what they begin with.
#[derive(Clone, Copy)]
pub(super) enum Checksums {
    /// None: ext2 and ext3.
    Absent,
    /// crc16 of the group descriptors, which begins with the crc16 of the UUID.
    Crc16 { of_uuid: u16 },
    /// crc32c of all metadata, which begins with this seed.
    Crc32c { seed: u32 },
}

impl Checksums {
    /// Whether group descriptors have a checksum. Only then their flags have a meaning.
    pub(super) fn cover_descriptors(self) -> bool {
        !matches!(self, Self::Absent)
    }

    /// Whether the checksum in a group descriptor is right.
    pub(super) fn descriptor_is_right(self, group: u32, descriptor: &[u8]) -> bool {
        let Some((before, rest)) = descriptor.split_at_checked(IN_DESCRIPTOR) else { return false };
        let Some((stored, after)) = rest.split_first_chunk::<SIZE_IN_DESCRIPTOR>() else { return false };
        let group = group.to_le_bytes();
        let computed = match self {
            Self::Absent => return true,
            Self::Crc16 { of_uuid } => [&group, before, after].into_iter().fold(of_uuid, crc16),
            Self::Crc32c { seed } => {
                let sum = [&group, before, &[0; SIZE_IN_DESCRIPTOR], after].into_iter().fold(seed, crc32c);
                (sum & 0xffff) as u16
            }
        };
        computed == u16::from_le_bytes(*stored)
    }

    /// The crc32c of `bytes`, if this file system has such checksums.
    pub(super) fn crc32c(self, bytes: &[u8]) -> Option<u32> {
        match self {
            Self::Crc32c { seed } => Some(crc32c(seed, bytes)),
            Self::Absent | Self::Crc16 { .. } => None,
        }
    }
}

/// Continues a crc32c that is not inverted at its begin and end, as the kernel's `crc32c_le`.
pub(super) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// Continues a crc16 (the polynomial 0x8005 with its bits reversed; Linux, `lib/crc/crc16.c`).
pub(super) fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(seed, |sum, &byte| {
        (0..8).fold(sum ^ u16::from(byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xa001 } else { sum >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_checksums() {
        // The check values of CRC-16/ARC and CRC-32C. The latter is inverted at its end.
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_descriptor_that_is_too_short_has_no_right_checksum() {
        assert!(!Checksums::Crc32c { seed: 0 }.descriptor_is_right(0, &[0; 31]));
        assert!(!Checksums::Absent.descriptor_is_right(0, &[]));
    }
}
