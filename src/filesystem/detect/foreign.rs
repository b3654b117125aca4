//! The signatures of containers and file systems whose free space this program does not find.
//!
//! Where one of them is beside a kind that is supported, it is not certain which of the two is valid. Most positions are those
//! of libblkid (`libblkid/src/superblocks` of util-linux).

use std::io;

use super::ReadBytes;
use crate::filesystem::fields::{has_at, u32_at};
use crate::units::Bytes;

/// Signatures in the first 128 KiB: the name, the position, and the bytes.
const IN_HEAD: [(&str, usize, &[u8]); 47] = [
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("LVM", 0, b"LABELONE"),
    ("LVM", 512, b"LABELONE"),
    ("LVM", 1024, b"LABELONE"),
    ("LVM", 1536, b"LABELONE"),
    ("LVM snapshots", 0, b"SnAp"),
    ("md", 0, b"\xfc\x4e\x2b\xa9"),
    ("md", 4096, b"\xfc\x4e\x2b\xa9"),
    ("md", 0, b"\xa9\x2b\x4e\xfc"),
    ("bcache", 4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("bcachefs", 4120, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"),
    ("dm-verity", 0, b"verity\0\0"),
    ("dm-integrity", 0, b"integrt\0"),
    ("Stratis", 516, b"!Stra0tis\x86\xff\x02^\x41rh"),
    ("Stratis", 4612, b"!Stra0tis\x86\xff\x02^\x41rh"),
    ("VDO", 0, b"dmvdo001"),
    ("Ceph BlueStore", 0, b"bluestore block device"),
    ("NTFS", 3, b"NTFS    "),
    ("exFAT", 3, b"EXFAT   "),
    ("FAT", 54, b"FAT"),
    ("FAT", 82, b"FAT"),
    ("HPFS", 8192, b"\x49\xe8\x95\xf9"),
    ("ISO 9660", 32769, b"CD001"),
    ("UDF", 32769, b"BEA01"),
    ("UDF", 32769, b"NSR0"),
    ("UDF", 34817, b"BEA01"),
    ("UDF", 36865, b"BEA01"),
    ("F2FS", 1024, b"\x10\x20\xf5\xf2"),
    ("EROFS", 1024, b"\xe2\xe1\xf5\xe0"),
    ("NILFS", 1024, b"\x02\0\0\0\0\0\x34\x34"),
    ("HFS", 1024, b"BD"),
    ("HFS+", 1024, b"H+\0\x04"),
    ("HFS+", 1024, b"HX\0\x05"),
    ("APFS", 32, b"NXSB"),
    ("SquashFS", 0, b"hsqs"),
    ("CramFS", 0, b"\x45\x3d\xcd\x28"),
    ("JFS", 32768, b"JFS1"),
    ("ReiserFS", 65588, b"ReIsEr"),
    ("ReiserFS", 8244, b"ReIsEr"),
    ("Reiser4", 65536, b"ReIsEr4"),
    ("GFS2", 65536, b"\x01\x16\x19\x70"),
    ("OCFS2", 1024, b"OCFSV2"),
    ("OCFS2", 2048, b"OCFSV2"),
    ("OCFS2", 4096, b"OCFSV2"),
    ("OCFS2", 8192, b"OCFSV2"),
    ("UFS", 9564, b"\x19\x54\x01\x19"),
];

/// The magic number of md (`MD_SB_MAGIC` of `include/uapi/linux/raid/md_p.h`).
const MD_MAGIC: u32 = 0xa92b_4efc;
/// Positions of the second header of LUKS version 2 (`LUKS2_HDR2_OFFSETS` of cryptsetup), and its magic.
const LUKS_HEADERS: [u64; 9] =
    [0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000];
const LUKS_MAGIC: &[u8] = b"SKUL\xba\xbe";
/// The four labels of ZFS (`VDEV_LABELS`): two at the start and two at the end. The second half of each holds slots that
/// begin with this number (`UBERBLOCK_MAGIC`), in either byte order.
const ZFS_LABEL: u64 = 256 << 10;
const ZFS_MAGIC: u64 = 0x00ba_b10c;
const ZFS_SLOT: usize = 1024;

/// The first of these kinds whose signature is on the device, which begins with `head`.
///
/// # Errors
/// When the device cannot be read.
pub fn found(device: &dyn ReadBytes, head: &[u8]) -> io::Result<Option<&'static str>> {
    if let Some((name, ..)) = IN_HEAD.iter().find(|(_, at, magic)| has_at(head, *at, magic)) {
        return Ok(Some(name));
    }
    for (name, is_there) in [
        ("md", has_md as fn(&dyn ReadBytes) -> io::Result<bool>),
        ("LUKS", has_luks),
        ("DRBD", has_drbd),
        ("ZFS", has_zfs),
    ] {
        if is_there(device)? {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Whether there is a superblock of md at the end: of version 1.0 in the last 8 to 12 KiB (`super_1_load` of
/// `drivers/md/md.c`), of version 0.90 in the last 64 to 128 KiB (`MD_NEW_SIZE_SECTORS`).
fn has_md(device: &dyn ReadBytes) -> io::Result<bool> {
    let len = device.len();
    let version_1 = len.align_down(Bytes::new(512)).saturating_sub(Bytes::new(8192)).align_down(Bytes::new(4096));
    let version_0 = len.align_down(Bytes::new(65536)).saturating_sub(Bytes::new(65536));
    for at in [version_1, version_0] {
        let magic: Vec<u8> = bytes_at(device, at, 4)?;
        if magic.len() == 4 && (u32_at(&magic, 0) == MD_MAGIC || u32_at(&magic, 0).swap_bytes() == MD_MAGIC) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn has_luks(device: &dyn ReadBytes) -> io::Result<bool> {
    for at in LUKS_HEADERS {
        if bytes_at(device, Bytes::new(at), LUKS_MAGIC.len())? == LUKS_MAGIC {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the last 4 KiB are the metadata of DRBD (`struct meta_data_on_disk` of `drivers/block/drbd/drbd_main.c`, with the
/// magic numbers `DRBD_MD_MAGIC_*`).
fn has_drbd(device: &dyn ReadBytes) -> io::Result<bool> {
    let at = device.len().saturating_sub(Bytes::new(4096)).align_down(Bytes::new(4096));
    let magic = u32_at(&bytes_at(device, at.saturating_add(Bytes::new(60)), 4)?, 0).swap_bytes();
    Ok((0x8374_026b..=0x8374_026d).contains(&magic))
}

fn has_zfs(device: &dyn ReadBytes) -> io::Result<bool> {
    let end = device.len().align_down(Bytes::new(ZFS_LABEL)).get();
    for label in [Some(0), Some(ZFS_LABEL), end.checked_sub(2 * ZFS_LABEL), end.checked_sub(ZFS_LABEL)] {
        let slots = label.unwrap_or(0) + ZFS_LABEL / 2;
        let slots = bytes_at(device, Bytes::new(slots), (ZFS_LABEL / 2) as usize)?;
        let is_magic = |slot: &[u8]| {
            slot.first_chunk().is_some_and(|number| {
                u64::from_le_bytes(*number) == ZFS_MAGIC || u64::from_be_bytes(*number) == ZFS_MAGIC
            })
        };
        if slots.chunks(ZFS_SLOT).any(is_magic) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The bytes at `at`, or none where the device ends before their end.
fn bytes_at(device: &dyn ReadBytes, at: Bytes, len: usize) -> io::Result<Vec<u8>> {
    if at.checked_add(Bytes::new(len as u64)).is_none_or(|end| end > device.len()) {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; len];
    device.read_exact(at, &mut bytes)?;
    Ok(bytes)
}
