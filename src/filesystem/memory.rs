//! A device in memory, for tests of the parsers.

use std::io;

use super::ReadBytes;
use crate::units::Bytes;

/// A device in memory.
pub struct MemoryDevice(pub Vec<u8>);

impl ReadBytes for MemoryDevice {
    fn len(&self) -> Bytes {
        Bytes::new(self.0.len() as u64)
    }

    fn read_exact(&self, offset: Bytes, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset.get()).unwrap_or(usize::MAX);
        let bytes = self.0.get(start..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}
