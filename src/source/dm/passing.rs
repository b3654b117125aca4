//! Targets that pass reads on to one device: delay, flakey, unstriped, snapshot-origin, era and multipath.

use std::sync::Arc;

use super::params::{self, PathState, Place};
use crate::map::Unstripe;
use crate::reason::DenseReason;
use crate::source::Resolver;
use crate::source::target::{TargetContext, TargetLayer};
use crate::units::Bytes;

/// Delay: reads go to the first of up to three places; the others are for writes and flushes.
pub fn delay(context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    context.mapped_to(context.params(params::delay)?, "the device that it reads from", resolver)
}

/// The layer of a flakey device: that of its lower device, if its arguments let it never fail and change no bytes.
pub fn flakey(context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    let place = params::flakey_without_faults(&context.target.params);
    let place = place.ok_or("it has times when it is down, or features that corrupt or drop")?;
    context.mapped_to(place, "the device it maps to", resolver)
}

/// Unstriped: one stripe of a striped device.
pub fn unstriped(context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    context.require_first()?;
    let unstriped = context.params(params::unstriped)?;
    let stripes = u64::from(unstriped.stripes);
    // The part of the lower device that is used: whole rows of all stripes.
    let reach = || {
        let chunk = unstriped.chunk.bytes()?.get();
        let rows = context.len.get().checked_next_multiple_of(chunk)?;
        Some((Bytes::new(chunk), Bytes::new(rows.checked_mul(stripes)?)))
    };
    let (chunk, reach) = reach().ok_or("its stripes are out of range")?;
    let (below, clip) =
        resolver.window(unstriped.place.device, unstriped.place.start, reach).ok_or("its stripes are out of range")?;
    let map = Unstripe::new(Arc::new(clip), chunk, stripes, u64::from(unstriped.index), context.len);
    Ok(TargetLayer::new("one stripe of the device it maps to", map.ok_or("it has no such stripe")?, vec![below]))
}

/// Snapshot-origin: the device that snapshots were taken of.
pub fn snapshot_origin(context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    context.require_first()?;
    let origin = context.params(params::snapshot_origin)?;
    context.mapped_to(Place::start_of(origin), "the origin device", resolver)
}

/// Era: a device whose metadata records when blocks were written.
pub fn era(context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    context.require_first()?;
    let origin = context.params(params::era_origin)?;
    context.mapped_to(Place::start_of(origin), "the origin device", resolver)
}

/// Multipath: several paths to one device. The holes are read through one path that works.
pub fn multipath(context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    context.require_first()?;
    // The rest of the status counts requests and failures.
    let states = |status: &str| params::multipath_paths(status).map(|paths| format!("{paths:?}"));
    let status = context.guarded_status(states, resolver)?;
    let paths = params::multipath_paths(&status)
        .ok_or_else(|| DenseReason::NotUnderstood { what: "its status is".into(), text: status })?;
    let best = paths.iter().filter(|path| path.state != PathState::Unusable).min_by_key(|path| path.state);
    let path = best.ok_or(DenseReason::State("no path works".into()))?;
    context.mapped_to(Place::start_of(path.device), "one of its paths", resolver)
}
