//! What an exported file is made of: where its bytes are read, and how its stack is resolved.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::source::device::BlockDevice;
use crate::source::{Context, Stack};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::device::DeviceId;
use crate::sys::{block, device, file};
use crate::units::Bytes;

/// Holes never start or end inside a unit of this size: QEMU aborts on extents that its O_DIRECT cannot address.
const MIN_ALIGN: Bytes = Bytes::new(4096);

/// An open device or image.
pub struct Backing {
    path: PathBuf,
    /// For answers about the device, and for reads where O_DIRECT is refused.
    file: Arc<File>,
    /// For reads: past the device's page cache, which may be older than a table that was loaded since.
    direct: Option<File>,
    device: Option<BlockDevice>,
    align: Bytes,
}

impl Backing {
    /// Opens the block device or regular file at `path`, for reading.
    ///
    /// # Errors
    /// When it cannot be opened, or is neither.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |what: &str, error: io::Error| Error::failed(what).on(path).because(error);
        let file = device::open(path, false).map_err(|error| failed("cannot open", error))?;
        let kind = file.metadata().map_err(|error| failed("cannot stat", error))?.file_type();
        if kind.is_file() {
            let align = MIN_ALIGN;
            return Ok(Self { path: path.to_owned(), file: Arc::new(file), direct: None, device: None, align });
        }
        if !kind.is_block_device() {
            return Err(Error::failed("is neither a block device nor a regular file").on(path));
        }
        let device = BlockDevice::from_file(file, path)?;
        let align = block::logical_block(&device.file).map_err(|error| failed("cannot read the block size", error))?;
        let direct = device::reopen_direct(&device.file).ok();
        let file = device.file.clone();
        Ok(Self { path: path.to_owned(), file, direct, device: Some(device), align: align.max(MIN_ALIGN) })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of the block device, if it is one.
    pub fn id(&self) -> Option<DeviceId> {
        self.device.as_ref().map(|device| device.id)
    }

    /// The unit that holes are rounded to, inwards.
    pub fn align(&self) -> Bytes {
        self.align
    }

    /// The length now.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn len(&self) -> Result<Bytes> {
        let len = match &self.device {
            Some(_) => block::len(&self.file),
            None => self.file.metadata().map(|metadata| Bytes::new(metadata.len())),
        };
        len.map_err(|error| Error::failed("cannot read the size").on(&self.path).because(error))
    }

    /// The attributes of the open file or device node.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn metadata(&self) -> io::Result<std::fs::Metadata> {
        self.file.metadata()
    }

    /// Whether `path` still leads to what is open here. A node that was made again may be another device's.
    pub fn is_at(&self, path: &Path) -> bool {
        let (Ok(open), Ok(now)) = (self.file.metadata(), path.metadata()) else { return false };
        now.dev() == open.dev() && now.ino() == open.ino() && now.rdev() == open.rdev()
    }

    /// The stack below, down to the sources of holes.
    pub fn resolve(&self, context: &Context) -> Stack {
        match &self.device {
            // The length may have changed since the open.
            Some(device) => {
                let len = block::len(&device.file).unwrap_or(device.len);
                Stack::of_device(&BlockDevice { len, ..device.clone() }, context)
            }
            None => {
                let len = self.file.metadata().map_or(Bytes::ZERO, |metadata| Bytes::new(metadata.len()));
                Stack::of_file(&self.file, &self.path, len, context)
            }
        }
    }

    /// Reads up to `size` bytes at `offset` through `buffer`; shorter only at the end of the device.
    ///
    /// # Errors
    /// As pread(2), and EIO when the device gives less than it has: what is missing is never made up.
    pub fn read<'a>(&self, buffer: &'a mut AlignedBuffer, offset: Bytes, size: usize) -> Result<&'a [u8]> {
        let len = self.len()?;
        let left = usize::try_from(len.saturating_sub(offset).get()).unwrap_or(usize::MAX);
        let wanted = size.min(left);
        let failed = |error: io::Error| Error::failed(format!("cannot read at {offset}")).on(&self.path).because(error);
        let read = match &self.direct {
            Some(direct) => file::read_direct(direct, buffer, offset, wanted, self.align),
            None => file::read_buffered(&self.file, buffer, offset, wanted),
        };
        match read {
            Ok(range) if range.len() == wanted => Ok(&buffer.bytes()[range]),
            // The device may have become shorter meanwhile; then the end has moved, and that is no error.
            Ok(range) if self.len()? <= offset.saturating_add(Bytes::new(range.len() as u64)) => {
                Ok(&buffer.bytes()[range])
            }
            Ok(_) => Err(failed(io::Error::from_raw_os_error(libc::EIO))),
            Err(error) => Err(failed(error)),
        }
    }
}
