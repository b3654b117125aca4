//! A device with the free space of its file system as holes.
//!
//! The bytes of a range that the file system does not use are not those of the device: they read as zeros. So this is no
//! forensic image: deleted files are gone in it.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::warn;

use super::claim::Claim;
use super::{Wanted, named};
use crate::error::{Error, Result, shown};
use crate::export::{Export, FileIdentity, HostNode};
use crate::filesystem::ReadBytes;
use crate::filesystem::detect::{self, UsedSpace};
use crate::map::view;
use crate::reason::DenseReason;
use crate::source::{Context, Guard, Stack};
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// The used space of a device.
pub(super) struct UsedExport {
    name: PathBuf,
    base: Arc<dyn Export>,
    identity: FileIdentity,
    /// `None` for an answer that must not take long: all is data.
    claim: Option<Arc<Claim>>,
    space: std::result::Result<UsedSpace, DenseReason>,
}

impl UsedExport {
    /// Reads the metadata of the file system on a device. For the contents it takes the device for itself first.
    ///
    /// # Errors
    /// When the device is mounted or in use otherwise, is gone, or changed while it was read.
    pub(super) fn open(
        base: Arc<dyn Export>,
        identity: FileIdentity,
        wanted: Wanted,
        context: &Context,
    ) -> Result<Self> {
        let claim = Claim::new(&*base, wanted, context)?;
        let space = detect::used_space(&Bare { export: &*base, len: base.len()? });
        if !claim.holds() {
            return Err(Error::failed("was written while its file system was read").on(base.name()));
        }
        if let Err(reason) = &space
            && wanted == Wanted::Contents
        {
            warn!("{}: all of it is data in the view of the used space: {reason}", shown(base.name()));
        }
        Ok(Self { name: named(&*base, ".used"), base, identity, claim: Some(Arc::new(claim)), space })
    }

    /// The device without any free space.
    pub(super) fn dense(base: Arc<dyn Export>, identity: FileIdentity) -> Self {
        let space = Err(DenseReason::NotNow("its file system was not read yet".into()));
        Self { name: named(&*base, ".used"), base, identity, claim: None, space }
    }

    /// The extents of `range` that are not free.
    fn used(&self, range: Range<Bytes>) -> Vec<Range<Bytes>> {
        let Ok(space) = &self.space else { return vec![range] };
        let runs = view::runs(&*space.map, self.base.align(), range);
        runs.filter(|(_, run)| run.kind.is_data()).map(|(start, run)| start..run.end).collect()
    }
}

/// The kind of file system; for a disk, the kind of each partition, or why it is data.
fn described(space: &UsedSpace) -> String {
    let part = |(name, kind): &(String, std::result::Result<&str, DenseReason>)| match kind {
        Ok(kind) => format!("{name}: {kind}"),
        Err(reason) => format!("{name}: data, since {reason}"),
    };
    match space.parts.as_slice() {
        [] => space.kind.to_owned(),
        parts => format!("{} ({})", space.kind, parts.iter().map(part).collect::<Vec<_>>().join("; ")),
    }
}

impl Export for UsedExport {
    fn name(&self) -> &Path {
        &self.name
    }

    fn size(&self) -> io::Result<Bytes> {
        self.base.size()
    }

    fn align(&self) -> Bytes {
        self.base.align()
    }

    fn read_at(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
        let end = offset.saturating_add(Bytes::new(size as u64));
        let used = self.used(offset..end);
        let result = match (used.first(), used.last()) {
            (Some(first), Some(last)) if first.start == offset && last.end == end && used.len() == 1 => {
                self.base.read_at(buffer, offset, size)?
            }
            (Some(first), Some(last)) => {
                // One read from the first used byte to the last, without the free space in between.
                let mut own = AlignedBuffer::new();
                let (start, length) = (first.start, last.end.index_from(first.start));
                let range = self.base.read_at(&mut own, start, length)?;
                if range.len() < length {
                    return Err(io::Error::from_raw_os_error(libc::EIO));
                }
                let read = &own.bytes()[range];
                let bytes = buffer.resize(size);
                bytes.fill(0);
                for part in &used {
                    let from = &read[part.start.index_from(start)..part.end.index_from(start)];
                    bytes[part.start.index_from(offset)..part.end.index_from(offset)].copy_from_slice(from);
                }
                0..size
            }
            _ => {
                buffer.resize(size).fill(0);
                0..size
            }
        };
        // After the read: a write before it would have been seen.
        if self.claim.as_ref().is_some_and(|claim| !claim.holds()) {
            return Err(io::Error::other("the device was written since the view of its used space was opened"));
        }
        Ok(result)
    }

    fn resolve(&self, context: &Context) -> Stack {
        let stack = self.base.stack(context);
        let (Ok(space), Some(claim)) = (&self.space, &self.claim) else {
            let reason = self.space.as_ref().err().cloned();
            return stack.shown_as_data(reason.unwrap_or_else(|| "its file system was not read".into()));
        };
        if stack.len() != space.map.len() {
            return stack.shown_as_data("its length changed since the view was opened");
        }
        stack.without_free_space(&described(space), space.map.clone(), ClaimGuard(claim.clone()))
    }

    fn host_node(&self) -> io::Result<HostNode> {
        Ok(HostNode { identity: Some(self.identity), ..self.base.host_node()? })
    }

    fn identity(&self) -> Option<FileIdentity> {
        Some(self.identity)
    }

    fn base(&self) -> Option<&Arc<dyn Export>> {
        Some(&self.base)
    }

    fn is_current(&self) -> bool {
        super::is_at_its_path(&*self.base) && self.claim.as_ref().is_some_and(|claim| claim.holds())
    }
}

/// The free space is valid only as long as nobody writes to the device.
struct ClaimGuard(Arc<Claim>);

impl Guard for ClaimGuard {
    fn unchanged(&self) -> bool {
        self.0.holds()
    }
}

/// The bytes of an export, for the parsers of file systems.
struct Bare<'a> {
    export: &'a dyn Export,
    len: Bytes,
}

impl ReadBytes for Bare<'_> {
    fn len(&self) -> Bytes {
        self.len
    }

    fn read_exact(&self, offset: Bytes, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(Bytes::new(buffer.len() as u64));
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut own = AlignedBuffer::new();
        let range = self.export.read_at(&mut own, offset, buffer.len())?;
        let bytes = own.bytes().get(range).filter(|bytes| bytes.len() == buffer.len());
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Whether there is a file system on a device whose free space can be found, by its magic numbers.
pub fn has_known_file_system(export: &dyn Export) -> bool {
    export.len().is_ok_and(|len| detect::recognise(&Bare { export, len }).is_some())
}
