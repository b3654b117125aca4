//! Compositions whose cost follows the answer: one question to each part that the answer depends on.

use std::ops::Range;
use std::sync::Arc;

use super::{Extent, HoleMap, Kind, ask, next_data, next_hole};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// A range of one kind.
#[derive(Clone, Copy, Debug)]
pub struct Uniform {
    /// Its length.
    pub len: Bytes,
    /// What it holds.
    pub kind: Kind,
}

impl HoleMap for Uniform {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        if offset < self.len { Extent { end: self.len, kind: self.kind } } else { Extent::outside(offset) }
    }

    fn allocated(&self) -> Option<Bytes> {
        Some(match self.kind {
            Kind::Data => self.len,
            Kind::Hole => Bytes::ZERO,
        })
    }
}

/// A window on another map: a partition, a segment of a table. What lies beyond the inner map's end is data.
pub struct Clip {
    /// The map that is looked at.
    pub inner: Arc<dyn HoleMap>,
    /// Where the window starts in `inner`.
    pub start: Bytes,
    /// The length of the window.
    pub len: Bytes,
}

impl HoleMap for Clip {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        if offset >= self.len {
            return Extent::outside(offset);
        }
        match self.start.checked_add(offset).filter(|&at| at < self.inner.len()) {
            Some(at) => {
                let run = ask(&*self.inner, at);
                Extent { end: run.end.saturating_sub(self.start).min(self.len), kind: run.kind }
            }
            None => Extent { end: self.len, kind: Kind::Data },
        }
    }

    fn next_data(&self, offset: Bytes) -> Bytes {
        match self.start.checked_add(offset).filter(|&at| at < self.inner.len()) {
            // Where the inner map ends, data begins.
            Some(at) => next_data(&*self.inner, at).saturating_sub(self.start).min(self.len),
            None => offset.min(self.len),
        }
    }

    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        let at = self.start.checked_add(offset).filter(|&at| at < self.inner.len())?;
        let hole = next_hole(&*self.inner, at)?;
        let within = |at: Bytes| at.saturating_sub(self.start).min(self.len);
        Some(within(hole.start)..within(hole.end)).filter(|hole| hole.start < hole.end)
    }

    fn allocated(&self) -> Option<Bytes> {
        allocated_within(&*self.inner, self.start, self.len)
    }

    fn dense_because(&self) -> Option<DenseReason> {
        if self.start >= self.inner.len() && !self.is_empty() {
            return Some("it lies beyond the end of the device below".into());
        }
        self.inner.dense_because()
    }

    fn memory(&self) -> Bytes {
        self.inner.memory()
    }
}

/// Segments one after the other.
pub struct Concat {
    segments: Vec<Segment>,
}

struct Segment {
    map: Arc<dyn HoleMap>,
    start: Bytes,
    end: Bytes,
}

impl Concat {
    /// Puts `segments` one after the other, or `None` where their lengths add up to more than a position can hold.
    pub fn new(segments: Vec<Arc<dyn HoleMap>>) -> Option<Self> {
        let mut placed: Vec<Segment> = Vec::with_capacity(segments.len());
        let mut start = Bytes::ZERO;
        for map in segments {
            let end = start.checked_add(map.len())?;
            if start < end {
                placed.push(Segment { map, start, end });
            }
            start = end;
        }
        Some(Self { segments: placed })
    }

    fn maps(&self) -> impl Iterator<Item = &dyn HoleMap> {
        self.segments.iter().map(|segment| &*segment.map)
    }
}

impl HoleMap for Concat {
    fn len(&self) -> Bytes {
        self.segments.last().map_or(Bytes::ZERO, |segment| segment.end)
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let index = self.segments.partition_point(|segment| segment.end <= offset);
        let Some(segment) = self.segments.get(index) else { return Extent::outside(offset) };
        let run = ask(&*segment.map, offset.saturating_sub(segment.start));
        Extent { end: segment.start.saturating_add(run.end).min(segment.end), kind: run.kind }
    }

    fn allocated(&self) -> Option<Bytes> {
        self.maps().try_fold(Bytes::ZERO, |sum, map| sum.checked_add(map.allocated()?))
    }

    fn dense_because(&self) -> Option<DenseReason> {
        all_dense(self.maps())
    }

    fn memory(&self) -> Bytes {
        memory_of(self.maps())
    }
}

/// Layers, of which a range is a hole only where every layer has one: a thin device over its external origin, snapshot
/// exceptions over the origin, the legs of a mirror. A layer is data beyond its end; where it is known to read as
/// zeros there, it is to be continued by a [`Uniform`] hole. No layers at all are data.
pub struct Overlay {
    /// The layers. Those that come first are asked first, and the others only where these have holes.
    pub layers: Vec<Arc<dyn HoleMap>>,
    /// The length of the device.
    pub len: Bytes,
}

impl Overlay {
    fn maps(&self) -> impl Iterator<Item = &dyn HoleMap> {
        self.layers.iter().map(|layer| &**layer)
    }
}

impl HoleMap for Overlay {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        if offset >= self.len {
            return Extent::outside(offset);
        }
        let mut end = self.len;
        for layer in self.maps() {
            let run = ask(layer, offset);
            if run.kind == Kind::Data {
                return Extent { end: run.end.min(self.len), kind: Kind::Data };
            }
            end = end.min(run.end);
        }
        Extent { end, kind: if self.layers.is_empty() { Kind::Data } else { Kind::Hole } }
    }

    fn allocated(&self) -> Option<Bytes> {
        // Known where all layers but one are a single hole, or where one layer is data throughout.
        let mut count = Some(if self.layers.is_empty() { self.len } else { Bytes::ZERO });
        for layer in self.maps() {
            match allocated_within(layer, Bytes::ZERO, self.len) {
                Some(all) if all == self.len => return Some(all),
                Some(Bytes::ZERO) => {}
                some => count = if count == Some(Bytes::ZERO) { some } else { None },
            }
        }
        count
    }

    fn dense_because(&self) -> Option<DenseReason> {
        self.maps().find_map(HoleMap::dense_because)
    }

    fn memory(&self) -> Bytes {
        memory_of(self.maps())
    }
}

/// Bytes of data in a window of `map`, where that follows from the number for the whole map.
pub(super) fn allocated_within(map: &dyn HoleMap, start: Bytes, len: Bytes) -> Option<Bytes> {
    let inside = map.len().saturating_sub(start).min(len);
    let beyond = len.saturating_sub(inside);
    if inside == Bytes::ZERO {
        return Some(beyond);
    }
    match map.allocated()? {
        Bytes::ZERO => Some(beyond),
        all if all >= map.len() => Some(len),
        some if inside == map.len() => some.checked_add(beyond),
        _ => None,
    }
}

/// The reasons of all parts, each once, where all parts are dense.
pub(super) fn all_dense<'a>(maps: impl Iterator<Item = &'a dyn HoleMap>) -> Option<DenseReason> {
    let mut reasons: Vec<DenseReason> = Vec::new();
    for map in maps {
        let reason = map.dense_because()?;
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
    }
    match reasons.len() {
        0 => None,
        1 => reasons.pop(),
        _ => Some(DenseReason::Parts(reasons)),
    }
}

/// What the parts hold together. A part that is used twice counts twice.
pub(super) fn memory_of<'a>(maps: impl Iterator<Item = &'a dyn HoleMap>) -> Bytes {
    maps.fold(Bytes::ZERO, |sum, map| sum.saturating_add(map.memory()))
}
