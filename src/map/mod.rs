//! Hole maps: which ranges of a device are proven to read as zeros.
//!
//! Nothing here knows of devices. A source (see [`crate::source`]) makes the leaves; this module composes them the way
//! devices are stacked and keeps large answers small.
//! [`view`] turns a map into the exact answers of lseek(2).

mod compose;
mod fill;
#[cfg(test)]
mod model;
mod stripe;
#[cfg(test)]
mod tests;
pub mod view;

pub use compose::{Clip, Concat, Overlay, Uniform};
pub use fill::{Block, FillBuilder, FillMap, Filler};
pub use stripe::{Stripe, Unstripe};

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Once;

use crate::reason::DenseReason;
use crate::units::Bytes;

/// What a range holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Bytes that must be read. Always a correct answer.
    Data,
    /// Proven to read as zeros now.
    Hole,
}

/// The rest of a run: from the offset that was asked to `end`, everything is of one `kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first byte after the run.
    pub end: Bytes,
    /// What the run holds.
    pub kind: Kind,
}

impl Extent {
    /// The answer to an offset that is not below the length: data that ends one byte later.
    pub fn outside(offset: Bytes) -> Self {
        Self { end: offset.saturating_add(Bytes::new(1)), kind: Kind::Data }
    }
}

/// A device's ranges of data and holes.
///
/// An answer never fails: what a map cannot know, it calls data (and its source logs why).
pub trait HoleMap: Send + Sync {
    /// The length of the device.
    fn len(&self) -> Bytes;

    /// Whether the device has no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == Bytes::ZERO
    }

    /// The run that holds `offset`, which must be below [`HoleMap::len`].
    ///
    /// `offset < end <= len`. The run need not be maximal: the next one may be of the same kind. An offset that is not
    /// below the length answers data that ends one byte later, so that a caller's loop always advances.
    fn extent_at(&self, offset: Bytes) -> Extent;

    /// The first byte of data at or after `offset`; the length if there is none.
    ///
    /// For maps that find it at less cost than run by run, as [`HoleMap::next_hole`] is.
    fn next_data(&self, offset: Bytes) -> Bytes {
        next_data_by_runs(self, offset)
    }

    /// The first hole at or after `offset`: where it begins, and up to where it is known to reach. It may reach further.
    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        next_hole_by_runs(self, offset)
    }

    /// Bytes of data within `range`, which must not leave the map, where they can be counted faster than run by run.
    ///
    /// Seen in units of `unit` bytes, as [`view`] sees a map: a hole that is none there counts as data.
    fn count_data(&self, _range: &Range<Bytes>, _unit: Bytes) -> Option<Bytes> {
        None
    }

    /// Bytes that are data, where that is known without a walk over the whole map.
    fn allocated(&self) -> Option<Bytes> {
        None
    }

    /// Whether there is a hole of 4096 bytes or more, where that is known without a walk.
    fn is_sparse(&self) -> Option<bool> {
        None
    }

    /// Why everything is data, where the map can find no holes at all. May be known only after a first [`HoleMap::extent_at`].
    fn dense_because(&self) -> Option<DenseReason> {
        None
    }

    /// Memory that the map holds, for the byte budget of the cache.
    fn memory(&self) -> Bytes {
        Bytes::ZERO
    }
}

/// Asks `map`, and believes it only as far as [`HoleMap::extent_at`] allows: an answer that does not advance, or leaves
/// the device, makes the rest of the device data. Beyond its end a map is data.
fn ask(map: &dyn HoleMap, offset: Bytes) -> Extent {
    let len = map.len();
    if offset >= len {
        return Extent { end: Bytes::MAX, kind: Kind::Data };
    }
    believe(map.extent_at(offset), offset, len)
}

fn believe(run: Extent, offset: Bytes, len: Bytes) -> Extent {
    if offset < run.end && run.end <= len {
        return run;
    }
    disbelieve(&run, offset, len);
    Extent { end: len, kind: Kind::Data }
}

/// [`HoleMap::next_data`], found run by run.
pub fn next_data_by_runs<M: HoleMap + ?Sized>(map: &M, offset: Bytes) -> Bytes {
    let mut at = offset;
    while at < map.len() {
        let run = believe(map.extent_at(at), at, map.len());
        if run.kind == Kind::Data {
            return at;
        }
        at = run.end;
    }
    map.len()
}

/// [`HoleMap::next_hole`], found run by run.
pub fn next_hole_by_runs<M: HoleMap + ?Sized>(map: &M, offset: Bytes) -> Option<Range<Bytes>> {
    let mut at = offset;
    while at < map.len() {
        let run = believe(map.extent_at(at), at, map.len());
        if run.kind == Kind::Hole {
            return Some(at..run.end);
        }
        at = run.end;
    }
    None
}

/// [`HoleMap::next_data`] of an `offset` below the length, believed as [`ask`] believes.
fn next_data(map: &dyn HoleMap, offset: Bytes) -> Bytes {
    let data = map.next_data(offset);
    if offset <= data && data <= map.len() {
        return data;
    }
    disbelieve(&data, offset, map.len());
    offset
}

/// [`HoleMap::next_hole`] of an `offset` below the length, believed as [`ask`] believes.
fn next_hole(map: &dyn HoleMap, offset: Bytes) -> Option<Range<Bytes>> {
    let hole = map.next_hole(offset).filter(|_| offset < map.len())?;
    if offset <= hole.start && hole.start < hole.end && hole.end <= map.len() {
        return Some(hole);
    }
    disbelieve(&hole, offset, map.len());
    None
}

fn disbelieve(answer: &dyn Debug, offset: Bytes, len: Bytes) {
    static WARNED: Once = Once::new();
    WARNED.call_once(|| log::warn!("a hole map answered {answer:?} at {offset} of {len}: taken as data"));
}
