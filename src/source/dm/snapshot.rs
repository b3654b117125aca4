//! A snapshot with a persistent store: chunks with an exception are data, the others have the holes of the origin.
//!
//! The store of a live snapshot is read while the kernel may write it. The status proves that the list is complete: it
//! reports how much of the store is allocated, and the kernel allocates an exception before it does anything else for
//! it. If the number of exceptions in the list is the number of allocated ones, the list is complete. As long as the
//! allocated size stays the same, every other chunk is read from the origin. This holds until the table is reloaded: a
//! new table may have another store with the same number of exceptions.

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::exceptions::{self, Area, StoreLayout};
use super::lower::whole_status;
use super::params::{self, Place, SnapshotParams, Store};
use crate::error::plain;
use crate::map::{Block, FillBuilder, FillMap, Overlay};
use crate::reason::DenseReason;
use crate::source::target::{TargetContext, TargetLayer};
use crate::source::{LoadExtents, Resolver};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::device;
use crate::sys::sysfs::SuspendFile;
use crate::units::Bytes;

/// A snapshot (`drivers/md/dm-snap.c`).
pub fn layer(context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    context.require_first()?;
    let snapshot = context.params(params::snapshot)?;
    let layout = layout(&snapshot)?;
    context.guard_reload(resolver);
    let status = context.guarded_status(whole_status, resolver)?;
    let allocated = Allocated::new(layout, status)?;
    let unknown = |error| DenseReason::cannot("find out whether its store is suspended", &error);
    resolver.waits_on(snapshot.cow).map_err(unknown)?;
    let store = SnapshotStore::open(&snapshot)?;
    let store = ExceptionStore { store, count: allocated.count, len: context.len };
    let store = resolver.stored(context.len, layout.chunk(), None, store);
    let (below, clip) = context.window(Place::start_of(snapshot.origin), resolver)?;
    let overlay = Overlay { layers: vec![store, Arc::new(clip)], len: context.len };
    Ok(TargetLayer::new("the origin, where the store has no exception", overlay, vec![below]))
}

/// The layout of the store of a snapshot.
fn layout(snapshot: &SnapshotParams) -> Result<StoreLayout, DenseReason> {
    if snapshot.store == Store::Transient {
        return Err("its exceptions are in the kernel's memory only (store N)".into());
    }
    StoreLayout::new(snapshot.chunk).ok_or_else(|| "the size of its chunks is out of range".into())
}

/// How much of a store was allocated at the time of a status line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocated {
    /// The number of exceptions.
    pub count: u64,
    /// The first chunk of the store that was not allocated: the chunks of all these exceptions lie before it.
    end: u64,
}

impl Allocated {
    /// What the status of a snapshot says.
    ///
    /// # Errors
    /// When the snapshot is not valid, or no number of exceptions has that size.
    fn new(layout: StoreLayout, status: String) -> Result<Self, DenseReason> {
        let Some(allocated) = params::allocated(&status) else {
            return Err(DenseReason::State(format!("the snapshot is not valid: {status}").into()));
        };
        match layout.exceptions(allocated).zip(allocated.bytes()) {
            Some((count, bytes)) => Ok(Self { count, end: bytes.get() / layout.chunk().get() }),
            None => Err(DenseReason::NotUnderstood { what: "the allocated size of its store is".into(), text: status }),
        }
    }
}

/// The open store of a snapshot.
pub struct SnapshotStore {
    cow: File,
    suspended: Option<SuspendFile>,
    layout: StoreLayout,
}

impl SnapshotStore {
    /// Opens the store of a snapshot.
    ///
    /// # Errors
    /// When it is not persistent, has chunks of a size that is not supported, or cannot be opened.
    pub fn open(snapshot: &SnapshotParams) -> Result<Self, DenseReason> {
        let layout = layout(snapshot)?;
        // Direct I/O, because the kernel writes the store past its page cache.
        let (cow, _) = device::open_id(snapshot.cow, true)
            .map_err(|error| DenseReason::cannot(format!("open its store {}", snapshot.cow), &error))?;
        let unknown = |error| DenseReason::cannot("find out whether its store is suspended", &error);
        let suspended = SuspendFile::open(snapshot.cow).map_err(unknown)?;
        Ok(Self { cow, suspended, layout })
    }

    /// The length of a chunk.
    pub fn chunk_len(&self) -> Bytes {
        self.layout.chunk()
    }

    /// What the status of the snapshot says of this store.
    ///
    /// # Errors
    /// When the snapshot is not valid.
    pub fn allocated(&self, status: String) -> Result<Allocated, DenseReason> {
        Allocated::new(self.layout, status)
    }

    /// Calls `each` for the chunk of every exception that was `allocated`, and perhaps for those of later ones.
    ///
    /// # Errors
    /// When the list cannot be read, or lacks some of them. They are added to it as soon as they are complete.
    pub fn exceptions(&self, allocated: Allocated, mut each: impl FnMut(Block)) -> Result<(), Cow<'static, str>> {
        let mut found = 0_u64;
        self.areas(|area| {
            for exception in &area.exceptions {
                found += u64::from(exception.stored < allocated.end);
                each(exception.chunk);
            }
            found < allocated.count
        })?;
        if found != allocated.count {
            return Err(format!("its store lists {found} exceptions and has allocated {}", allocated.count).into());
        }
        Ok(())
    }

    /// Calls `each` for one area after the other, up to the end of the list or until it returns `false`.
    fn areas(&self, mut each: impl FnMut(&Area) -> bool) -> Result<(), Cow<'static, str>> {
        if self.suspended.as_ref().is_some_and(SuspendFile::is_suspended) {
            return Err("its store is suspended".into());
        }
        let mut buffer = AlignedBuffer::new();
        if !self.layout.is_header(self.chunk(Bytes::ZERO, &mut buffer)?) {
            return Err("its store has no valid header".into());
        }
        for index in 0.. {
            let at = self.layout.area(index).ok_or("its store is out of range")?;
            let area = exceptions::area(self.chunk(at, &mut buffer)?);
            if !each(&area) || !area.is_full {
                break;
            }
        }
        Ok(())
    }

    /// Reads a chunk of the store.
    fn chunk<'a>(&self, at: Bytes, buffer: &'a mut AlignedBuffer) -> Result<&'a [u8], Cow<'static, str>> {
        let len = usize::try_from(self.layout.chunk().get()).map_err(|_| "the size of its chunks is out of range")?;
        let read = self.cow.read_exact_at(buffer.resize(len), at.get());
        read.map_err(|error| format!("cannot read its store at byte {at}: {}", plain(&error)))?;
        Ok(buffer.bytes())
    }
}

/// The exceptions of a snapshot. Loading them gives the chunks with an exception as data, and the others as holes.
struct ExceptionStore {
    store: SnapshotStore,
    count: u64,
    len: Bytes,
}

impl LoadExtents for ExceptionStore {
    /// Each failure is temporary: an exception that is being made becomes complete without a change of the status.
    fn load(&self) -> Result<FillMap, DenseReason> {
        self.read().map_err(DenseReason::NotNow)
    }
}

impl ExceptionStore {
    fn read(&self) -> Result<FillMap, Cow<'static, str>> {
        let builder = FillBuilder::new(self.len, self.store.chunk_len());
        let mut filler = builder.filler();
        let mut found = 0_u64;
        self.store.areas(|area| {
            for exception in &area.exceptions {
                let chunk = exception.chunk;
                filler.set_range(chunk..Block::new(chunk.get().saturating_add(1)));
            }
            found = found.saturating_add(u64::try_from(area.exceptions.len()).unwrap_or(u64::MAX));
            found <= self.count
        })?;
        drop(filler);
        if found != self.count {
            return Err(format!("its store lists {found} exceptions and has allocated {}", self.count).into());
        }
        builder.finish().ok_or_else(|| "it has more exceptions than fit into memory".into())
    }
}
