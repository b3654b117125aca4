//! A part of a device as a device: a partition.

use std::io;

use super::ReadBytes;
use crate::units::Bytes;

/// A range of a device.
pub struct Window<'a> {
    device: &'a dyn ReadBytes,
    start: Bytes,
    len: Bytes,
}

impl<'a> Window<'a> {
    /// The `len` bytes of `device` from `start` on, or `None` if they do not lie within it.
    pub fn new(device: &'a dyn ReadBytes, start: Bytes, len: Bytes) -> Option<Self> {
        let end = start.checked_add(len)?;
        (end <= device.len()).then_some(Self { device, start, len })
    }
}

impl ReadBytes for Window<'_> {
    fn len(&self) -> Bytes {
        self.len
    }

    fn read_exact(&self, offset: Bytes, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(Bytes::new(buffer.len() as u64)).filter(|&end| end <= self.len);
        match (end, self.start.checked_add(offset)) {
            (Some(_), Some(at)) => self.device.read_exact(at, buffer),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
