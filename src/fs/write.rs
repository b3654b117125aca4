//! Opening files for writing, and the requests that change them.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use log::error;

use super::{Access, Attributes, Fh, FileSystem, Ino};
use crate::deadline;
use crate::error::{Error, Result};
use crate::export::{Export, FileIdentity, Writer, open_error};
use crate::handle::Handle;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// The size of the reads and writes of a copy inside the mount.
const COPY_PIECE: u64 = 1 << 20;

/// How much one request copies at most. copy_file_range(2) then returns that many bytes, and a program calls it again for the rest.
const COPY_AT_ONCE: Bytes = Bytes::new(64 << 20);

/// The writers of all devices that are open for writing. A device has one, which all of its opens share, by whatever name. After one
/// that has ended while it was open, later opens share another one.
#[derive(Default)]
pub(super) struct Writers(Mutex<Vec<OpenWriter>>);

/// The writer of a device, with the identity of the device. It exists as long as an open file has it.
type OpenWriter = (Option<FileIdentity>, Weak<dyn Writer>);

/// The writer of the last opens of a device.
fn shared(writers: &[OpenWriter], identity: Option<FileIdentity>) -> Option<Arc<dyn Writer>> {
    writers.iter().rev().filter(|(of, _)| *of == identity).find_map(|(_, writer)| writer.upgrade())
}

impl Writers {
    /// The writer of an open device: that of its other opens, or a new one.
    fn of(&self, export: &dyn Export) -> Result<Arc<dyn Writer>> {
        // Held while the device is claimed: two opens at the same time are one claim.
        let mut writers = self.lock();
        writers.retain(|(_, writer)| writer.strong_count() > 0);
        let identity = export.identity();
        if let Some(writer) = shared(&writers, identity).filter(|writer| !writer.has_ended()) {
            return Ok(writer);
        }
        let writer = export.writer().map_err(|cause| open_error(export, cause))?;
        writers.push((identity, Arc::downgrade(&writer)));
        Ok(writer)
    }

    /// The writer of an open device that its opens for writing share, if there are any.
    fn shared(&self, export: &dyn Export) -> Option<Arc<dyn Writer>> {
        shared(&self.lock(), export.identity())
    }

    /// Gives up one use of a writer. The last one flushes it, and ends the claim of the device before this returns, and before
    /// another open can make a new claim. Calls `failed` if the flush fails, before the writer is gone.
    fn end(&self, export: &dyn Export, writer: Arc<dyn Writer>, failed: impl FnOnce(Error)) {
        let mut writers = self.lock();
        if Arc::strong_count(&writer) == 1 {
            // Without the lock: it may take long. An open that comes now shares the writer.
            drop(writers);
            if let Err(cause) = writer.flush() {
                failed(Error::failed("cannot flush at the last close").on(export.name()).because(cause));
            }
            writers = self.lock();
        }
        drop(writer);
        drop(writers);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OpenWriter>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Drops the pages that the kernel keeps of a range of a file. Waits for those that are being read.
pub(super) type DropPages = Box<dyn Fn(Ino, Range<Bytes>) + Send + Sync>;

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

    /// Ends one open for writing. A client that has closed its file gets no error any more: that of a flush is for the next
    /// fsync(2) of the device.
    pub(super) fn end_writing(&self, handle: &Handle, writer: Arc<dyn Writer>) {
        let export = handle.export();
        // An fsync(2) that finds no writer any more finds the failure.
        self.writers.end(export, writer, |error| {
            error!("{error}");
            self.flush_failures.note_unreported(export.identity(), error.errno());
        });
    }

    /// Sets what drops the pages that the kernel keeps of a file: it is called after each change, before the reply to it.
    pub fn set_drop_pages(&self, drop_pages: impl Fn(Ino, Range<Bytes>) + Send + Sync + 'static) {
        // A file system has one session, so the cell is empty here.
        let _ = self.drop_pages.set(Box::new(drop_pages));
    }

    /// Drops everything that was read of a device before a change of `range`, by whatever name it is open. Called after the
    /// change, and before the reply to it.
    fn drop_old_bytes(&self, changed: &Handle, range: Range<Bytes>) {
        let identity = changed.export().identity();
        let same = |handle: &Handle| {
            std::ptr::eq(handle, changed) || identity.is_some() && handle.export().identity() == identity
        };
        let mut inodes = Vec::new();
        for (ino, device) in &self.lock_devices().by_ino {
            if same(&device.handle) {
                // What was fetched ahead is not used from here on. So the kernel gets no page of it after its pages are dropped.
                device.handle.begin_generation();
                inodes.push(*ino);
            }
        }
        let Some(drop_pages) = self.drop_pages.get() else { return };
        for ino in inodes {
            drop_pages(ino, range.clone());
        }
    }

    /// Writes to an open file, as far as it reaches. Returns how many bytes were written. With `is_durable` they survive a loss
    /// of power then.
    ///
    /// # Errors
    /// EBADF for a file that is not open for writing, and as [`Handle::write`] and [`FileSystem::fsync`].
    pub fn write(&self, fh: Fh, offset: Bytes, bytes: &[u8], is_durable: bool) -> Result<usize> {
        let (handle, writer) = self.open_for_writing(fh)?;
        let written = handle.write(&*writer, offset, bytes);
        let range = offset..offset.saturating_add(Bytes::new(bytes.len() as u64));
        self.end_change(fh, &handle, range, is_durable, written)
    }

    /// Ends a change of a range of an open file, before the reply to it: what was read of the range before is dropped, and a change
    /// that is to survive a loss of power (`is_durable`, or by the flags of the open) is flushed.
    fn end_change<T>(
        &self,
        fh: Fh,
        handle: &Handle,
        range: Range<Bytes>,
        is_durable: bool,
        changed: Result<T>,
    ) -> Result<T> {
        // After a failure, too: a part of the range may have changed.
        self.drop_old_bytes(handle, range);
        let changed = changed?;
        if is_durable || self.open.is_synchronous(fh) {
            self.fsync(fh)?;
        }
        Ok(changed)
    }

    /// Makes a range of an open file read as zeros.
    ///
    /// # Errors
    /// As [`FileSystem::write`], and ENOSPC for a range past the end if `may_exceed` is not set.
    pub fn make_zero(&self, fh: Fh, range: Range<Bytes>, may_exceed: bool) -> Result<()> {
        let (handle, writer) = self.open_for_writing(fh)?;
        if !may_exceed && range.end > handle.export().len()? {
            return Err(handle.past_end());
        }
        let zeroed = handle.make_zero(&*writer, range.clone());
        self.end_change(fh, &handle, range, false, zeroed)
    }

    /// Sets the length of a file, or of an open file `fh`. The length of a device does not change: 0 means that all of it is to read as
    /// zeros, as a program expects that writes only the data into a file that it has emptied. Its length is accepted, and changes
    /// nothing.
    ///
    /// # Errors
    /// EPERM for any other length, ESTALE when the name leads to another device, and as [`FileSystem::write`].
    pub fn truncate(&self, ino: Ino, fh: Option<Fh>, len: Bytes) -> Result<Attributes> {
        let Some(fh) = fh else {
            // An open like any other: the device is the one whose permissions the kernel has checked, and other opens share it.
            let fh = self.open(ino, Access::default())?;
            let truncated = self.truncate(ino, Some(fh), len);
            self.release(fh);
            return truncated;
        };
        let handle = self.handle(fh)?;
        let now = handle.export().len()?;
        if len != Bytes::ZERO && len != now {
            let error = Error::failed(format!("its length is {now}, and cannot be set to {len}"));
            return Err(error.on(handle.export().name()).with_errno(libc::EPERM));
        }
        let writer = self.open.writer(fh).map_or_else(|| self.begin_writing(&handle), Ok)?;
        let mut zeroed = Ok(());
        if len != now {
            zeroed = handle.make_zero(&*writer, Bytes::ZERO..now);
            self.drop_old_bytes(&handle, Bytes::ZERO..now);
        }
        self.end_writing(&handle, writer);
        zeroed?;
        // The truncation may have taken long.
        deadline::anew(|| self.getattr(ino))
    }

    /// Returns when all completed writes to the device of an open file survive a loss of power, whatever file they came by. The
    /// open file need not be one for writing: sync(1) opens files for reading.
    ///
    /// # Errors
    /// As fsync(2): also those of flushes that this open file has not reported yet.
    pub fn fsync(&self, fh: Fh) -> Result<()> {
        let handle = self.handle(fh)?;
        let export = handle.export();
        let flushed = match (self.open.writer(fh), self.writers.shared(export)) {
            (Some(writer), _) => handle.flush(&*writer),
            (None, Some(writer)) => {
                let flushed = handle.flush(&*writer);
                self.end_writing(&handle, writer);
                flushed
            }
            // The last close has flushed it.
            (None, None) => Ok(()),
        };
        match self.open.reported(fh) {
            Some(reported) => self
                .flush_failures
                .report(export.identity(), &reported, flushed)
                .map_err(|error| error.on(export.name())),
            None => flushed,
        }
    }

    /// Copies from one open file to another one, holes as zeros. Returns how many bytes were copied, which may be fewer.
    ///
    /// # Errors
    /// As read(2), and as [`FileSystem::write`].
    pub fn copy_range(&self, from: (Fh, Bytes), to: (Fh, Bytes), len: Bytes) -> Result<Bytes> {
        let source = self.handle(from.0)?;
        let (target, writer) = self.open_for_writing(to.0)?;
        let len = len.min(COPY_AT_ONCE);
        let copied = copy(&source, from.1, &target, &*writer, to.1, len);
        self.end_change(to.0, &target, to.1..to.1.saturating_add(len), false, copied)
    }

    fn open_for_writing(&self, fh: Fh) -> Result<(Arc<Handle>, Arc<dyn Writer>)> {
        let writer = self.open.writer(fh).ok_or_else(|| Error::from_errno(libc::EBADF))?;
        Ok((self.handle(fh)?, writer))
    }
}

/// Copies up to `len` bytes, holes as zeros. Returns how many were copied.
fn copy(source: &Handle, from: Bytes, target: &Handle, writer: &dyn Writer, to: Bytes, len: Bytes) -> Result<Bytes> {
    let len = len.min(source.export().len()?.saturating_sub(from));
    let room = target.export().len()?.saturating_sub(to);
    if len > Bytes::ZERO && room == Bytes::ZERO {
        return Err(target.past_end());
    }
    let end = from.saturating_add(len.min(room));
    let at_target = |at: Bytes| to.saturating_add(at.saturating_sub(from));
    let mut buffer = AlignedBuffer::new();
    let mut at = from;
    while at < end {
        for (start, extent) in deadline::anew(|| source.extents(at..end))? {
            at = extent.end;
            if extent.kind.is_hole() {
                deadline::anew(|| target.make_zero(writer, at_target(start)..at_target(extent.end)))?;
                continue;
            }
            let mut piece = start;
            while piece < extent.end {
                let size = extent.end.saturating_sub(piece).get().min(COPY_PIECE);
                let bytes = deadline::anew(|| source.read(&mut buffer, piece, usize::try_from(size).unwrap_or(0)))?;
                if bytes.is_empty() {
                    return Ok(piece.saturating_sub(from));
                }
                let count = deadline::anew(|| target.write(writer, at_target(piece), bytes))?;
                piece = piece.saturating_add(Bytes::new(count as u64));
            }
        }
    }
    Ok(end.saturating_sub(from))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::fs::{Limits, Ownership, ROOT};
    use crate::spec::{SourceOptions, Spec};

    /// The kernel has checked the permissions of one image, and its owner has put a link to another image in its place.
    #[test]
    fn what_was_not_checked_is_not_truncated() {
        let place = tempfile::tempdir().unwrap();
        let [shown, own, other] = ["shown", "own", "other"].map(|name| place.path().join(name));
        for (path, mode) in [(&own, 0o600), (&other, 0o400)] {
            fs::write(path, [7; 8192]).unwrap();
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        }
        let link_to = |target| {
            let _ = fs::remove_file(&shown);
            std::os::unix::fs::symlink(target, &shown).unwrap();
        };
        link_to(&own);
        let ownership = Ownership { uid: None, gid: None, mode: 0o777, is_writable: true };
        let spec = Spec::parse(shown.as_os_str()).unwrap();
        let fs = FileSystem::new(&spec, &SourceOptions::default(), ownership, Limits::default()).unwrap();
        let ino = fs.lookup(ROOT, OsStr::new("shown")).unwrap().ino;
        link_to(&other);
        let refused = fs.truncate(ino, None, Bytes::ZERO).map(drop).unwrap_err();
        assert_eq!(refused.errno(), libc::ESTALE, "{refused}");
        assert_eq!(std::fs::read(&other).unwrap(), [7; 8192]);
        link_to(&own);
        fs.truncate(ino, None, Bytes::ZERO).unwrap();
        assert_eq!(std::fs::read(&own).unwrap(), [0; 8192]);
    }
}
