//! What the targets of a table have in common.

use std::sync::Arc;

use crate::map::{Clip, HoleMap};
use crate::source::device::BlockDevice;
use crate::source::{Guard, Layer, Resolver};
use crate::sys::device::DeviceId;
use crate::sys::dm::{Commit, Control, Events, TableTarget};
use crate::units::{Bytes, Sectors};

use super::guard::ReplacedGuard;
use super::params::Place;

/// A target of a device's table.
pub struct Asked<'a> {
    /// The device.
    pub device: &'a BlockDevice,
    /// Device-mapper's events before the device's table was read.
    pub events: Events,
    /// The target.
    pub target: &'a TableTarget,
    /// Its length.
    pub len: Bytes,
}

/// What a target makes of the devices below it.
pub struct Segment {
    /// Where its holes come from.
    pub holes_from: String,
    /// Its holes.
    pub map: Arc<dyn HoleMap>,
    /// The devices that it stands on.
    pub below: Vec<Arc<Layer>>,
}

impl Segment {
    /// A segment with this map.
    pub fn new(holes_from: &str, map: impl HoleMap + 'static, below: Vec<Arc<Layer>>) -> Self {
        Self { holes_from: holes_from.to_owned(), map: Arc::new(map), below }
    }
}

/// A segment, or the reason why it is dense.
pub type Known = Result<Segment, String>;

impl Asked<'_> {
    /// What `read` makes of the arguments.
    pub fn params<T>(&self, read: impl FnOnce(&str) -> Option<T>) -> Result<T, String> {
        read(&self.target.params).ok_or_else(|| format!("its arguments are not understood: {}", self.target.params))
    }

    /// Nothing, if the target is the begin of its device. Some targets do not subtract their own start from the
    /// position of a request, and are of no use anywhere else.
    pub fn at_start(&self) -> Result<(), String> {
        if self.target.start == Sectors::new(0) { Ok(()) } else { Err("it is not the first of its table".to_owned()) }
    }

    /// A window as long as the target on a lower device.
    pub fn window(&self, place: Place, resolver: &mut Resolver<'_>) -> Result<(Arc<Layer>, Clip), String> {
        window(place, self.len, resolver).ok_or_else(|| "a place on a device below is out of range".to_owned())
    }

    /// The whole of the target on one lower device.
    pub fn passed_to(&self, place: Place, holes_from: &str, resolver: &mut Resolver<'_>) -> Known {
        let (below, clip) = self.window(place, resolver)?;
        Ok(Segment::new(holes_from, clip, vec![below]))
    }

    /// Has the map forgotten when the device's table was replaced, also by one with the same text: for a target that
    /// keeps metadata of its own.
    pub fn guard_metadata(&self, resolver: &mut Resolver<'_>) -> Result<(), String> {
        let control = resolver.context.dm.control().ok_or("device-mapper does not answer")?;
        resolver.guard(ReplacedGuard::new(control, self.events));
        Ok(())
    }

    /// The target's status now, and a guard on that which `matters` picks out of it.
    pub fn guarded_status(
        &self,
        matters: fn(&str) -> Option<String>,
        resolver: &mut Resolver<'_>,
    ) -> Result<String, String> {
        let control = resolver.context.dm.control().ok_or("device-mapper does not answer")?;
        let guard = StatusGuard { control, id: self.device.id, start: self.target.start, seen: None, matters };
        let status = guard.status().ok_or("it has no status")?;
        resolver.guard(StatusGuard { seen: matters(&status), ..guard });
        Ok(status)
    }
}

/// Picks all of a status.
pub fn all_of_it(status: &str) -> Option<String> {
    Some(status.to_owned())
}

/// A window of `len` bytes on a lower device.
pub fn window(place: Place, len: Bytes, resolver: &mut Resolver<'_>) -> Option<(Arc<Layer>, Clip)> {
    let start = place.start.bytes()?;
    let below = resolver.device(place.device, start.checked_add(len)?);
    let clip = Clip { inner: below.map.clone(), start, len };
    Some((below, clip))
}

/// The part of a target's status that its map depends on.
struct StatusGuard {
    control: Arc<Control>,
    id: DeviceId,
    start: Sectors,
    matters: fn(&str) -> Option<String>,
    seen: Option<String>,
}

impl StatusGuard {
    fn status(&self) -> Option<String> {
        let table = self.control.status(self.id, Commit::No).ok()?;
        table.targets.into_iter().find(|target| target.start == self.start).map(|target| target.params)
    }
}

impl Guard for StatusGuard {
    fn unchanged(&self) -> bool {
        self.status().is_some_and(|status| (self.matters)(&status) == self.seen)
    }
}
