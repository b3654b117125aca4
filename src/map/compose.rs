//! Maps that are composed of other maps. Each lookup queries only those parts on which the answer depends.

use std::ops::Range;
use std::sync::Arc;

use super::{
    Extent, ExtentKind, FillMap, HoleMap, ask_expected, ask_now, checked_next_data, checked_next_hole, extent_of_inner,
};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// A device that is a single extent.
#[derive(Clone, Copy, Debug)]
pub struct Uniform {
    /// The length of the device.
    pub len: Bytes,
    /// What the device holds.
    pub kind: ExtentKind,
}

impl HoleMap for Uniform {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        if offset < self.len { Extent { end: self.len, kind: self.kind } } else { Extent::outside(offset) }
    }

    fn allocated(&self) -> Option<Bytes> {
        Some(if self.kind.is_data() { self.len } else { Bytes::ZERO })
    }

    fn is_guarded(&self) -> bool {
        true
    }
}

/// A range of another device, such as a partition of a disk or a segment of a device-mapper table. The part of the range
/// that lies beyond the end of `inner` is data.
pub struct Clip {
    /// The map of the other device.
    pub inner: Arc<dyn HoleMap>,
    /// The start of the range in `inner`.
    pub start: Bytes,
    /// The length of the range.
    pub len: Bytes,
}

impl Clip {
    fn extent_by<E>(&self, offset: Bytes, ask: impl Fn(&dyn HoleMap, Bytes) -> Result<Extent, E>) -> Result<Extent, E> {
        if offset >= self.len {
            return Ok(Extent::outside(offset));
        }
        let at = self.start.checked_add(offset);
        extent_of_inner((&*self.inner, at), self.len, |end| end.saturating_sub(self.start), ask)
    }
}

impl HoleMap for Clip {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let Ok(extent) = self.extent_by(offset, ask_now);
        extent
    }

    fn expected_extent(&self, offset: Bytes) -> Option<Extent> {
        self.extent_by(offset, ask_expected).ok()
    }

    fn next_data(&self, offset: Bytes) -> Bytes {
        match self.start.checked_add(offset).filter(|&at| at < self.inner.len()) {
            // Where `inner` has no more data, it returns its length. The bytes of the range that follow are data.
            Some(at) => checked_next_data(&*self.inner, at).saturating_sub(self.start).min(self.len),
            None => offset.min(self.len),
        }
    }

    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        let at = self.start.checked_add(offset).filter(|&at| at < self.inner.len())?;
        let hole = checked_next_hole(&*self.inner, at)?;
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

    fn is_guarded(&self) -> bool {
        self.inner.is_guarded()
    }

    fn memory(&self) -> Bytes {
        self.inner.memory()
    }
}

/// A device whose segments follow each other, each of which is all of another device.
pub struct Concat {
    segments: Vec<PlacedMap>,
}

/// A map, and the range of the composed device that it describes.
struct PlacedMap {
    map: Arc<dyn HoleMap>,
    start: Bytes,
    end: Bytes,
}

impl Concat {
    /// The concatenation of `segments`, or `None` if the sum of their lengths does not fit in 64 bits.
    pub fn new(segments: Vec<Arc<dyn HoleMap>>) -> Option<Self> {
        let mut placed: Vec<PlacedMap> = Vec::with_capacity(segments.len());
        let mut start = Bytes::ZERO;
        for map in segments {
            let end = start.checked_add(map.len())?;
            if start < end {
                placed.push(PlacedMap { map, start, end });
            }
            start = end;
        }
        Some(Self { segments: placed })
    }

    fn extent_by<E>(&self, offset: Bytes, ask: impl Fn(&dyn HoleMap, Bytes) -> Result<Extent, E>) -> Result<Extent, E> {
        let index = self.segments.partition_point(|segment| segment.end <= offset);
        let Some(segment) = self.segments.get(index) else { return Ok(Extent::outside(offset)) };
        let extent = ask(&*segment.map, offset.saturating_sub(segment.start))?;
        Ok(Extent { end: segment.start.saturating_add(extent.end).min(segment.end), kind: extent.kind })
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
        let Ok(extent) = self.extent_by(offset, ask_now);
        extent
    }

    fn expected_extent(&self, offset: Bytes) -> Option<Extent> {
        self.extent_by(offset, ask_expected).ok()
    }

    fn allocated(&self) -> Option<Bytes> {
        self.maps().try_fold(Bytes::ZERO, |sum, map| sum.checked_add(map.allocated()?))
    }

    fn dense_because(&self) -> Option<DenseReason> {
        all_dense(self.maps())
    }

    fn is_guarded(&self) -> bool {
        self.maps().all(HoleMap::is_guarded)
    }

    fn fill_map(&self) -> Option<&FillMap> {
        match self.segments.as_slice() {
            [whole] => whole.map.fill_map(),
            _ => None,
        }
    }

    fn memory(&self) -> Bytes {
        memory_of(self.maps())
    }
}

/// A device of several layers, each byte of which is read from one of the layers: a thin device over its external origin,
/// the exceptions of a snapshot over its origin, the legs of a mirror.
///
/// The map does not depend on which layer a byte is read from: a range is a hole only where every layer has a hole. The hole
/// is of the kind that all layers have in common, or a plain [`ExtentKind::Hole`] where their kinds differ. Beyond its end a
/// layer is data; where it is known to read as zeros, the caller appends a [`Uniform`] hole to it. A device without any
/// layers is data.
pub struct Overlay {
    /// The layers. A layer is queried only where all layers before it have holes.
    pub layers: Vec<Arc<dyn HoleMap>>,
    /// The length of the device.
    pub len: Bytes,
}

impl Overlay {
    fn extent_by<E>(&self, offset: Bytes, ask: impl Fn(&dyn HoleMap, Bytes) -> Result<Extent, E>) -> Result<Extent, E> {
        if offset >= self.len {
            return Ok(Extent::outside(offset));
        }
        let mut answer: Option<Extent> = None;
        for layer in self.maps() {
            let extent = ask(layer, offset)?;
            if extent.kind.is_data() {
                answer = Some(extent);
                break;
            }
            answer = Some(match answer {
                None => extent,
                Some(above) => Extent { end: above.end.min(extent.end), kind: above.kind.combined_with(extent.kind) },
            });
        }
        let answer = answer.unwrap_or(Extent { end: self.len, kind: ExtentKind::Data });
        Ok(Extent { end: answer.end.min(self.len), kind: answer.kind })
    }

    fn maps(&self) -> impl Iterator<Item = &dyn HoleMap> {
        self.layers.iter().map(|layer| &**layer)
    }
}

impl HoleMap for Overlay {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let Ok(extent) = self.extent_by(offset, ask_now);
        extent
    }

    fn expected_extent(&self, offset: Bytes) -> Option<Extent> {
        self.extent_by(offset, ask_expected).ok()
    }

    fn allocated(&self) -> Option<Bytes> {
        // The number is known if one layer is all data, or if all layers but one are all hole.
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

    fn is_guarded(&self) -> bool {
        self.maps().all(HoleMap::is_guarded)
    }

    fn memory(&self) -> Bytes {
        memory_of(self.maps())
    }
}

/// Bytes of data in the `len` bytes of `map` from `start` on. `None` where the number for the whole map does not determine
/// that of the range. The part beyond the end of the map counts as data.
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

/// Why a device is dense, if all of its parts are: the reasons of the parts, without repetitions.
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

/// The memory of all parts together. A part that occurs twice counts twice.
pub(super) fn memory_of<'a>(maps: impl Iterator<Item = &'a dyn HoleMap>) -> Bytes {
    maps.fold(Bytes::ZERO, |sum, map| sum.saturating_add(map.memory()))
}
