//! Disks with tables of partitions and swap areas.
//!
//! Invariant: a disk is refused or has a map of its length, without a panic and in bounded memory. The partitions of a table lie
//! within the disk one after the other, and all that is outside of them is data.
//!
//! An input is the number of a disk and a flag (one byte), and edits of eight bytes each: the position, how many bytes, and the
//! bytes. With the flag, the checksums of a GPT are made right after the edits.

use blkholefs::testing::filesystem::detect::{recognise, used_space};
use blkholefs::testing::filesystem::{MemoryDevice, ReadBytes as _, partitions, swap};
use blkholefs::testing::map::view;
use blkholefs::testing::units::Bytes;

/// The most edits of one input.
const MAX_EDITS: usize = 32;
const LEN: usize = 192 << 10;

struct Disk(Vec<u8>);

impl Disk {
    fn new(which: u8) -> Self {
        let mut disk = Self(vec![0; LEN]);
        match which % 4 {
            0 => {
                disk.swap_area(0, LEN);
            }
            1 => {
                disk.boot_entry(0, 0, 0x82, 16, 120);
                disk.boot_entry(0, 1, 0x05, 136, 248);
                disk.boot_entry(136 * 512, 0, 0x83, 8, 56);
                disk.boot_entry(136 * 512, 1, 0x05, 64, 184);
                disk.boot_entry(200 * 512, 0, 0x82, 8, 176);
                disk.swap_area(16 * 512, 120 * 512);
                disk.swap_area(208 * 512, 176 * 512);
            }
            other => disk.gpt(if other == 2 { 512 } else { 4096 }),
        }
        disk
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn boot_entry(&mut self, record: usize, index: usize, kind: u8, start: u32, sectors: u32) {
        let at = record + 446 + 16 * index;
        self.put(at + 4, &[kind]);
        self.put(at + 8, &[start, sectors].map(u32::to_le_bytes).concat());
        self.put(record + 510, b"\x55\xaa");
    }

    fn swap_area(&mut self, at: usize, len: usize) {
        self.put(at + 1024, &[1, len as u32 / 4096 - 1].map(u32::to_le_bytes).concat());
        self.put(at + 4086, b"SWAPSPACE2");
    }

    /// Two partitions, the first of which is a swap area.
    fn gpt(&mut self, sector: usize) {
        let last = LEN / sector - 1;
        self.boot_entry(0, 0, 0xee, 1, last as u32);
        let arrays = [2, last - 4096_usize.div_ceil(sector)];
        let data = 64 * 1024 / sector;
        for (this, other, array) in [(1, last, arrays[0]), (last, 1, arrays[1])] {
            let at = this * sector;
            self.put(at, b"EFI PART\0\0\x01\0\x5c");
            let fields = [this, other, 6 * 4096 / sector, arrays[1] - 1].map(|field| (field as u64).to_le_bytes());
            self.put(at + 24, &fields.concat());
            self.put(at + 72, &(array as u64).to_le_bytes());
            self.put(at + 80, &[32_u32, 128].map(u32::to_le_bytes).concat());
            for (index, (first, end)) in [(data, data * 3 / 2), (data * 3 / 2, data * 2)].into_iter().enumerate() {
                let entry = array * sector + 128 * index;
                self.put(entry, &[1; 32]);
                self.put(entry + 32, &[first, end - 1].map(|field| (field as u64).to_le_bytes()).concat());
            }
        }
        self.swap_area(data * sector, 32 * 1024);
        self.stamp();
    }

    /// Writes the checksums of all headers of a GPT, and of their arrays if they have the usual length.
    fn stamp(&mut self) {
        for sector in [512, 4096] {
            for at in [sector, self.0.len() - sector] {
                if self.0[at..at + 8] == *b"EFI PART" {
                    let number = |at: usize| u64::from_le_bytes(self.0[at..at + 8].try_into().expect("8 bytes"));
                    let array = usize::try_from(number(at + 72)).unwrap_or(usize::MAX).saturating_mul(sector);
                    let array = self.0.get(array..).and_then(|rest| rest.get(..4096));
                    if let Some(checksum) = array.map(crc32) {
                        self.put(at + 88, &checksum.to_le_bytes());
                    }
                    self.put(at + 16, &[0; 4]);
                    let checksum = crc32(&self.0[at..at + 92]);
                    self.put(at + 16, &checksum.to_le_bytes());
                }
            }
        }
    }
}

/// The checksum of a GPT, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1));
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), bit))
}

pub fn run(input: &[u8]) {
    let Some((which, edits)) = input.split_first() else { return };
    let mut disk = Disk::new(*which);
    let (edits, _) = edits.as_chunks::<8>();
    for [low, middle, high, count, bytes @ ..] in edits.iter().take(MAX_EDITS) {
        let bytes = &bytes[..usize::from(*count % 4) + 1];
        disk.put(u32::from_le_bytes([*low, *middle, *high, 0]) as usize % (LEN - 3), bytes);
    }
    if which & 0x80 != 0 {
        disk.stamp();
    }
    let disk = MemoryDevice(disk.0);
    recognise(&disk);
    let _ = swap::used(&disk);
    let partitions = partitions::read(&disk);
    if let Ok(partitions) = &partitions {
        assert!(partitions.iter().all(|partition| partition.start < partition.end && partition.end <= disk.len()));
        assert!(partitions.windows(2).all(|pair| pair[0].end <= pair[1].start), "partitions overlap");
    }
    let used = used_space(&disk);
    let used = match used {
        Ok(used) => used,
        Err(reason) => return assert!(!edits.is_empty(), "a disk without edits is good, and no reason for {reason}"),
    };
    assert_eq!(used.map.len(), disk.len());
    let mut end = Bytes::ZERO;
    for (start, extent) in view::runs(&*used.map, Bytes::new(1), Bytes::ZERO..disk.len()) {
        assert_eq!(start, end);
        end = extent.end;
        let is_inside = |inside: &partitions::Partition| inside.start <= start && end <= inside.end;
        let is_partition = || partitions.as_ref().is_ok_and(|all| all.iter().any(is_inside));
        assert!(
            extent.kind.is_data() || used.kind != "partitions" || is_partition(),
            "free space outside of partitions"
        );
    }
    assert_eq!(end, disk.len());
}
