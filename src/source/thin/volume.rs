//! The layer of a thin device. Loading reads its mapping tree, which is valid as long as nobody writes to the device.

use std::sync::Arc;

use super::DataBlockSize;
use super::alone::AloneGuard;
use super::guard::WriteGuard;
use super::params::{self, Mapped, ThinTable};
use super::pool::{Pool, Wanted};
use crate::error::plain;
use crate::map::{Clip, Concat, FillMap, HoleMap, Kind, Overlay, Uniform};
use crate::source::dm::segment::{Asked, Known, Segment};
use crate::source::{Layer, LoadExtents, LoadFailure, Resolver, StoredExtents};
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
    let guard = WriteGuard::new(asked.device);
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
    waits.map_err(|error| format!("cannot find out whether its pool is suspended: {}", plain(&error)))?;
    let pool = Pool::new(control, table.pool, &resolver.context.thin);
    let wanted = Wanted { id: table.id, len: asked.len, mapped: mapped.sectors };
    let allocated = mapped.inside(asked.len, block);
    let volume = resolver.stored(asked.len, block.bytes(), allocated, MappingTree { pool, wanted });
    match table.origin.map(|origin| resolver.device(origin, asked.len)) {
        Some(origin) => over_origin(volume, origin),
        None => {
            let holes_from = "the mapping tree of its pool".to_owned();
            Ok(Segment { holes_from, map: volume, below: Vec::new() })
        }
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
fn over_origin(volume: Arc<StoredExtents>, origin: Arc<Layer>) -> Known {
    let len = volume.len();
    let shown = origin.len().min(len);
    let below = Clip { inner: origin.map.clone(), start: Bytes::ZERO, len: shown };
    let rest = Uniform { len: len.saturating_sub(shown), kind: Kind::Data };
    let below = Concat::new(vec![Arc::new(below), Arc::new(rest)]).ok_or("its length is out of range")?;
    let map = Overlay { layers: vec![volume, Arc::new(below)], len };
    Ok(Segment::new("the mapping tree of its pool, and its external origin", map, vec![origin]))
}

/// A thin device whose mapping tree is read when it is loaded. What stat(2) reports is known from its status.
struct MappingTree {
    pool: Pool,
    wanted: Wanted,
}

impl LoadExtents for MappingTree {
    fn load(&self) -> Result<FillMap, LoadFailure> {
        self.pool.map(&self.wanted)
    }
}
