//! Whole images of ext2, ext3 and ext4 that are damaged.
//!
//! Invariant: reading an image returns an error or a map, without a panic and in bounded memory. The map has the length of the
//! device, and its first bytes are used.
//!
//! An input is the length of the device in KiB (two bytes), a byte whose lowest bit says whether the superblock gets a right
//! checksum, and pieces of the device: an offset in units of 16 bytes (two bytes), a length (one byte), and that many bytes.

use std::io;

use blkholefs::testing::filesystem::{ReadBytes, ext};
use blkholefs::testing::map::HoleMap as _;
use blkholefs::testing::units::Bytes;

struct Image(Vec<u8>);

impl ReadBytes for Image {
    fn len(&self) -> Bytes {
        Bytes::new(self.0.len() as u64)
    }

    fn read_exact(&self, offset: Bytes, buffer: &mut [u8]) -> io::Result<()> {
        assert!(buffer.len() <= 1 << 20, "a read of {} bytes", buffer.len());
        let from = usize::try_from(offset.get()).ok().and_then(|at| self.0.get(at..)?.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

pub fn run(input: &[u8]) {
    let Some(([low, high, stamp], mut pieces)) = input.split_first_chunk() else { return };
    let kib = usize::from(u16::from_le_bytes([*low, *high]) % 4096);
    let mut image = vec![0; kib << 10];
    while let Some(([low, high, length], rest)) = pieces.split_first_chunk() {
        let bytes = &rest[..rest.len().min((*length).into())];
        let at = usize::from(u16::from_le_bytes([*low, *high])) << 4;
        if let Some(place) = image.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        pieces = &rest[bytes.len()..];
    }
    if let Some(superblock) = image.get_mut(1024..2048).filter(|_| stamp & 1 == 1) {
        let sum = !crc32c::crc32c(&superblock[..1020]);
        superblock[1020..].copy_from_slice(&sum.to_le_bytes());
    }
    let is_ext = ext::is_ext(&image);
    let image = Image(image);
    let Ok(map) = ext::used(&image) else { return };
    assert!(is_ext && map.len() == image.len());
    let first = map.extent_at(Bytes::ZERO);
    assert!(first.kind.is_data() && first.end.get() > 1024);
}
