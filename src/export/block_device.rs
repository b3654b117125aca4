//! A block device as an export, byte for byte.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::device_writer::DeviceWriter;
use super::read_queue::{DirectQueue, ReadQueue};
use super::{Export, FileIdentity, HostNode, MIN_ALIGN, Writer};
use crate::error::{Error, Result};
use crate::source::{BlockDevice, Context, Stack};
use crate::sys::block::{self, Readable};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::{device, sysfs};
use crate::units::Bytes;

/// A block device.
pub(super) struct DeviceExport {
    device: BlockDevice,
    /// For reads past the device's page cache, which may be older than a table that was loaded since.
    direct: Arc<File>,
    queue: DirectQueue,
    align: Bytes,
}

impl DeviceExport {
    /// Takes an open block device.
    ///
    /// # Errors
    /// When its block size cannot be read, or it cannot be opened for direct reads.
    pub(super) fn new(device: BlockDevice) -> Result<Self> {
        let failed = |what: &str, error: io::Error| Error::failed(what).on(&device.path).because(error);
        let block = block::logical_block(&device.file).map_err(|error| failed("cannot read the block size", error))?;
        // Every block device takes O_DIRECT. A failure has another cause, such as a limit, and must not lead to reads through
        // the page cache.
        let direct = device::reopen_direct(&device.file).map_err(|error| failed("cannot open with O_DIRECT", error))?;
        let direct = Arc::new(direct);
        Ok(Self { device, queue: DirectQueue::new(direct.clone()), direct, align: block.max(MIN_ALIGN) })
    }
}

impl Export for DeviceExport {
    fn name(&self) -> &Path {
        &self.device.path
    }

    /// A device that is gone has no length left (`blk_mark_disk_dead` of `block/genhd.c`): a file that is empty at once
    /// would be copied as a short one.
    fn size(&self) -> io::Result<Bytes> {
        match block::len(&self.device.file)? {
            Bytes::ZERO if self.device.len > Bytes::ZERO => Err(io::Error::from_raw_os_error(libc::ENODEV)),
            len => Ok(len),
        }
    }

    fn align(&self) -> Bytes {
        self.align
    }

    fn read_at(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
        let device = Readable { direct: &self.direct, cached: &self.device.file, len: self.size()?, align: self.align };
        block::read(device, buffer, offset, size)
    }

    fn read_queue(&self) -> Option<&dyn ReadQueue> {
        Some(&self.queue)
    }

    fn writer(&self) -> io::Result<Arc<dyn Writer>> {
        Ok(Arc::new(DeviceWriter::new(&self.device)?))
    }

    fn resolve(&self, context: &Context) -> Stack {
        // The length may have changed since the open.
        let len = self.size().unwrap_or(self.device.len);
        Stack::of_device(&BlockDevice { len, ..self.device.clone() }, context)
    }

    fn host_node(&self) -> io::Result<HostNode> {
        HostNode::of_open(&self.device.file)
    }

    /// A thin volume discards whole blocks of its pool, and an array whole units of its own.
    fn unit(&self) -> Option<Bytes> {
        sysfs::number(self.device.id, "queue/discard_granularity").map(Bytes::new)
    }

    fn may_change(&self) -> bool {
        sysfs::number(self.device.id, "ro") != Some(1)
    }

    fn device(&self) -> Option<&BlockDevice> {
        Some(&self.device)
    }

    fn identity(&self) -> Option<FileIdentity> {
        Some(FileIdentity::Device(self.device.id))
    }
}
