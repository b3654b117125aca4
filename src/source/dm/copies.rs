//! Targets that keep the same bytes in several places: mirror, raid1 and clone.

use std::sync::Arc;

use super::params::{self, CloneStatus, Place};
use super::segment::{Asked, Known, Segment, all_of_it};
use crate::map::{HoleMap, Overlay};
use crate::source::Resolver;
use crate::units::Sectors;

/// A hole where every one of `places` has one. Whichever of them a read goes to, it reads zeros.
fn where_all_have(asked: &Asked<'_>, places: &[Place], holes_from: &str, resolver: &mut Resolver<'_>) -> Known {
    let mut below = Vec::new();
    let mut layers: Vec<Arc<dyn HoleMap>> = Vec::new();
    for place in places {
        let (layer, clip) = asked.window(*place, resolver)?;
        below.push(layer);
        layers.push(Arc::new(clip));
    }
    Ok(Segment::new(holes_from, Overlay { layers, len: asked.len }, below))
}

/// dm-raid1, which calls itself mirror.
pub fn mirror(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    let legs = asked.params(params::mirror)?;
    let status = asked.guarded_status(all_of_it, resolver)?;
    if !params::mirror_is_in_sync(&status, legs.len()) {
        return Err(format!("it is degraded or not in sync: {status}"));
    }
    where_all_have(asked, &legs, "where all legs have one", resolver)
}

/// dm-raid with level raid1, which drives md.
pub fn raid(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    let level = asked.target.params.split_ascii_whitespace().next().unwrap_or_default();
    if level != "raid1" {
        return Err(format!("holes under level {level} are not known to read as zeros"));
    }
    let legs = asked.params(params::raid1)?;
    let status = asked.guarded_status(all_of_it, resolver)?;
    if !params::raid_is_in_sync(&status, legs.len()) {
        return Err(format!("it is degraded or not idle and in sync: {status}"));
    }
    where_all_have(asked, &legs, "where all legs have one", resolver)
}

/// A copy that is made while it is used: regions that were copied are read from the destination, others from the
/// source.
///
/// Both are asked, the source first. A region that was copied by the time the source was asked is at the destination,
/// and one that was not copied by the time the destination was asked is at the source. One that was copied between the
/// two was at the source when that was asked. So where both have a hole, there was a time in between when it read as
/// zeros.
pub fn clone(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    let devices = asked.params(params::cloning)?;
    // Another table with the same text may find other metadata.
    asked.guard_metadata(resolver)?;
    // In one life of the target what is copied only grows, so nothing of the status has to stay; but a device that failed
    // reads nothing.
    let matters = |status: &str| Some(format!("{:?}", params::clone_status(status) == Some(CloneStatus::Failed)));
    let status = asked.guarded_status(matters, resolver)?;
    let whole = |device| Place { device, start: Sectors::new(0) };
    let (destination, source) = (whole(devices.destination), whole(devices.source));
    match params::clone_status(&status) {
        Some(CloneStatus::Complete) => asked.passed_to(destination, "the destination: all is copied", resolver),
        Some(CloneStatus::Partial) => {
            where_all_have(asked, &[source, destination], "where source and destination both have one", resolver)
        }
        Some(CloneStatus::Failed) => Err("its metadata failed".to_owned()),
        None => Err(format!("its status is not understood: {status}")),
    }
}
