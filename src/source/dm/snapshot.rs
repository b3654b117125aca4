//! A snapshot with a persistent store: chunks with an exception are data, the others are the origin's.
//!
//! The store of a live snapshot is read while the kernel may write it. What makes the answer certain is the status: it
//! tells how much of the store is allocated, and an exception is allocated before anything of it is done. If as many
//! exceptions are listed as are allocated, the list is complete; and as long as what is allocated stays the same, every
//! other chunk is read from the origin. That holds for one life of the target: a table that is loaded anew may find
//! another store, with as many exceptions.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use super::exceptions::{self, Layout};
use super::params::{self, Place, Store};
use super::segment::{Asked, Known, Segment, all_of_it};
use crate::error::plain;
use crate::map::{Block, Extent, ExtentKind as Kind, FillBuilder, FillMap, HoleMap, Overlay};
use crate::source::{Guard, Resolver};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::device;
use crate::sys::sysfs::SuspendFile;
use crate::units::{Bytes, Sectors};

/// The layer of a snapshot.
pub fn layer(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    asked.at_start()?;
    let snapshot = asked.params(params::snapshot)?;
    if snapshot.store == Store::Transient {
        return Err("its exceptions are in the kernel's memory only (store N)".to_owned());
    }
    asked.guard_metadata(resolver)?;
    let status = asked.guarded_status(all_of_it, resolver)?;
    let allocated = params::allocated(&status).ok_or_else(|| format!("the snapshot is not valid: {status}"))?;
    let layout = Layout::new(snapshot.chunk).ok_or("the size of its chunks is out of range")?;
    let Some(count) = layout.exceptions(allocated) else {
        return Err(format!("what its store has allocated is not understood: {status}"));
    };
    // The kernel writes the store past the page cache.
    let (cow, _) = device::open_id(snapshot.cow, true)
        .map_err(|error| format!("cannot open its store {}: {}", snapshot.cow, plain(&error)))?;
    let unknown = |error| format!("cannot tell whether its store is suspended: {}", plain(&error));
    resolver.waits_on(snapshot.cow).map_err(unknown)?;
    let suspended = SuspendFile::open(snapshot.cow).map_err(unknown)?;
    let store = Arc::new(StoreMap { cow, suspended, layout, count, len: asked.len, read: OnceLock::new() });
    resolver.guard(Incomplete(store.clone()));
    let origin = Place { device: snapshot.origin, start: Sectors::new(0) };
    let (below, clip) = asked.window(origin, resolver)?;
    let overlay = Overlay { layers: vec![store, Arc::new(clip)], len: asked.len };
    Ok(Segment::new("the origin, where the store has no exception", overlay, vec![below]))
}

/// The chunks with an exception as data, and the rest as holes. Read when it is first asked.
struct StoreMap {
    cow: File,
    suspended: Option<SuspendFile>,
    layout: Layout,
    count: u64,
    len: Bytes,
    read: OnceLock<Result<FillMap, String>>,
}

impl StoreMap {
    fn exceptions(&self) -> &Result<FillMap, String> {
        self.read.get_or_init(|| self.read())
    }

    fn read(&self) -> Result<FillMap, String> {
        if self.suspended.as_ref().is_some_and(SuspendFile::is_suspended) {
            return Err("its store is suspended".to_owned());
        }
        let mut buffer = AlignedBuffer::new();
        if !self.layout.is_header(self.chunk(Bytes::ZERO, &mut buffer)?) {
            return Err("its store has no valid header".to_owned());
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
            return Err(format!("its store lists {found} exceptions and has allocated {}", self.count));
        }
        builder.finish().ok_or_else(|| "it has more exceptions than fit into memory".to_owned())
    }

    /// Reads a chunk of the store.
    fn chunk<'a>(&self, at: Bytes, buffer: &'a mut AlignedBuffer) -> Result<&'a [u8], String> {
        let len = usize::try_from(self.layout.chunk().get()).map_err(|_| "the size of its chunks is out of range")?;
        let read = self.cow.read_exact_at(buffer.resize(len), at.get());
        read.map_err(|error| format!("cannot read its store at byte {at}: {}", plain(&error)))?;
        Ok(buffer.bytes())
    }
}

impl HoleMap for StoreMap {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        match self.exceptions() {
            Ok(exceptions) => exceptions.extent_at(offset),
            Err(_) if offset < self.len => Extent { end: self.len, kind: Kind::Data },
            Err(_) => Extent::outside(offset),
        }
    }

    fn allocated(&self) -> Option<Bytes> {
        self.read.get()?.as_ref().ok()?.allocated()
    }

    fn dense_because(&self) -> Option<String> {
        self.read.get()?.as_ref().err().cloned()
    }

    fn memory(&self) -> Bytes {
        self.read.get().and_then(|read| read.as_ref().ok()).map_or(Bytes::ZERO, HoleMap::memory)
    }
}

/// Has a store that could not be read to its end read again. An exception that was being made then becomes complete
/// without a change of the status.
struct Incomplete(Arc<StoreMap>);

impl Guard for Incomplete {
    fn unchanged(&self) -> bool {
        !matches!(self.0.read.get(), Some(Err(_)))
    }

    fn is_of_content(&self) -> bool {
        true
    }
}
