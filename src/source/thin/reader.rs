//! Reads metadata blocks from a device or an image file.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::error::{Result, ThinError};
use super::{METADATA_BLOCK, MetaBlock, RawBlock};

/// Memory that direct I/O can read into: it starts on a multiple of the block size.
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
}

impl AlignedBuffer {
    /// Room for `blocks` metadata blocks.
    pub fn new(blocks: usize) -> Self {
        let memory = vec![0; (blocks + 1) * METADATA_BLOCK];
        // A vector never moves its memory as long as it does not grow, and this one does not.
        let start = memory.as_ptr().align_offset(METADATA_BLOCK).min(METADATA_BLOCK);
        Self { memory, start }
    }

    /// The number of blocks that fit.
    pub fn blocks(&self) -> usize {
        self.memory.len() / METADATA_BLOCK - 1
    }

    fn first(&mut self, blocks: usize) -> &mut [u8] {
        &mut self.memory[self.start..][..blocks * METADATA_BLOCK]
    }
}

/// A metadata device, or an image of one.
#[derive(Debug)]
pub struct MetadataReader {
    file: File,
    blocks: u64,
    reads: AtomicU64,
}

impl MetadataReader {
    /// Reads from `file`. For the metadata device of an active pool it must be open with `O_DIRECT`: the kernel writes
    /// the device below its page cache, which may hold blocks from long ago.
    ///
    /// # Errors
    /// When the size cannot be found out.
    pub fn new(mut file: File) -> io::Result<Self> {
        let blocks = file.seek(SeekFrom::End(0))? / METADATA_BLOCK as u64;
        Ok(Self { file, blocks, reads: AtomicU64::new(0) })
    }

    /// Opens the device or image at `path` with `O_DIRECT`, or without it where a regular file's file system has no
    /// direct I/O: there the page cache is the truth.
    ///
    /// # Errors
    /// When it cannot be opened, or is a device without direct I/O.
    pub fn open(path: &Path) -> io::Result<Self> {
        let open = |flags| OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC | flags).open(path);
        match open(libc::O_DIRECT) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && path.metadata()?.is_file() => {
                Self::new(open(0)?)
            }
            opened => Self::new(opened?),
        }
    }

    /// The file that it reads.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The number of whole blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The number of read requests so far.
    pub fn reads(&self) -> u64 {
        self.reads.load(Relaxed)
    }

    /// Reads `count` blocks from `first` on, at most as many as fit into `buffer`.
    ///
    /// # Errors
    /// When the device refuses, or ends before.
    pub fn read<'b>(&self, first: MetaBlock, count: usize, buffer: &'b mut AlignedBuffer) -> Result<&'b [RawBlock]> {
        let place = buffer.first(count);
        let past_end = || io::Error::from(io::ErrorKind::UnexpectedEof);
        self.reads.fetch_add(1, Relaxed);
        let offset = first.get().checked_mul(METADATA_BLOCK as u64);
        offset
            .ok_or_else(past_end)
            .and_then(|offset| self.file.read_exact_at(place, offset))
            .map_err(|error| ThinError::Io(first, error))?;
        Ok(place.as_chunks().0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn reads_whole_blocks_and_no_further_than_the_end() {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        for value in 0..3 {
            image.write_all(&[value; METADATA_BLOCK]).unwrap();
        }
        image.write_all(b"half a block").unwrap();
        image.flush().unwrap();
        let reader = MetadataReader::open(image.path()).unwrap();
        assert_eq!(reader.blocks(), 3);
        let mut buffer = AlignedBuffer::new(2);
        assert_eq!(buffer.blocks(), 2);
        let blocks = reader.read(MetaBlock::new(1), 2, &mut buffer).unwrap();
        assert_eq!(blocks.iter().map(|block| block[0]).collect::<Vec<_>>(), [1, 2]);
        assert!(blocks[0].as_ptr().addr().is_multiple_of(METADATA_BLOCK));
        for (first, count) in [(3, 1), (2, 2), (u64::MAX, 1), (u64::MAX / 4096, 1)] {
            let error = reader.read(MetaBlock::new(first), count, &mut buffer);
            assert!(matches!(error, Err(ThinError::Io(..))), "{first}");
        }
        assert_eq!(reader.reads(), 5);
    }
}
