//! The layer of a thin device: its map is read at the first question, and stands as long as nobody writes to the device.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use super::DataBlockSize;
use super::alone::AloneGuard;
use super::guard::WriteGuard;
use super::params::{self, Mapped, ThinTable};
use super::pool::{NoMap, Pool, Wanted};
use crate::error::plain;
use crate::map::{Clip, Concat, Extent, ExtentKind as Kind, FillMap, HoleMap, Overlay, Uniform};
use crate::source::dm::segment::{Asked, Known, Segment};
use crate::source::{Layer, Resolver};
use crate::sys::dm::{Commit, Control};
use crate::units::Bytes;

/// The segment of a device that is the target `thin`.
///
/// # Errors
/// Why it is dense.
pub fn segment(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    let table = asked.params(params::thin_table)?;
    let control = resolver.context.dm.control().ok_or("device-mapper does not answer")?;
    // Before anything is read of the device: a write from here on makes the map void.
    let again = Arc::new(AtomicBool::new(false));
    let guard = WriteGuard::new(asked.device, again.clone());
    resolver.guard(guard.map_err(|error| format!("cannot use its I/O counters: {}", plain(&error)))?);
    let guard = AloneGuard::new(control.clone(), asked.events, asked.device.id, table);
    let guard = guard.map_err(|error| format!("cannot look for its other devices: {}", plain(&error)))?;
    let alone = guard.alone();
    resolver.guard(guard);
    if !alone {
        return Err("the volume is active as another device too, or about to be".to_owned());
    }
    let mapped = mapped(&control, asked)?;
    let block = pool_block(&control, &table)?;
    // A write to the device may wait for its pool, and reading its map for the pool's metadata device: neither is tried
    // while one of them is suspended.
    let waits = resolver.waits_on(table.pool);
    waits.map_err(|error| format!("cannot tell whether its pool is suspended: {}", plain(&error)))?;
    let pool = Pool::new(control, table.pool, &resolver.context.thin);
    let wanted = Wanted { id: table.id, len: asked.len, mapped: mapped.sectors };
    let volume = Volume { pool, wanted, len: asked.len, block, mapped, map: OnceLock::new(), again };
    match table.origin.map(|origin| resolver.device(origin, asked.len)) {
        Some(origin) => over_origin(volume, origin),
        None => Ok(Segment::new("the mapping tree of its pool", volume, Vec::new())),
    }
}

/// How much of the device is mapped now, committed or not.
fn mapped(control: &Control, asked: &Asked<'_>) -> Result<Mapped, String> {
    let table = control.status(asked.device.id, Commit::No);
    let table = table.map_err(|error| format!("cannot read its status: {}", plain(&error)))?;
    let line = table.targets.iter().find(|line| line.start == asked.target.start);
    let line = line.map(|line| line.params.as_str()).unwrap_or_default();
    params::thin_status(line).ok_or_else(|| format!("its status is: {line}"))
}

fn pool_block(control: &Control, table: &ThinTable) -> Result<DataBlockSize, String> {
    let pool = control.table(table.pool).map_err(|error| format!("cannot read its pool's table: {}", plain(&error)))?;
    let params = pool.targets.first().map(|target| target.params.as_str()).unwrap_or_default();
    let pool = params::pool_table(params).ok_or_else(|| format!("its pool's table is not understood: {params}"))?;
    Ok(pool.block)
}

/// The volume over its external origin: a range is a hole where neither has data.
///
/// Behind its end an origin reads as zeros, but the end that counts is the one at the last resume of the volume
/// (`drivers/md/dm-thin.c: thin_preresume`), which the kernel does not show: reads behind the end of an origin that became
/// shorter since fail. So all that is behind the end of now is data.
fn over_origin(volume: Volume, origin: Arc<Layer>) -> Known {
    let len = volume.len;
    let shown = origin.len().min(len);
    let below = Clip { inner: origin.map.clone(), start: Bytes::ZERO, len: shown };
    let rest = Uniform { len: len.saturating_sub(shown), kind: Kind::Data };
    let below = Concat::new(vec![Arc::new(below), Arc::new(rest)]).ok_or("its length is out of range")?;
    let map = Overlay { layers: vec![Arc::new(volume), Arc::new(below)], len };
    Ok(Segment::new("the mapping tree of its pool, and its external origin", map, vec![origin]))
}

/// A thin device. Reading its tree waits for the first question about a hole: what stat(2) tells is in its status.
struct Volume {
    pool: Pool,
    wanted: Wanted,
    len: Bytes,
    block: DataBlockSize,
    mapped: Mapped,
    map: OnceLock<Result<FillMap, String>>,
    /// Set when the map could not be read now: the next question is to read it again.
    again: Arc<AtomicBool>,
}

impl Volume {
    fn read(&self) -> &Result<FillMap, String> {
        let read = || match self.pool.map(&self.wanted) {
            Ok(map) => Ok(map),
            Err(NoMap::Failed(error)) => Err(error.to_string()),
            Err(NoMap::NotNow(reason)) => {
                self.again.store(true, Relaxed);
                Err(reason.to_owned())
            }
        };
        self.map.get_or_init(read)
    }
}

impl HoleMap for Volume {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        match self.read() {
            Ok(map) => map.extent_at(offset),
            Err(_) if offset < self.len => Extent { end: self.len, kind: Kind::Data },
            Err(_) => Extent::outside(offset),
        }
    }

    fn next_data(&self, offset: Bytes) -> Bytes {
        self.read().as_ref().map_or(offset, |map| map.next_data(offset))
    }

    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        self.read().as_ref().ok()?.next_hole(offset)
    }

    fn count_data(&self, range: &Range<Bytes>, unit: Bytes) -> Option<Bytes> {
        self.read().as_ref().ok()?.count_data(range, unit)
    }

    fn allocated(&self) -> Option<Bytes> {
        match self.map.get() {
            Some(Ok(map)) => map.allocated(),
            Some(Err(_)) => Some(self.len),
            None => self.mapped.inside(self.len, self.block),
        }
    }

    fn is_sparse(&self) -> Option<bool> {
        let not_mapped = self.len.saturating_sub(self.allocated()?);
        // What is not mapped is whole blocks, and perhaps a part of one at the end of the device.
        match not_mapped {
            Bytes::ZERO => Some(false),
            some if some >= self.block.bytes() => Some(true),
            _ => None,
        }
    }

    fn dense_because(&self) -> Option<String> {
        self.map.get().and_then(|map| map.as_ref().err().cloned())
    }

    fn memory(&self) -> Bytes {
        self.map.get().and_then(|map| map.as_ref().ok()).map_or(Bytes::ZERO, HoleMap::memory)
    }
}
