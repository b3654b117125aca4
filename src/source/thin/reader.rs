//! Reads metadata blocks from a device or an image file.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::error::{ThinError, ThinResult};
use super::{METADATA_BLOCK, MetaBlock, RawBlock};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::device;
use crate::sys::file::read_full;
use crate::units::Bytes;

pub mod requests;

/// A metadata device, or an image of one.
#[derive(Debug)]
pub struct MetadataReader {
    file: File,
    blocks: u64,
    reads: AtomicU64,
}

impl MetadataReader {
    /// Reads from `file`. The metadata device of an active pool must be open with `O_DIRECT`, because the kernel writes
    /// past the device's page cache, which may have old blocks.
    ///
    /// # Errors
    /// When the size cannot be read.
    pub fn new(mut file: File) -> io::Result<Self> {
        let blocks = file.seek(SeekFrom::End(0))? / METADATA_BLOCK as u64;
        Ok(Self { file, blocks, reads: AtomicU64::new(0) })
    }

    /// Opens the device or image at `path`, as [`MetadataReader::reopen`].
    ///
    /// # Errors
    /// When it cannot be opened, or is a device without direct I/O.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::reopen(&device::open(path, false)?)
    }

    /// Opens an open device or image again with `O_DIRECT`. A regular file in a file system without direct I/O is
    /// opened without it: all programs read and write such a file through the page cache.
    ///
    /// # Errors
    /// When it cannot be opened, or is a device without direct I/O.
    pub fn reopen(file: &File) -> io::Result<Self> {
        match device::reopen_direct(file) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && file.metadata()?.is_file() => {
                Self::new(device::reopen(file)?)
            }
            opened => Self::new(opened?),
        }
    }

    /// The number of whole blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The number of read requests so far.
    pub fn reads(&self) -> u64 {
        self.reads.load(Relaxed)
    }

    /// Reads `count` blocks from `first` on into `buffer`.
    ///
    /// # Errors
    /// When the read fails, or the device ends before.
    pub fn read<'b>(
        &self,
        first: MetaBlock,
        count: usize,
        buffer: &'b mut AlignedBuffer,
    ) -> ThinResult<&'b [RawBlock]> {
        self.count(1);
        self.try_read(first, buffer.resize(count * METADATA_BLOCK)).map_err(|error| ThinError::Io(first, error))?;
        Ok(buffer.bytes().as_chunks().0)
    }

    /// Counts read requests that were begun.
    fn count(&self, requests: usize) {
        self.reads.fetch_add(requests as u64, Relaxed);
    }

    fn try_read(&self, first: MetaBlock, place: &mut [u8]) -> io::Result<()> {
        let past_end = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let offset = first.get().checked_mul(METADATA_BLOCK as u64).filter(|offset| i64::try_from(*offset).is_ok());
        let count = read_full(&self.file, place, Bytes::new(offset.ok_or_else(past_end)?))?;
        if count == place.len() { Ok(()) } else { Err(past_end()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn only_complete_blocks_are_read() {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        for value in 0..3 {
            image.write_all(&[value; METADATA_BLOCK]).unwrap();
        }
        image.write_all(b"half a block").unwrap();
        image.flush().unwrap();
        let reader = MetadataReader::open(image.path()).unwrap();
        assert_eq!(reader.blocks(), 3);
        let mut buffer = AlignedBuffer::new();
        let blocks = reader.read(MetaBlock::new(1), 2, &mut buffer).unwrap();
        assert_eq!(blocks.iter().map(|block| block[0]).collect::<Vec<_>>(), [1, 2]);
        for (first, count) in [(3, 1), (2, 2), (u64::MAX, 1), (u64::MAX / 4096, 1)] {
            let error = reader.read(MetaBlock::new(first), count, &mut buffer);
            assert!(matches!(error, Err(ThinError::Io(..))), "{first}");
        }
        assert_eq!(reader.reads(), 5);
    }
}
