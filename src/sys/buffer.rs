//! A buffer for reads with O_DIRECT.

/// The alignment of a buffer in bytes. It is enough for every device: no driver requires more than a page
/// (`stx_dio_mem_align` of statx(2)).
const ALIGN: usize = 4096;

/// A byte buffer that begins at a multiple of 4096. It keeps its memory when it becomes shorter, so that it can be reused.
#[derive(Debug, Default)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// An empty buffer, which has no memory yet.
    pub const fn new() -> Self {
        Self { memory: Vec::new(), start: 0, len: 0 }
    }

    /// Sets the length to `len` and returns the buffer. Its contents are unspecified.
    pub fn resize(&mut self, len: usize) -> &mut [u8] {
        if self.memory.len() < len + ALIGN {
            self.memory = vec![0; len + ALIGN];
            self.start = self.memory.as_ptr().align_offset(ALIGN);
        }
        self.len = len;
        &mut self.memory[self.start..self.start + len]
    }

    /// Increases the length to `len` and returns the buffer. It keeps its bytes; those that are added are unspecified.
    pub fn grow(&mut self, len: usize) -> &mut [u8] {
        if self.memory.len() < len + ALIGN {
            let bytes = self.bytes().to_vec();
            self.resize(len)[..bytes.len()].copy_from_slice(&bytes);
        }
        self.len = len;
        &mut self.memory[self.start..self.start + len]
    }

    /// The contents, with the length that was set last.
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
