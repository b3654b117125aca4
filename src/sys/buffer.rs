//! A buffer that O_DIRECT accepts.

/// Memory is aligned to this, which is enough for every device's DMA (`STATX_DIOALIGN` never asks for more than a page).
const ALIGN: usize = 4096;

/// Bytes that begin on a page boundary; grows as needed, is kept for the next use.
#[derive(Debug, Default)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// A buffer without memory yet.
    pub const fn new() -> Self {
        Self { memory: Vec::new(), start: 0, len: 0 }
    }

    /// Makes the buffer `len` bytes long and hands it out. What it holds is unspecified.
    pub fn resize(&mut self, len: usize) -> &mut [u8] {
        if self.memory.len() < len + ALIGN {
            self.memory = vec![0; len + ALIGN];
            self.start = self.memory.as_ptr().align_offset(ALIGN);
        }
        self.len = len;
        &mut self.memory[self.start..self.start + len]
    }

    /// Makes the buffer `len` bytes long, longer than it is, and hands it out with the bytes that it has.
    pub fn grow(&mut self, len: usize) -> &mut [u8] {
        if self.memory.len() < len + ALIGN {
            let bytes = self.bytes().to_vec();
            self.resize(len)[..bytes.len()].copy_from_slice(&bytes);
        }
        self.len = len;
        &mut self.memory[self.start..self.start + len]
    }

    /// The bytes, as long as the last [`AlignedBuffer::resize`] made them.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_begin_on_a_page() {
        let mut buffer = AlignedBuffer::new();
        assert!(buffer.bytes().is_empty());
        for len in [1, 4096, 1 << 20, 5] {
            assert_eq!(buffer.resize(len).len(), len);
            assert_eq!(buffer.bytes().as_ptr().align_offset(ALIGN), 0);
        }
    }

    #[test]
    fn a_buffer_that_grows_keeps_its_bytes() {
        let mut buffer = AlignedBuffer::new();
        buffer.resize(3).copy_from_slice(b"abc");
        for len in [4, 5000, 1 << 20] {
            assert_eq!(&buffer.grow(len)[..3], b"abc");
            assert_eq!((buffer.bytes().len(), buffer.bytes().as_ptr().align_offset(ALIGN)), (len, 0));
        }
    }
}
