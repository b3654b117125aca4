//! The answers of SCSI disks.
//!
//! Invariant: no input makes a parser panic. The runs of an LBA status list have increasing ends, alternate in
//! kind, and end within the disk. There are at most as many runs as descriptors. Each byte of a hole is in a descriptor of
//! deallocated or anchored blocks.
//!
//! An input is a shift for the block size (one byte), the first block of the request (four bytes), and an answer.

use std::ops::Range;

use blkholefs::testing::map::ExtentKind;
use blkholefs::testing::source::scsi::pages;
use blkholefs::testing::units::Bytes;

pub fn run(input: &[u8]) {
    let Some(([shift, lba @ ..], data)) = input.split_first_chunk::<5>() else { return };
    let _ = (pages::capacity(data), pages::inquiry(data), pages::sense(data));
    let _ = (pages::lists_page(data, pages::PROVISIONING_PAGE), pages::provisioning_zeros(data));
    let block = Bytes::new(512 << (shift % 8));
    let asked = Bytes::new(u64::from(u32::from_le_bytes(*lba)) * block.get());
    for len in [asked.saturating_add(block), asked.saturating_add(Bytes::new(block.get() << 20)), Bytes::MAX] {
        let status = pages::lba_status(data, asked, block, len);
        assert!(status.extents.len() <= data.len() / 16);
        assert!(status.extents.windows(2).all(|pair| pair[0].kind != pair[1].kind && pair[0].end < pair[1].end));
        assert!(status.extents.iter().all(|run| asked < run.end && run.end <= len));
        let mut start = asked;
        for run in status.extents {
            assert!(run.kind == ExtentKind::Data || is_deallocated(data, start..run.end, block), "a hole from {start}");
            start = run.end;
        }
    }
}

/// Whether descriptors of deallocated or anchored blocks, anywhere in an answer, cover a range.
fn is_deallocated(data: &[u8], range: Range<Bytes>, block: Bytes) -> bool {
    let (descriptors, _) = data[8..].as_chunks::<16>();
    let block = u128::from(block.get());
    let mut at = u128::from(range.start.get());
    while at < range.end.get().into() {
        let found = descriptors.iter().find_map(|descriptor| {
            let number =
                |from: usize, to: usize| descriptor[from..to].iter().fold(0, |sum, byte| sum << 8 | u128::from(*byte));
            let (start, end) = (number(0, 8) * block, (number(0, 8) + number(8, 12)) * block);
            (start <= at && at < end && matches!(descriptor[12..14], [1 | 2, 0])).then_some(end)
        });
        let Some(end) = found else { return false };
        at = end;
    }
    true
}
