//! Opening files for writing, and the requests that change them.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use log::error;

use super::{Attributes, Fh, FileSystem, Ino};
use crate::error::{Error, Result};
use crate::export::{Export, FileIdentity, Wanted, Writer, open_error};
use crate::handle::Handle;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// The size of the reads and writes of a copy inside the mount.
const COPY_PIECE: u64 = 1 << 20;

/// How much one request copies at most. The kernel sends the next request for the rest.
const COPY_AT_ONCE: Bytes = Bytes::new(64 << 20);

/// The writers of all devices that are open for writing. A device has one, which all of its opens share, by whatever name.
#[derive(Default)]
pub(super) struct Writers(Mutex<Vec<OpenWriter>>);

/// The writer of a device, with the identity of the device. It exists as long as an open file has it.
type OpenWriter = (Option<FileIdentity>, Weak<dyn Writer>);

impl Writers {
    /// The writer of an open device: that of its other opens, or a new one.
    fn of(&self, export: &dyn Export) -> Result<Arc<dyn Writer>> {
        // Held while the device is claimed: two opens at the same time are one claim.
        let mut writers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        writers.retain(|(_, writer)| writer.strong_count() > 0);
        let identity = export.identity();
        let shared = writers.iter().find(|(of, _)| *of == identity).and_then(|(_, writer)| writer.upgrade());
        if let Some(writer) = shared {
            return Ok(writer);
        }
        let writer = export.writer().map_err(|cause| open_error(export, cause))?;
        writers.push((identity, Arc::downgrade(&writer)));
        Ok(writer)
    }

    /// Gives up one use of a writer. The last one ends the claim of the device before this returns, and before another open can
    /// make a new claim.
    fn end(&self, export: &dyn Export, writer: Arc<dyn Writer>) {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut writers = lock();
        if Arc::strong_count(&writer) == 1 {
            // Without the lock: it may take long. An open that comes now shares the writer.
            drop(writers);
            if let Err(cause) = writer.flush() {
                // The client has closed the file, and gets no error any more.
                error!("{}", Error::failed("cannot flush at the last close").on(export.name()).because(cause));
            }
            writers = lock();
        }
        drop(writer);
        drop(writers);
    }
}

impl FileSystem {
    /// Whether files can be opened for writing.
    pub fn is_writable(&self) -> bool {
        self.ownership.is_writable
    }

    /// The writer for one more open of a device.
    ///
    /// # Errors
    /// EROFS where nothing is written, and EBUSY for a device that is in use.
    pub(super) fn begin_writing(&self, handle: &Handle) -> Result<Arc<dyn Writer>> {
        if !self.is_writable() {
            return Err(Error::from_errno(libc::EROFS));
        }
        self.writers.of(handle.export())
    }

    /// Ends one open for writing.
    pub(super) fn end_writing(&self, handle: &Handle, writer: Arc<dyn Writer>) {
        self.writers.end(handle.export(), writer);
    }

    /// Writes to an open file, as far as it reaches. Returns how many bytes were written.
    ///
    /// # Errors
    /// EBADF for a file that is not open for writing, and as [`Handle::write`].
    pub fn write(&self, fh: Fh, offset: Bytes, bytes: &[u8]) -> Result<usize> {
        let (handle, writer) = self.open_for_writing(fh)?;
        handle.write(&*writer, offset, bytes)
    }

    /// Makes a range of an open file read as zeros.
    ///
    /// # Errors
    /// As [`FileSystem::write`], and ENOSPC for a range past the end if `may_exceed` is not set.
    pub fn make_zero(&self, fh: Fh, range: Range<Bytes>, may_exceed: bool) -> Result<()> {
        let (handle, writer) = self.open_for_writing(fh)?;
        if !may_exceed && range.end > handle.export().len()? {
            return Err(Error::from_errno(libc::ENOSPC));
        }
        handle.make_zero(&*writer, range)
    }

    /// Sets the length of a file. The length of a device does not change: 0 means that all of it is to read as zeros, as a
    /// program expects that writes only the data into a file that it has emptied. Its length is accepted, and changes nothing.
    ///
    /// # Errors
    /// EPERM for any other length, and as [`FileSystem::write`].
    pub fn truncate(&self, ino: Ino, len: Bytes) -> Result<Attributes> {
        let target = self.catalog.find(&self.nodes.path(ino)?)?;
        let handle = match self.handle_of(ino) {
            Some(handle) => handle,
            None => {
                Arc::new(Handle::for_attributes(self.open_target(&target, Wanted::Contents)?, self.context.clone()))
            }
        };
        let now = handle.export().len()?;
        if len != Bytes::ZERO && len != now {
            let error = Error::failed(format!("its length is {now}, and cannot be set to {len}"));
            return Err(error.on(handle.export().name()).with_errno(libc::EPERM));
        }
        let writer = self.begin_writing(&handle)?;
        let zeroed = if len == now { Ok(()) } else { handle.make_zero(&*writer, Bytes::ZERO..now) };
        self.end_writing(&handle, writer);
        zeroed?;
        self.getattr(ino)
    }

    /// Returns when all completed writes to an open file survive a loss of power.
    ///
    /// # Errors
    /// As fsync(2).
    pub fn fsync(&self, fh: Fh) -> Result<()> {
        match self.open.writer(fh) {
            Some(writer) => self.handle(fh)?.flush(&*writer),
            None => Ok(()),
        }
    }

    /// Copies from one open file to another one, holes as zeros. Returns how many bytes were copied, which may be fewer.
    ///
    /// # Errors
    /// As read(2), and as [`FileSystem::write`].
    pub fn copy_range(&self, from: (Fh, Bytes), to: (Fh, Bytes), len: Bytes) -> Result<Bytes> {
        let source = self.handle(from.0)?;
        let (target, writer) = self.open_for_writing(to.0)?;
        let left = source.export().len()?.saturating_sub(from.1);
        let room = target.export().len()?.saturating_sub(to.1);
        let len = len.min(left).min(COPY_AT_ONCE);
        if len > Bytes::ZERO && room == Bytes::ZERO {
            return Err(Error::from_errno(libc::ENOSPC));
        }
        let end = from.1.saturating_add(len.min(room));
        let at_target = |at: Bytes| to.1.saturating_add(at.saturating_sub(from.1));
        let mut buffer = AlignedBuffer::new();
        let mut at = from.1;
        while at < end {
            for (start, extent) in source.extents(at..end)? {
                at = extent.end;
                if extent.kind.is_hole() {
                    target.make_zero(&*writer, at_target(start)..at_target(extent.end))?;
                    continue;
                }
                let mut piece = start;
                while piece < extent.end {
                    let size = extent.end.saturating_sub(piece).get().min(COPY_PIECE);
                    let bytes = source.read(&mut buffer, piece, usize::try_from(size).unwrap_or(0))?;
                    if bytes.is_empty() {
                        return Ok(piece.saturating_sub(from.1));
                    }
                    let count = target.write(&*writer, at_target(piece), bytes)?;
                    piece = piece.saturating_add(Bytes::new(count as u64));
                }
            }
        }
        Ok(end.saturating_sub(from.1))
    }

    /// Whether a file has opens for reading, for which the kernel may have pages of it.
    pub fn has_readers(&self, ino: Ino) -> bool {
        self.open.has_readers(ino)
    }

    /// The inode of an open file.
    pub fn ino(&self, fh: Fh) -> Option<Ino> {
        self.open.ino(fh)
    }

    fn open_for_writing(&self, fh: Fh) -> Result<(Arc<Handle>, Arc<dyn Writer>)> {
        let writer = self.open.writer(fh).ok_or_else(|| Error::from_errno(libc::EBADF))?;
        Ok((self.handle(fh)?, writer))
    }
}
