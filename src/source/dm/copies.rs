//! Targets that keep the same bytes in several places: mirror, raid1 and clone.

use super::lower::{PLACE_OUT_OF_RANGE, whole_status};
use super::params::{self, CloneStatus, Place};
use crate::map::Overlay;
use crate::reason::DenseReason;
use crate::source::Resolver;
use crate::source::target::{TargetContext, TargetLayer};

/// A target with a hole where each of `places` has one: a read returns zeros whichever place it goes to.
fn holes_of_all(
    context: &TargetContext<'_>,
    places: &[Place],
    holes_from: &str,
    resolver: &mut Resolver<'_>,
) -> Result<TargetLayer, DenseReason> {
    let windows = places.iter().map(|place| (place.device, place.start, context.len));
    let (below, layers) = resolver.windows(windows).ok_or(PLACE_OUT_OF_RANGE)?;
    Ok(TargetLayer::new(holes_from, Overlay { layers, len: context.len }, below))
}

/// Mirror (`drivers/md/dm-raid1.c`).
pub fn mirror(context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    let legs = context.params(params::mirror)?;
    let status = context.guarded_status(whole_status, resolver)?;
    if !params::mirror_is_in_sync(&status, legs.len()) {
        return Err(DenseReason::State(format!("it is degraded or not in sync: {status}").into()));
    }
    holes_of_all(context, &legs, "where all legs have one", resolver)
}

/// Raid of level raid1 (`drivers/md/dm-raid.c`).
pub fn raid(context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    let level = context.target.params.split_ascii_whitespace().next().unwrap_or_default();
    if level != "raid1" {
        return Err(format!("holes under level {level} are not known to read as zeros").into());
    }
    let legs = context.params(params::raid1)?;
    let status = context.guarded_status(whole_status, resolver)?;
    if !params::raid_is_in_sync(&status, legs.len()) {
        return Err(DenseReason::State(format!("it is degraded or not idle and in sync: {status}").into()));
    }
    holes_of_all(context, &legs, "where all legs have one", resolver)
}

/// Clone: a copy that is made while it is used. Regions that were copied are read from the destination, the others from
/// the source.
///
/// The map looks at both, at the source first. A region that was copied before the look at the source is at the
/// destination. A region that was not yet copied at the look at the destination is at the source. A region that was
/// copied between the two looks was at the source at the first look. So where both have a hole, there was a moment
/// between the two looks at which the region read as zeros.
///
/// Extents that are stored in metadata are loaded before the first look, those of the destination too. Then no region may
/// be copied between the load and the end of the question, so the whole status is guarded.
pub fn clone(context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    let devices = context.params(params::cloning)?;
    // A reloaded table with the same text may find other metadata.
    context.guard_reload(resolver);
    // As long as the table is not reloaded, more and more is copied, so the rest of the status may change. But a target
    // that failed returns errors for all reads.
    let is_failed = |status: &str| Some(format!("{:?}", params::clone_status(status) == Some(CloneStatus::Failed)));
    let status = context.guarded_status(is_failed, resolver)?;
    let (destination, source) = (Place::start_of(devices.destination), Place::start_of(devices.source));
    match params::clone_status(&status) {
        Some(CloneStatus::Complete) => context.mapped_to(destination, "the destination: all is copied", resolver),
        Some(CloneStatus::Partial) => {
            let places = [source, destination];
            let layer = holes_of_all(context, &places, "where source and destination both have one", resolver)?;
            if resolver.has_stored() {
                context.guarded_status(whole_status, resolver)?;
            }
            Ok(layer)
        }
        Some(CloneStatus::Failed) => Err(DenseReason::Damaged("its metadata failed".into())),
        None => Err(DenseReason::NotUnderstood { what: "its status is".into(), text: status }),
    }
}
