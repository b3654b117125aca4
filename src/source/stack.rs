//! A device and all devices below it: the description that resolving gives, and the extents that loading it gives.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::map::{Either, HoleMap, WrittenRanges};
use crate::reason::DenseReason;
use crate::source::device::BlockDevice;
use crate::source::file::{self, Reads};
use crate::source::stored::StoredExtents;
use crate::source::{Context, Guard, Layer, Resolver, StackTrace, Trace, dense};
use crate::sys::block;
use crate::sys::file::write_through;
use crate::sys::sysfs::SuspendFile;
use crate::units::Bytes;

/// The description of a device: its layers, down to the sources of its extents, and what guards them.
///
/// Making one reads tables, attributes and status lines, and no metadata of unbounded size. [`Stack::load`] does that.
pub struct Stack {
    /// The device itself; the layers below it hang on it.
    pub top: Arc<Layer>,
    pub(super) guards: Vec<Box<dyn Guard>>,
    /// From the bottom up.
    pub(super) dirty: Vec<Dirty>,
    pub(super) suspendable: Vec<SuspendFile>,
    pub(in crate::source) stored: Vec<Arc<StoredExtents>>,
    /// The ranges of writes of this process that the extents follow.
    pub(super) written: Vec<Arc<WrittenRanges>>,
}

/// Something with a page cache that may hold writes which the layers below it have not received.
pub(super) enum Dirty {
    Device(Arc<File>),
    File(File),
}

impl Dirty {
    fn write_back(&self) -> io::Result<()> {
        match self {
            Self::Device(device) => block::write_back(device),
            Self::File(file) => write_through(file),
        }
    }
}

/// The extents of a device after loading. A question about them does no I/O, except where a source is asked live (a
/// file, a SCSI disk, an NBD server).
///
/// How long they are valid is a matter of the [`Stack`] that they were loaded from: [`Stack::extents_hold`].
pub struct Loaded {
    map: Arc<dyn HoleMap>,
    /// The memory that the extents take.
    pub memory: Bytes,
    /// Why all of the device is data, if it is.
    pub dense_because: Option<DenseReason>,
    /// Whether some metadata could not be read in this moment, and may be readable later without any change of the
    /// stack.
    pub is_temporary: bool,
}

impl Loaded {
    /// The extents.
    pub fn map(&self) -> &dyn HoleMap {
        &*self.map
    }
}

impl Stack {
    /// Resolves an open block device.
    pub fn of_device(device: &BlockDevice, context: &Context) -> Self {
        Self::build(context, |resolver| resolver.opened(device))
    }

    /// Resolves an open regular file that is read so.
    pub fn of_file(file: &File, path: &Path, len: Bytes, reads: Reads, context: &Context) -> Self {
        Self::build(context, |resolver| Arc::new(file::layer(file, path, len, reads, resolver)))
    }

    /// Resolves anything: `top` gives the top layer. It takes the layers below from the resolver, and adds a guard for its
    /// own length if that can change.
    pub fn build(context: &Context, top: impl FnOnce(&mut Resolver<'_>) -> Arc<Layer>) -> Self {
        let mut resolver = Resolver::new(context);
        let top = top(&mut resolver);
        resolver.finish(top)
    }

    /// The same stack below a layer that is all data for that reason.
    #[must_use]
    pub fn shown_as_data(self, reason: impl Into<DenseReason>) -> Self {
        let below = self.top;
        let top = dense::layer(below.name.clone(), below.kind.clone(), below.len(), reason);
        Self { top: Arc::new(Layer { below: vec![below], ..top }), stored: Vec::new(), written: Vec::new(), ..self }
    }

    /// The same device whose free space reads as zeros: the holes of `free` are free space of a file system of that kind, as
    /// long as `guard` is unchanged.
    #[must_use]
    pub fn without_free_space(mut self, kind: &str, free: Arc<dyn HoleMap>, guard: impl Guard + 'static) -> Self {
        let below = self.top;
        let map = Either { zeroed: free, device: below.map.clone() };
        self.guards.push(Box::new(guard));
        let top = Layer {
            name: below.name.clone(),
            kind: format!("used space of {kind}"),
            holes_from: format!("the free space of {kind}, and the device"),
            map: Arc::new(map),
            device: None,
            below: vec![below],
        };
        Self { top: Arc::new(top), ..self }
    }

    /// The guards of the stack, without its extents: they take no memory.
    #[must_use]
    pub fn without_extents(self) -> Self {
        const DROPPED: &str = "its extents were dropped";
        let top = dense::layer(self.top.name.clone(), self.top.kind.clone(), self.top.len(), DROPPED);
        Self { top: Arc::new(top), stored: Vec::new(), written: Vec::new(), ..self }
    }

    /// The length of the device.
    pub fn len(&self) -> Bytes {
        self.top.len()
    }

    /// Whether the device has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.top.is_empty()
    }

    /// Reads the metadata that the extents of the stack are stored in.
    ///
    /// What cannot be read is data, and the result has the reason.
    pub fn load(&self) -> Loaded {
        let failures: Vec<&DenseReason> = self.stored.iter().filter_map(|stored| stored.load().err()).collect();
        Loaded {
            map: self.top.map.clone(),
            memory: self.top.map.memory(),
            dense_because: self.top.map.dense_because(),
            is_temporary: failures.iter().any(|failure| failure.is_temporary()),
        }
    }

    /// Bytes that are data, where that is known without loading.
    pub fn allocated(&self) -> Option<Bytes> {
        self.top.map.allocated()
    }

    /// Whether there is a hole of 4096 bytes or more, where that is known without loading.
    pub fn is_sparse(&self) -> Option<bool> {
        self.top.map.is_sparse()
    }

    /// Whether nothing happened to any layer since the stack was resolved.
    pub fn unchanged(&self) -> bool {
        self.guards.iter().all(|guard| guard.unchanged())
    }

    /// Whether the extents of the stack hold: nothing happened to any layer since the stack was resolved, except writes of this
    /// process that the extents follow. With `inside` it is asked for an answer that holds whatever the lengths of the devices
    /// are now.
    pub fn extents_hold(&self, inside: bool) -> bool {
        self.guards.iter().all(|guard| inside && guard.is_of_length() || guard.unchanged_but_followed())
    }

    /// The memory of the ranges of own writes that the extents follow. It is a part of the memory of the extents.
    pub fn written_memory(&self) -> Bytes {
        self.written.iter().fold(Bytes::ZERO, |sum, ranges| sum.saturating_add(ranges.memory()))
    }

    /// Whether [`Stack::unchanged`] notices each change of the extents. It does not where a source is queried at each question.
    pub fn is_guarded(&self) -> bool {
        self.top.map.is_guarded()
    }

    /// Whether every layer is still built as it was; what is stored may have changed.
    pub fn same_shape(&self) -> bool {
        self.guards.iter().all(|guard| guard.is_of_content() || guard.unchanged())
    }

    /// A state that changes when a layer is built otherwise, or a file at the bottom was written.
    pub fn trace(&self) -> StackTrace {
        let mut trace = Trace::new();
        self.guards.iter().for_each(|guard| guard.trace(&mut trace));
        trace.finish()
    }

    /// The files at the bottom, which can be written past the devices above them.
    pub fn files(&self) -> impl Iterator<Item = &File> {
        self.guards.iter().filter_map(|guard| guard.file())
    }

    /// Writes back the dirty pages of every layer, from the top down: only then have the layers below received a write.
    ///
    /// Returns whether all of it was written. A suspended device is not waited for, and gives `false`.
    pub fn write_back(&self) -> bool {
        // A device that is suspended between this look and the write still blocks until its resume; LVM keeps that to
        // milliseconds, and a read would wait for it all the same.
        !self.suspended() && self.dirty.iter().rev().all(|dirty| dirty.write_back().is_ok())
    }

    /// Whether a device-mapper device of the stack is suspended, so that reads and writes wait for its resume.
    pub fn suspended(&self) -> bool {
        self.suspendable.iter().any(SuspendFile::is_suspended)
    }
}
