//! The layer of a thin device. Loading reads its mapping tree, which is valid as long as nobody writes to the device.

use std::sync::Arc;

use super::DataBlockSize;
use super::guard::WriteGuard;
use super::params::{self, Mapped, ThinTable};
use super::pool::LivePool;
use super::shared_reads::Wanted;
use super::single_activation::SingleActivationGuard;
use crate::map::{Clip, Concat, ExtentKind, FillMap, HoleMap, Overlay, Uniform};
use crate::reason::DenseReason;
use crate::source::target::{TargetContext, TargetLayer};
use crate::source::{Layer, LoadExtents, Resolver};
use crate::sys::device::DeviceId;
use crate::sys::dm::{Commit, Control};
use crate::units::{Bytes, Sectors};

/// The layer of a device that is the target `thin`.
///
/// # Errors
/// Why it is dense.
pub fn layer(target: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    let table = target.params(params::thin_table)?;
    let control = target.control.clone();
    // The size of the blocks of a pool never changes.
    let block = pool_block(&control, &table);
    // Before anything is read of the device: a write from here on makes its extents void, unless they follow it.
    let guard = WriteGuard::new(target.device);
    let mut guard = guard.map_err(|error| DenseReason::cannot("use its I/O counters", &error))?;
    // Own writes are known by their positions on the device, which are those of the volume if it is all of the device.
    let is_whole = target.len == target.device.len;
    let known = block.as_ref().ok().filter(|_| is_whole);
    let written = known.and_then(|block| guard.follow_own_writes(target.len, block.bytes()));
    resolver.guard(guard);
    let guard = SingleActivationGuard::new(control.clone(), target.events, target.device.id, table);
    let guard = guard.map_err(|error| DenseReason::cannot("look for its other devices", &error))?;
    let is_single = guard.is_single();
    resolver.guard(guard);
    if !is_single {
        return Err(DenseReason::State("the volume is active as another device too, or about to be".into()));
    }
    let mapped = mapped(&control, target.device.id, target.target.start)?;
    let block = block?;
    // A write to the device may wait for its pool, and reading its mapping tree waits for the pool's metadata device.
    // Neither is tried while one of them is suspended.
    let waits = resolver.waits_on(table.pool);
    waits.map_err(|error| DenseReason::cannot("find out whether its pool is suspended", &error))?;
    let pool = LivePool::new(control, table.pool, resolver.context);
    let wanted = Wanted { id: table.id, len: target.len, mapped: mapped.sectors };
    let allocated = mapped.inside(target.len, block);
    let volume = resolver.stored(target.len, block.bytes(), allocated, MappingTree { pool, wanted });
    let volume = match written {
        Some(ranges) => resolver.followed(volume, ranges),
        None => volume,
    };
    match table.origin.map(|origin| resolver.device(origin, target.len)) {
        Some(origin) => over_origin(volume, origin),
        None => {
            let holes_from = "the mapping tree of its pool".to_owned();
            Ok(TargetLayer { holes_from, map: volume, below: Vec::new() })
        }
    }
}

/// How much of the device is mapped now, committed or not, by its target that starts at `start`.
pub(super) fn mapped(control: &Control, device: DeviceId, start: Sectors) -> Result<Mapped, DenseReason> {
    let table = control.status(device, Commit::No);
    let table = table.map_err(|error| DenseReason::cannot("read its status", &error))?;
    let line = table.targets.iter().find(|line| line.start == start);
    let line = line.map(|line| line.params.as_str()).unwrap_or_default();
    params::thin_status(line).ok_or_else(|| DenseReason::State(format!("its status is: {line}").into()))
}

fn pool_block(control: &Control, table: &ThinTable) -> Result<DataBlockSize, DenseReason> {
    let pool = control.table(table.pool).map_err(|error| DenseReason::cannot("read its pool's table", &error))?;
    let params = pool.targets.first().map(|target| target.params.as_str()).unwrap_or_default();
    let unknown = || DenseReason::NotUnderstood { what: "its pool's table is".into(), text: params.to_owned() };
    Ok(params::pool_table(params).ok_or_else(unknown)?.block)
}

/// The volume over its external origin: a range is a hole where neither has data.
///
/// An origin reads as zeros past its end. The end that counts is the one at the last resume of the volume
/// (`drivers/md/dm-thin.c: thin_preresume`), and the kernel does not show it. If the origin became shorter since, reads
/// past its present end fail. So the range past its present end is data.
fn over_origin(volume: Arc<dyn HoleMap>, origin: Arc<Layer>) -> Result<TargetLayer, DenseReason> {
    let len = volume.len();
    let shown = origin.len().min(len);
    let below = Clip { inner: origin.map.clone(), start: Bytes::ZERO, len: shown };
    let rest = Uniform { len: len.saturating_sub(shown), kind: ExtentKind::Data };
    let below = Concat::new(vec![Arc::new(below), Arc::new(rest)]).ok_or("its length is out of range")?;
    let map = Overlay { layers: vec![volume, Arc::new(below)], len };
    Ok(TargetLayer::new("the mapping tree of its pool, and its external origin", map, vec![origin]))
}

/// The mapping tree of a thin device. What stat(2) reports is known from the status of the device, without the tree.
struct MappingTree {
    pool: LivePool,
    wanted: Wanted,
}

impl LoadExtents for MappingTree {
    fn load(&self) -> Result<FillMap, DenseReason> {
        self.pool.map(&self.wanted)
    }
}
