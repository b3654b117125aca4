//! The answers of SCSI disks.
//!
//! Invariant: no input makes a parser panic. The runs of an LBA status list advance, alternate in kind and end within
//! the disk, and there are no more of them than descriptors.
//!
//! An input is a shift for the block size (one byte), the block that was asked about (four bytes), and an answer.

use blkholefs::source::scsi::pages;
use blkholefs::units::Bytes;

pub fn run(input: &[u8]) {
    let Some(([shift, lba @ ..], data)) = input.split_first_chunk::<5>() else { return };
    let _ = (pages::capacity(data), pages::identity(data), pages::sense(data));
    let _ = (pages::lists_page(data, pages::PROVISIONING_PAGE), pages::provisioning_zeros(data));
    let block = Bytes::new(512 << (shift % 8));
    let asked = Bytes::new(u64::from(u32::from_le_bytes(*lba)) * block.get());
    for len in [asked.saturating_add(block), asked.saturating_add(Bytes::new(block.get() << 20)), Bytes::MAX] {
        let status = pages::lba_status(data, asked, block, len);
        assert!(status.runs.len() <= data.len() / 16);
        assert!(status.runs.windows(2).all(|pair| pair[0].kind != pair[1].kind && pair[0].end < pair[1].end));
        assert!(status.runs.iter().all(|run| asked < run.end && run.end <= len));
    }
}
