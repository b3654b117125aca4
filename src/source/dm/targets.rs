//! One target of a table to the layer of its segment.

use std::sync::Arc;

use super::params::{self, Place};
use crate::map::{Clip, HoleMap, Kind, Stripe, Uniform};
use crate::source::device::BlockDevice;
use crate::source::{Layer, Resolver, dense, thin::volume};
use crate::sys::dm::TableTarget;
use crate::units::{Bytes, Sectors};

/// The layer of one target of the device `name`.
pub fn layer(name: &str, device: &BlockDevice, target: &TableTarget, resolver: &mut Resolver<'_>) -> Layer {
    let kind = format!("dm-{}", target.kind);
    let Some(len) = target.len.bytes() else {
        return dense::layer(name, kind, device.len, "its length is out of range");
    };
    let known = match target.kind.as_str() {
        "linear" => params::linear(&target.params).and_then(|place| linear(place, len, resolver)),
        "striped" => params::striped(&target.params).and_then(|striped| stripe(&striped, len, resolver)),
        "zero" => Some(Segment::new("it reads as zeros", Uniform { len, kind: Kind::Hole }, Vec::new())),
        "thin" => return thin(name, device, target, len, resolver),
        "error" => return dense::layer(name, kind, len, "it has no bytes, only errors"),
        other => {
            return dense::layer(name, kind, len, format!("holes under dm-{other} are not known to read as zeros"));
        }
    };
    match known {
        Some(segment) => Layer {
            name: name.to_owned(),
            kind,
            holes_from: segment.holes_from,
            map: segment.map,
            below: segment.below,
        },
        None => dense::layer(name, kind, len, format!("its arguments are not understood: {}", target.params)),
    }
}

/// What a target makes of the devices below it.
struct Segment {
    holes_from: String,
    map: Arc<dyn HoleMap>,
    below: Vec<Arc<Layer>>,
}

impl Segment {
    fn new(holes_from: &str, map: impl HoleMap + 'static, below: Vec<Arc<Layer>>) -> Self {
        Self { holes_from: holes_from.to_owned(), map: Arc::new(map), below }
    }
}

fn thin(name: &str, device: &BlockDevice, target: &TableTarget, len: Bytes, resolver: &mut Resolver<'_>) -> Layer {
    match resolver.context.dm.control() {
        Some(control) => volume::layer(name, device, target, len, control, resolver),
        None => dense::layer(name, "dm-thin", len, "reading its pool needs root and /dev/mapper/control"),
    }
}

/// A window of `len` bytes on a lower device.
fn window(place: Place, len: Bytes, resolver: &mut Resolver<'_>) -> Option<(Arc<Layer>, Clip)> {
    let start = place.start.bytes()?;
    let below = resolver.device(place.device, start.checked_add(len)?);
    let clip = Clip { inner: below.map.clone(), start, len };
    Some((below, clip))
}

fn linear(place: Place, len: Bytes, resolver: &mut Resolver<'_>) -> Option<Segment> {
    let (below, clip) = window(place, len, resolver)?;
    Some(Segment::new("the device it maps to", clip, vec![below]))
}

fn stripe(striped: &params::Striped, len: Bytes, resolver: &mut Resolver<'_>) -> Option<Segment> {
    let chunk = striped.chunk.bytes()?;
    let count = u64::try_from(striped.legs.len()).ok()?;
    // dm-stripe refuses a length that is no multiple of all chunks in a row (`stripe_ctr`).
    let row = striped.chunk.get().checked_mul(count)?;
    let sectors = len.get() / Sectors::SIZE.get();
    if sectors.checked_rem(row)? != 0 {
        return None;
    }
    let leg_len = Bytes::new(len.get() / count);
    let mut below = Vec::new();
    let mut legs: Vec<Arc<dyn HoleMap>> = Vec::new();
    for place in &striped.legs {
        let (layer, clip) = window(*place, leg_len, resolver)?;
        below.push(layer);
        legs.push(Arc::new(clip));
    }
    Some(Segment::new("the legs it stripes over", Stripe::new(legs, chunk, len)?, below))
}
