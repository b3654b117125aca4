//! Targets that pass requests on to one device: delay, flakey, unstriped, snapshot-origin, era and multipath.

use std::sync::Arc;

use super::params::{self, PathState, Place};
use super::segment::{Asked, Known, Segment, window};
use crate::map::Unstripe;
use crate::source::Resolver;
use crate::sys::device::DeviceId;
use crate::units::{Bytes, Sectors};

/// The start of a device.
fn whole(device: DeviceId) -> Place {
    Place { device, start: Sectors::new(0) }
}

/// Reads go to the first of its places, whatever writes do.
pub fn delay(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    asked.passed_to(asked.params(params::delay)?, "the device that it reads from", resolver)
}

/// A device that is down for a while, or that corrupts what it reads, promises nothing.
pub fn flakey(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    let place = params::flakey_without_faults(&asked.target.params);
    let place = place.ok_or("it has times when it is down, or features that corrupt or drop")?;
    asked.passed_to(place, "the device it maps to", resolver)
}

/// One stripe of a striped device.
pub fn unstriped(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    asked.at_start()?;
    let unstriped = asked.params(params::unstriped)?;
    let place = unstriped.place;
    let reach = |stripes: u64| {
        let chunk = unstriped.chunk.bytes()?.get();
        let rows = asked.len.get().checked_next_multiple_of(chunk)?;
        Some((Bytes::new(chunk), Bytes::new(rows.checked_mul(stripes)?)))
    };
    let stripes = u64::from(unstriped.stripes);
    let (chunk, reach) = reach(stripes).ok_or("its stripes are out of range")?;
    let (below, clip) = window(place, reach, resolver).ok_or("its stripes are out of range")?;
    let map = Unstripe::new(Arc::new(clip), chunk, stripes, u64::from(unstriped.index), asked.len);
    Ok(Segment::new("one stripe of the device it maps to", map.ok_or("it has no such stripe")?, vec![below]))
}

/// The device that snapshots were taken of.
pub fn snapshot_origin(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    asked.at_start()?;
    asked.passed_to(whole(asked.params(params::snapshot_origin)?), "the origin device", resolver)
}

/// A device that remembers when its blocks were written.
pub fn era(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    asked.at_start()?;
    asked.passed_to(whole(asked.params(params::era_origin)?), "the origin device", resolver)
}

/// Several paths to one device: any that works tells the holes of all.
pub fn multipath(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    asked.at_start()?;
    // The rest of the status counts requests and failures.
    let states = |status: &str| params::multipath_paths(status).map(|paths| format!("{paths:?}"));
    let status = asked.guarded_status(states, resolver)?;
    let paths = params::multipath_paths(&status).ok_or_else(|| format!("its status is not understood: {status}"))?;
    let best = paths.iter().filter(|path| path.state != PathState::Unusable).min_by_key(|path| path.state);
    let path = best.ok_or("no path works")?;
    asked.passed_to(whole(path.device), "one of its paths", resolver)
}
