//! Linux software RAID (md): the holes of arrays whose level and state make them certain.
//!
//! | level | holes |
//! |---|---|
//! | raid1 | where all legs have one |
//! | raid10, layout near, copies that divide the disks | where all legs that hold a chunk have one |
//! | raid0, legs of one length | those of the leg that holds a chunk |
//! | linear | those of the leg |
//! | raid4, raid5, raid6, other layouts and levels | none |
//!
//! An array that is degraded, not running or not idle (it resyncs, reshapes or checks itself) is dense. The state of an
//! array is read from sysfs (`Documentation/admin-guide/md.rst`).

pub mod array;

use std::io;
use std::sync::Arc;

use self::array::Array;
use crate::map::{Concat, HoleMap, Overlay, Stripe};
use crate::reason::DenseReason;
use crate::source::device::BlockDevice;
use crate::source::{Guard, Layer, Reach, Resolver, Trace, dense};
use crate::sys::device::DeviceId;
use crate::sys::sysfs;
use crate::units::Bytes;

/// Whether a device is an md array.
///
/// # Errors
/// As open(2) and read(2) of its attribute in sysfs.
pub fn is_array(id: DeviceId) -> io::Result<bool> {
    Ok(sysfs::bytes(id, "md/level")?.is_some())
}

fn read(id: DeviceId) -> Result<Array, DenseReason> {
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
    match array.and_then(|array| array_map(&array, device.len, resolver)) {
        Ok((holes_from, map, below)) => {
            Layer { name: device.name(), kind, holes_from: holes_from.to_owned(), map, device: None, below }
        }
        Err(reason) => {
            let reason = reason.of_kind(&kind);
            dense::layer(device.name(), kind, device.len, reason)
        }
    }
}

/// Guards the attributes of an array.
struct ArrayGuard {
    id: DeviceId,
    seen: Result<Array, DenseReason>,
}

impl Guard for ArrayGuard {
    fn unchanged(&self) -> bool {
        read(self.id) == self.seen
    }

    /// The level and the legs with their places. Where the attributes are not read, another process cannot compare them.
    fn trace(&self, trace: &mut Trace) {
        match &self.seen {
            Ok(array) => trace.add(array),
            Err(_) => trace.limit(Reach::Process),
        }
    }
}

/// Where the holes of an array come from, the holes, and the layers of its legs.
type ArrayMap = (&'static str, Arc<dyn HoleMap>, Vec<Arc<Layer>>);

fn array_map(array: &Array, len: Bytes, resolver: &mut Resolver<'_>) -> Result<ArrayMap, DenseReason> {
    let windows = array.legs.iter().map(|leg| (leg.device, leg.offset, leg.len));
    let (below, legs) = resolver.windows(windows).ok_or("a leg is out of range")?;
    let (holes_from, map): (_, Arc<dyn HoleMap>) = match array.level.as_str() {
        "raid1" => ("where all legs have one", Arc::new(raid1(legs, len)?)),
        "raid10" => ("where all legs of a chunk have one", Arc::new(raid10(array, legs, len)?)),
        "raid0" => ("the legs it stripes over", Arc::new(raid0(array, legs, len)?)),
        "linear" => ("its legs", Arc::new(linear(legs, len)?)),
        _ => return Err("holes below are not known to read as zeros".into()),
    };
    Ok((holes_from, map, below))
}

fn raid1(legs: Vec<Arc<dyn HoleMap>>, len: Bytes) -> Result<Overlay, DenseReason> {
    if legs.iter().any(|leg| leg.len() < len) {
        return Err("a leg is shorter than the array".into());
    }
    Ok(Overlay { layers: legs, len })
}

/// A raid10 of layout "near": the copies of a chunk are on adjacent legs (`raid10_find_phys` of `drivers/md/raid10.c`).
fn raid10(array: &Array, legs: Vec<Arc<dyn HoleMap>>, len: Bytes) -> Result<Stripe, DenseReason> {
    let copies = array.near_copies().ok_or("its layout has other copies than near ones")?;
    if !legs.len().is_multiple_of(copies) {
        return Err("its number of copies does not divide its number of disks".into());
    }
    let leg_len = array.component.align_down(array.chunk);
    if legs.iter().any(|leg| leg.len() < leg_len) {
        return Err("a leg is shorter than the array needs".into());
    }
    let groups: Vec<Arc<dyn HoleMap>> = legs
        .chunks(copies)
        .map(|group| Arc::new(Overlay { layers: group.to_vec(), len: leg_len }) as Arc<dyn HoleMap>)
        .collect();
    striped(groups, array.chunk, leg_len, len)
}

/// A raid0 whose legs have one length, so that it has one zone: chunks are distributed over the legs in turn
/// (`raid0_map_sector` of `drivers/md/raid0.c`).
fn raid0(array: &Array, legs: Vec<Arc<dyn HoleMap>>, len: Bytes) -> Result<Stripe, DenseReason> {
    let leg_len = legs.first().map_or(Bytes::ZERO, |leg| leg.len().align_down(array.chunk));
    if legs.iter().any(|leg| leg.len().align_down(array.chunk) != leg_len) {
        return Err("its legs differ in length, and the kernel's version decides where its zones lie".into());
    }
    striped(legs, array.chunk, leg_len, len)
}

/// `legs` of `leg_len` bytes each, over which chunks are distributed in turn, as a device of `len` bytes.
fn striped(legs: Vec<Arc<dyn HoleMap>>, chunk: Bytes, leg_len: Bytes, len: Bytes) -> Result<Stripe, DenseReason> {
    let count = u64::try_from(legs.len()).unwrap_or(u64::MAX);
    if leg_len.get().checked_mul(count) != Some(len.get()) {
        return Err("its legs do not add up to its length".into());
    }
    Stripe::new(legs, chunk, len).ok_or_else(|| "it has no chunks".into())
}

fn linear(legs: Vec<Arc<dyn HoleMap>>, len: Bytes) -> Result<Concat, DenseReason> {
    let map = Concat::new(legs).filter(|map| map.len() == len);
    map.ok_or_else(|| "its legs do not add up to its length".into())
}
