//! One target of a table to the layer of its segment.

use std::sync::Arc;

use super::params;
use super::segment::{Asked, Known, Segment, window};
use super::{copies, passing, snapshot};
use crate::map::{HoleMap, Kind, Stripe, Uniform};
use crate::source::device::BlockDevice;
use crate::source::{Layer, Resolver, dense, thin::volume};
use crate::sys::dm::{Events, TableTarget};
use crate::units::{Bytes, Sectors};

/// The layer of one target of the device `name`.
pub fn layer(
    name: &str,
    device: &BlockDevice,
    events: Events,
    target: &TableTarget,
    resolver: &mut Resolver<'_>,
) -> Layer {
    let kind = format!("dm-{}", target.kind);
    let Some(len) = target.len.bytes() else {
        return dense::layer(name, kind, device.len, "its length is out of range");
    };
    match segment(&Asked { device, events, target, len }, resolver) {
        Ok(segment) => Layer {
            name: name.to_owned(),
            kind,
            holes_from: segment.holes_from,
            map: segment.map,
            device: None,
            below: segment.below,
        },
        Err(reason) => {
            let reason = format!("{kind}: {reason}");
            dense::layer(name, kind, len, reason)
        }
    }
}

fn segment(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    match asked.target.kind.as_str() {
        "linear" => asked.passed_to(asked.params(params::linear)?, "the device it maps to", resolver),
        "striped" => stripe(asked, resolver),
        "zero" => Ok(Segment::new("it reads as zeros", Uniform { len: asked.len, kind: Kind::Hole }, Vec::new())),
        "thin" => volume::segment(asked, resolver),
        "delay" => passing::delay(asked, resolver),
        "flakey" => passing::flakey(asked, resolver),
        "unstriped" => passing::unstriped(asked, resolver),
        "snapshot-origin" => passing::snapshot_origin(asked, resolver),
        "era" => passing::era(asked, resolver),
        "multipath" => passing::multipath(asked, resolver),
        "mirror" => copies::mirror(asked, resolver),
        "raid" => copies::raid(asked, resolver),
        "clone" => copies::clone(asked, resolver),
        "snapshot" => snapshot::layer(asked, resolver),
        other => Err(dense_reason(other)),
    }
}

/// Why a target has no holes, whatever is below it.
fn dense_reason(kind: &str) -> String {
    let reason = match kind {
        "error" => "it has no bytes, only errors",
        "crypt" => "zeros below are not zeros when they are deciphered",
        "integrity" => "zeros below have no valid tags, and are errors",
        "verity" => "what is read is checked against a hash tree, and may be an error",
        "cache" => "blocks are read from the cache or the origin, and only its metadata tells which",
        "writecache" => "what was written may be in the cache only",
        "vdo" => "it does not tell which blocks are mapped",
        _ => "holes below are not known to read as zeros",
    };
    reason.to_owned()
}

fn stripe(asked: &Asked<'_>, resolver: &mut Resolver<'_>) -> Known {
    let striped = asked.params(params::striped)?;
    let leg_len = leg_len(&striped, asked.len).ok_or("its length is no multiple of its stripes")?;
    let mut below = Vec::new();
    let mut legs: Vec<Arc<dyn HoleMap>> = Vec::new();
    for place in &striped.legs {
        let (layer, clip) = window(*place, leg_len, resolver).ok_or("a leg is out of range")?;
        below.push(layer);
        legs.push(Arc::new(clip));
    }
    let chunk = striped.chunk.bytes().ok_or("its chunks are out of range")?;
    let map = Stripe::new(legs, chunk, asked.len).ok_or("it has no stripes")?;
    Ok(Segment::new("the legs it stripes over", map, below))
}

/// The length of each leg. dm-stripe refuses a length that is no multiple of all chunks in a row (`stripe_ctr`).
fn leg_len(striped: &params::Striped, len: Bytes) -> Option<Bytes> {
    let count = u64::try_from(striped.legs.len()).ok()?;
    let row = striped.chunk.get().checked_mul(count)?;
    let sectors = len.get() / Sectors::SIZE.get();
    (sectors.checked_rem(row)? == 0).then(|| Bytes::new(len.get() / count))
}
