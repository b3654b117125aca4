//! Linux software RAID (md), where the answer is certain.
//!
//! | level | holes |
//! |---|---|
//! | raid1 | where all legs have one |
//! | raid10, layout near, copies that divide the disks | where all legs that hold a chunk have one |
//! | raid0, legs of one length | those of the leg that holds a chunk |
//! | linear | those of the leg |
//! | raid4, raid5, raid6, other layouts and levels | none |
//!
//! An array that is degraded, that resyncs, reshapes or checks itself, or that is anything else than running and idle,
//! is dense. All that is known of an array is read from sysfs (`Documentation/admin-guide/md.rst`).

pub mod array;

use std::io;
use std::sync::Arc;

use self::array::{Array, Leg};
use crate::map::{Clip, Concat, HoleMap, Overlay, Stripe};
use crate::source::device::BlockDevice;
use crate::source::{Guard, Layer, Resolver, dense};
use crate::sys::device::DeviceId;
use crate::sys::sysfs;
use crate::units::Bytes;

/// Whether a device is an md array.
///
/// # Errors
/// When that cannot be known, as read(2).
pub fn is_array(id: DeviceId) -> io::Result<bool> {
    Ok(sysfs::bytes(id, "md/level")?.is_some())
}

fn read(id: DeviceId) -> Result<Array, String> {
    let text = |bytes| String::from_utf8(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData));
    Array::read(&|name| sysfs::bytes(id, &format!("md/{name}"))?.map(text).transpose())
}

/// The layer of an array.
pub fn layer(device: &BlockDevice, resolver: &mut Resolver<'_>) -> Layer {
    let array = read(device.id);
    resolver.guard(ArrayGuard { id: device.id, seen: array.clone() });
    let kind = match sysfs::attribute(device.id, "md/level") {
        Some(level) => format!("md {level}"),
        None => "md".to_owned(),
    };
    match array.and_then(|array| legs_of(&array, device.len, resolver)) {
        Ok((holes_from, map, below)) => {
            Layer { name: device.name(), kind, holes_from: holes_from.to_owned(), map, device: None, below }
        }
        Err(reason) => {
            let reason = format!("{kind}: {reason}");
            dense::layer(device.name(), kind, device.len, reason)
        }
    }
}

/// An array as it was; the answer holds as long as it is the same.
struct ArrayGuard {
    id: DeviceId,
    seen: Result<Array, String>,
}

impl Guard for ArrayGuard {
    fn unchanged(&self) -> bool {
        read(self.id) == self.seen
    }
}

type Known = (&'static str, Arc<dyn HoleMap>, Vec<Arc<Layer>>);

fn legs_of(array: &Array, len: Bytes, resolver: &mut Resolver<'_>) -> Result<Known, String> {
    let mut below = Vec::new();
    let mut legs: Vec<Arc<dyn HoleMap>> = Vec::new();
    for leg in &array.legs {
        let (layer, clip) = window(leg, resolver).ok_or("a leg is out of range")?;
        below.push(layer);
        legs.push(Arc::new(clip));
    }
    let (holes_from, map): (_, Arc<dyn HoleMap>) = match array.level.as_str() {
        "raid1" => ("where all legs have one", Arc::new(raid1(legs, len)?)),
        "raid10" => ("where all legs of a chunk have one", Arc::new(raid10(array, legs, len)?)),
        "raid0" => ("the legs it stripes over", Arc::new(raid0(array, legs, len)?)),
        "linear" => ("its legs", Arc::new(linear(legs, len)?)),
        _ => return Err("holes below are not known to read as zeros".to_owned()),
    };
    Ok((holes_from, map, below))
}

fn window(leg: &Leg, resolver: &mut Resolver<'_>) -> Option<(Arc<Layer>, Clip)> {
    let start = leg.offset.bytes()?;
    let below = resolver.device(leg.device, start.checked_add(leg.len)?);
    let clip = Clip { inner: below.map.clone(), start, len: leg.len };
    Some((below, clip))
}

fn raid1(legs: Vec<Arc<dyn HoleMap>>, len: Bytes) -> Result<Overlay, String> {
    if legs.iter().any(|leg| leg.len() < len) {
        return Err("a leg is shorter than the array".to_owned());
    }
    Ok(Overlay { layers: legs, len })
}

/// Copies of a chunk lie on neighbouring legs (`raid10_find_phys` of `drivers/md/raid10.c`).
fn raid10(array: &Array, legs: Vec<Arc<dyn HoleMap>>, len: Bytes) -> Result<Stripe, String> {
    let copies = array.near_copies().ok_or("its layout is not one of near copies alone")?;
    if !legs.len().is_multiple_of(copies) {
        return Err("its copies do not divide its disks".to_owned());
    }
    let leg_len = array.component.align_down(array.chunk);
    if legs.iter().any(|leg| leg.len() < leg_len) {
        return Err("a leg is shorter than the array needs".to_owned());
    }
    let groups: Vec<Arc<dyn HoleMap>> = legs
        .chunks(copies)
        .map(|group| Arc::new(Overlay { layers: group.to_vec(), len: leg_len }) as Arc<dyn HoleMap>)
        .collect();
    striped(groups, array.chunk, leg_len, len)
}

/// Legs of one length make one zone, in which chunks go round the legs (`raid0_map_sector` of `drivers/md/raid0.c`).
fn raid0(array: &Array, legs: Vec<Arc<dyn HoleMap>>, len: Bytes) -> Result<Stripe, String> {
    let leg_len = legs.first().map_or(Bytes::ZERO, |leg| leg.len().align_down(array.chunk));
    if legs.iter().any(|leg| leg.len().align_down(array.chunk) != leg_len) {
        return Err("its legs differ in length, and where its zones lie depends on the kernel".to_owned());
    }
    striped(legs, array.chunk, leg_len, len)
}

fn striped(legs: Vec<Arc<dyn HoleMap>>, chunk: Bytes, leg_len: Bytes, len: Bytes) -> Result<Stripe, String> {
    let count = u64::try_from(legs.len()).unwrap_or(u64::MAX);
    if leg_len.get().checked_mul(count) != Some(len.get()) {
        return Err("its legs do not add up to its length".to_owned());
    }
    Stripe::new(legs, chunk, len).ok_or_else(|| "it has no chunks".to_owned())
}

fn linear(legs: Vec<Arc<dyn HoleMap>>, len: Bytes) -> Result<Concat, String> {
    let map = Concat::new(legs).filter(|map| map.len() == len);
    map.ok_or_else(|| "its legs do not add up to its length".to_owned())
}
