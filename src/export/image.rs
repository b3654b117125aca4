//! A regular file as an export.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::read_queue::{DirectQueue, ReadQueue};
use super::{Export, FileIdentity, HostNode, MIN_ALIGN, Writer, Zeroed, in_use};
use crate::source::file::Reads;
use crate::source::{Context, Stack};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::{device, file, zero};
use crate::units::Bytes;

/// Whether an open failed because the file system has no direct reads (`do_dentry_open` of `fs/open.c`; FUSE servers answer
/// EOPNOTSUPP, too).
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

/// A regular file, shown as it is.
pub(super) struct ImageExport {
    file: File,
    /// For reads, where they must pass the page cache by.
    direct: Option<Arc<File>>,
    /// Reads ahead of a client, for the same case. Elsewhere the kernel reads the image, or reads it ahead.
    queue: Option<DirectQueue>,
    path: PathBuf,
    identity: FileIdentity,
}

impl ImageExport {
    /// Takes the open regular file at `path`.
    ///
    /// # Errors
    /// When its holes need direct reads, and it cannot be opened for those.
    pub(super) fn new(file: File, metadata: &Metadata, path: &Path) -> io::Result<Self> {
        // Direct reads only where reads go to a server: then its holes are those of the server.
        let direct = if file::reads_from_server(&file) { device::reopen_direct(&file).map(Some) } else { Ok(None) };
        let direct = direct.or_else(|error| if is_refusal(&error) { Ok(None) } else { Err(error) })?.map(Arc::new);
        let queue = direct.clone().map(DirectQueue::new);
        Ok(Self { file, direct, queue, path: path.to_owned(), identity: FileIdentity::of(metadata) })
    }
}

/// Writes to an image through its page cache.
///
/// An image that is on a server is read with `O_DIRECT`. Such a read, and a search for holes, write back what the page cache has
/// first (`nfs_start_io_direct` and `_nfs42_proc_llseek` of NFS, `generic_file_read_iter`, and [`Stack::write_back`]). Errors of the
/// write-back are reported by the next flush.
struct ImageWriter {
    file: File,
}

impl Writer for ImageWriter {
    fn write_at(&self, bytes: &[u8], offset: Bytes) -> io::Result<()> {
        self.file.write_all_at(bytes, offset.get())
    }

    /// Where the file system cannot make holes, zeros are to be written only where there are other bytes: writing them everywhere, or
    /// FALLOC_FL_ZERO_RANGE, could fill holes that are there.
    fn make_zero(&self, range: &Range<Bytes>) -> io::Result<Zeroed> {
        match zero::punch_hole(&self.file, range) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Zeroed::Unproven),
            made => made.map(|()| Zeroed::Proven),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

impl Export for ImageExport {
    fn name(&self) -> &Path {
        &self.path
    }

    fn size(&self) -> io::Result<Bytes> {
        self.file.metadata().map(|metadata| Bytes::new(metadata.len()))
    }

    fn align(&self) -> Bytes {
        MIN_ALIGN
    }

    fn read_at(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
        match &self.direct {
            Some(direct) => file::read_direct(direct, buffer, offset, size, MIN_ALIGN),
            None => file::read_buffered(&self.file, buffer, offset, size),
        }
    }

    fn read_queue(&self) -> Option<&dyn ReadQueue> {
        self.queue.as_ref().map(|queue| queue as &dyn ReadQueue)
    }

    fn writer(&self) -> io::Result<Arc<dyn Writer>> {
        // What is written here would be lost below a file system that is mounted from the image, or damage it.
        if in_use::used_loop(&self.file).is_some() {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        let file = device::reopen_writable(&self.file)?;
        Ok(Arc::new(ImageWriter { file }))
    }

    fn resolve(&self, context: &Context) -> Stack {
        let reads = if self.direct.is_some() { Reads::Direct } else { Reads::Cached };
        Stack::of_file(&self.file, &self.path, self.size().unwrap_or(Bytes::ZERO), reads, context)
    }

    fn host_node(&self) -> io::Result<HostNode> {
        HostNode::of_open(&self.file)
    }

    fn regular_file(&self) -> Option<&File> {
        // The kernel would read it through its page cache.
        self.direct.is_none().then_some(&self.file)
    }

    fn identity(&self) -> Option<FileIdentity> {
        Some(self.identity)
    }
}
