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

use super::exceptions::{self, StoreLayout};
use super::lower::whole_status;
use super::params::{self, Place, Store};
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
    if snapshot.store == Store::Transient {
        return Err("its exceptions are in the kernel's memory only (store N)".into());
    }
    context.guard_reload(resolver);
    let status = context.guarded_status(whole_status, resolver)?;
    let invalid = || DenseReason::State(format!("the snapshot is not valid: {status}").into());
    let allocated = params::allocated(&status).ok_or_else(invalid)?;
    let layout = StoreLayout::new(snapshot.chunk).ok_or("the size of its chunks is out of range")?;
    let Some(count) = layout.exceptions(allocated) else {
        return Err(DenseReason::NotUnderstood { what: "the allocated size of its store is".into(), text: status });
    };
    // Direct I/O, because the kernel writes the store past its page cache.
    let (cow, _) = device::open_id(snapshot.cow, true)
        .map_err(|error| DenseReason::cannot(format!("open its store {}", snapshot.cow), &error))?;
    let unknown = |error| DenseReason::cannot("find out whether its store is suspended", &error);
    resolver.waits_on(snapshot.cow).map_err(unknown)?;
    let suspended = SuspendFile::open(snapshot.cow).map_err(unknown)?;
    let store = ExceptionStore { cow, suspended, layout, count, len: context.len };
    let store = resolver.stored(context.len, layout.chunk(), None, store);
    let (below, clip) = context.window(Place::start_of(snapshot.origin), resolver)?;
    let overlay = Overlay { layers: vec![store, Arc::new(clip)], len: context.len };
    Ok(TargetLayer::new("the origin, where the store has no exception", overlay, vec![below]))
}

/// The store of a snapshot. Loading it gives the chunks with an exception as data, and the others as holes.
struct ExceptionStore {
    cow: File,
    suspended: Option<SuspendFile>,
    layout: StoreLayout,
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
        if self.suspended.as_ref().is_some_and(SuspendFile::is_suspended) {
            return Err("its store is suspended".into());
        }
        let mut buffer = AlignedBuffer::new();
        if !self.layout.is_header(self.chunk(Bytes::ZERO, &mut buffer)?) {
            return Err("its store has no valid header".into());
        }
        let builder = FillBuilder::new(self.len, self.layout.chunk());
        let mut filler = builder.filler();
        let mut found = 0_u64;
        for index in 0.. {
            let at = self.layout.area(index).ok_or("its store is out of range")?;
            let area = exceptions::area(self.chunk(at, &mut buffer)?);
            for chunk in &area.chunks {
                filler.set_range(*chunk..Block::new(chunk.get().saturating_add(1)));
            }
            found = found.saturating_add(u64::try_from(area.chunks.len()).unwrap_or(u64::MAX));
            if !area.is_full || found > self.count {
                break;
            }
        }
        drop(filler);
        if found != self.count {
            return Err(format!("its store lists {found} exceptions and has allocated {}", self.count).into());
        }
        builder.finish().ok_or_else(|| "it has more exceptions than fit into memory".into())
    }

    /// Reads a chunk of the store.
    fn chunk<'a>(&self, at: Bytes, buffer: &'a mut AlignedBuffer) -> Result<&'a [u8], Cow<'static, str>> {
        let len = usize::try_from(self.layout.chunk().get()).map_err(|_| "the size of its chunks is out of range")?;
        let read = self.cow.read_exact_at(buffer.resize(len), at.get());
        read.map_err(|error| format!("cannot read its store at byte {at}: {}", plain(&error)))?;
        Ok(buffer.bytes())
    }
}
