//! Exports: what one file of a mount is.
//!
//! An [`Export`] has a length, bytes, extents, a freshness (the guards of its [`Stack`]) and an identity. Its kinds are a
//! block device, an image, a volume of a pool that is not active, and an export of an NBD server. A view is an export that
//! wraps another one.

mod block_device;
mod catalog;
mod device_directory;
mod device_writer;
mod image;
mod in_use;
mod nbd;
mod node;
mod read_queue;
mod shown;
mod usage;
mod view;
mod volume;
mod writer;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

pub use catalog::Catalog;
pub use device_directory::DeviceDirectory;
pub use in_use::open_error;
pub use nbd::NbdExportFile;
pub use node::{FileIdentity, HostNode};
pub use read_queue::{PendingRead, ReadQueue};
pub use shown::{CatalogEntry, FileSource, KeptOpen};
pub use usage::Usage;
pub use view::{Wanted, of_open as view_of};
pub use volume::VolumeExport;
pub use writer::{Writer, Zeroed};

use crate::error::{Error, Result};
use crate::source::nbd::{SideExport, Uri};
use crate::source::{BlockDevice, Context, Stack};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::device;
use crate::units::Bytes;
use block_device::DeviceExport;
use image::ImageExport;

/// The kinds of files in a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileKind {
    /// A directory of devices.
    Directory,
    /// A device, shown as a regular file.
    File,
}

/// Holes never start or end inside a unit of this size: QEMU aborts on extents that its O_DIRECT cannot address.
pub const MIN_ALIGN: Bytes = Bytes::new(4096);

/// Shorter files have no holes. `st_blocks` is not 0, since tar takes that for "nothing to read", and cp looks for holes
/// where it is below the size: a file of 512 bytes cannot satisfy both.
const SHORTEST_WITH_HOLES: Bytes = Bytes::new(1024);

/// What one file of a mount is: a length, bytes, extents, their freshness, and an identity.
///
/// An implementor gives the operations of its kind. Callers use the functions of `dyn Export`, which check the results.
pub trait Export: Send + Sync {
    /// The name in messages: usually the path that was opened.
    fn name(&self) -> &Path;

    /// The length now.
    ///
    /// # Errors
    /// When the device is gone.
    fn size(&self) -> io::Result<Bytes>;

    /// The unit that holes are rounded to, inwards: a multiple of [`MIN_ALIGN`].
    fn align(&self) -> Bytes;

    /// Reads `size` bytes at `offset`, all of them before the end, into `buffer`. Returns the range of `buffer` that
    /// holds them. It is shorter than `size` if the device has become shorter.
    ///
    /// # Errors
    /// As pread(2).
    fn read_at(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>>;

    /// Reads that are begun first and waited for later; `None` where only [`Export::read_at`] reads.
    fn read_queue(&self) -> Option<&dyn ReadQueue> {
        None
    }

    /// Opens it for writing, and claims it for that. The claim ends when the writer is dropped.
    ///
    /// # Errors
    /// `EROFS` for what is never written, and as open(2): `EBUSY` for a device that is in use.
    fn writer(&self) -> io::Result<Arc<dyn Writer>> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }

    /// The layers that the extents come from, and what guards them. Nothing is loaded.
    fn resolve(&self, context: &Context) -> Stack;

    /// The owner, permissions and times from which the attributes of the file in the mount are made: those of the
    /// device or image of the host where it has any.
    ///
    /// # Errors
    /// When the device is gone.
    fn host_node(&self) -> io::Result<HostNode>;

    /// The block device, if it is one.
    fn device(&self) -> Option<&BlockDevice> {
        None
    }

    /// The regular file that has the same bytes at any time; `None` for anything else.
    fn regular_file(&self) -> Option<&File> {
        None
    }

    /// The unit in which it is allocated, where that is known.
    fn unit(&self) -> Option<Bytes> {
        None
    }

    /// Whether somebody may write to it while it is open.
    fn may_change(&self) -> bool {
        true
    }

    /// Whether nobody can write to it while it is open.
    fn is_claimed(&self) -> bool {
        false
    }

    /// The export that this one is a view of.
    fn base(&self) -> Option<&Arc<dyn Export>> {
        None
    }

    /// Which device or file it is, where more than one can be at its place.
    fn identity(&self) -> Option<FileIdentity> {
        None
    }

    /// Whether a new open would find the same contents.
    fn is_current(&self) -> bool {
        true
    }
}

/// The error for a device or image at `path` that cannot be opened. LVM removes the node of a volume that is not active, which
/// is what a snapshot of a thin volume is at first.
fn cannot_open(path: &Path, error: io::Error) -> Error {
    let is_missing_device = error.kind() == io::ErrorKind::NotFound && path.starts_with("/dev");
    let error = Error::failed("cannot open").on(path).because(error);
    if !is_missing_device {
        return error;
    }
    error.hint("an LVM volume is only there while it is active: lvchange -ay -K VG/VOLUME")
}

/// Opens the block device or regular file at `path`, for reading.
///
/// # Errors
/// When it cannot be opened, or is neither.
pub fn open(path: &Path) -> Result<Arc<dyn Export>> {
    let failed = |what: &str, error: io::Error| Error::failed(what).on(path).because(error);
    let file = device::open(path, false).map_err(|error| cannot_open(path, error))?;
    let metadata = file.metadata().map_err(|error| failed("cannot stat", error))?;
    if metadata.is_file() {
        let image = ImageExport::new(file, &metadata, path);
        return Ok(Arc::new(image.map_err(|error| failed("cannot open with O_DIRECT", error))?));
    }
    if !metadata.file_type().is_block_device() {
        return Err(Error::failed("is neither a block device nor a regular file").on(path));
    }
    Ok(Arc::new(DeviceExport::new(BlockDevice::from_file(file, path)?)?))
}

impl dyn Export + '_ {
    /// The length now.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn len(&self) -> Result<Bytes> {
        self.size().map_err(|error| Error::failed("cannot read the size").on(self.name()).because(error))
    }

    /// Owner, permissions and times.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn node(&self) -> Result<HostNode> {
        self.host_node().map_err(|error| Error::failed("cannot stat").on(self.name()).because(error))
    }

    /// The layers that the extents come from; all data for a file that is too short for holes.
    pub fn stack(&self, context: &Context) -> Stack {
        let stack = self.resolve(context);
        if stack.len() >= SHORTEST_WITH_HOLES {
            return stack;
        }
        stack.shown_as_data("a file of less than 1024 bytes is shown without holes")
    }

    /// The export `uri` of a server, with the NBD device of the kernel that is connected to it: this device, or one below
    /// it in its stack.
    ///
    /// # Errors
    /// As [`SideExport::new`].
    pub fn side_export(&self, uri: Uri) -> Result<SideExport> {
        SideExport::new(uri, &self.stack(&Context::default()), self.name())
    }

    /// Reads up to `size` bytes at `offset` through `buffer`; shorter only at the end.
    ///
    /// # Errors
    /// When a byte cannot be read, or the device gives less than it has: missing bytes are never replaced by zeros. A FUSE
    /// client sees ENODEV where the device is gone, and EIO for every other cause, whatever errno the kernel, a file system
    /// or a server gave.
    pub fn read<'a>(&self, buffer: &'a mut AlignedBuffer, offset: Bytes, size: usize) -> Result<&'a [u8]> {
        match self.read_range(buffer, offset, size) {
            Ok(range) => Ok(&buffer.bytes()[range]),
            Err(error) => Err(error.with_errno(if self.is_gone() { libc::ENODEV } else { libc::EIO })),
        }
    }

    /// Returns where in `buffer` the bytes are.
    fn read_range(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> Result<Range<usize>> {
        let len = self.len()?;
        let left = usize::try_from(len.saturating_sub(offset).get()).unwrap_or(usize::MAX);
        let wanted = size.min(left);
        let failed =
            |error: io::Error| Error::failed(format!("cannot read at {offset}")).on(self.name()).because(error);
        let range = self.read_at(buffer, offset, wanted).map_err(failed)?;
        let end = offset.saturating_add(Bytes::new(range.len() as u64));
        // The device may have become shorter during the read: then the read ends at the new end, and that is no error.
        if range.len() < wanted && end < self.len()? {
            return Err(failed(io::Error::from_raw_os_error(libc::EIO)));
        }
        Ok(range)
    }

    /// Whether the device does not exist any more.
    pub fn is_gone(&self) -> bool {
        self.size().is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::dense;

    /// An export that cannot be read anywhere.
    struct BrokenExport {
        size: std::result::Result<Bytes, i32>,
        read: i32,
    }

    impl Export for BrokenExport {
        fn name(&self) -> &Path {
            Path::new("/dev/broken")
        }

        fn size(&self) -> io::Result<Bytes> {
            self.size.map_err(io::Error::from_raw_os_error)
        }

        fn align(&self) -> Bytes {
            MIN_ALIGN
        }

        fn read_at(&self, _buffer: &mut AlignedBuffer, _offset: Bytes, _size: usize) -> io::Result<Range<usize>> {
            Err(io::Error::from_raw_os_error(self.read))
        }

        fn resolve(&self, context: &Context) -> Stack {
            Stack::build(context, |_| std::sync::Arc::new(dense::layer("broken", "test", MIN_ALIGN, "broken")))
        }

        fn host_node(&self) -> io::Result<HostNode> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    #[test]
    fn a_read_error_is_eio_whatever_its_cause_is_called() {
        let read = |size, read| {
            let export: &dyn Export = &BrokenExport { size, read };
            export.read(&mut AlignedBuffer::new(), Bytes::ZERO, 512).expect_err("it is broken")
        };
        for cause in
            [libc::ENODATA, libc::EREMOTEIO, libc::ETIMEDOUT, libc::EINVAL, libc::EMFILE, libc::EILSEQ, libc::EIO]
        {
            let error = read(Ok(MIN_ALIGN), cause);
            assert_eq!(error.errno(), libc::EIO, "{error}");
            let cause = crate::error::plain(&io::Error::from_raw_os_error(cause));
            assert_eq!(error.to_string(), format!("/dev/broken: cannot read at 0: {cause}"));
        }
        for (size, seen) in [(libc::ENODEV, libc::ENODEV), (libc::ESTALE, libc::EIO), (libc::ENXIO, libc::EIO)] {
            assert_eq!(read(Err(size), libc::EIO).errno(), seen);
        }
    }
}
