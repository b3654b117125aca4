//! The exact answers of lseek(2) over any map.
//!
//! Clients that read with O_DIRECT need holes that start and end on their alignment. So a device is seen in units of
//! `align` bytes (the last one ends with the device), and a unit is a hole if all of its bytes are. That rounds holes
//! inwards, merges neighbours of one kind wherever the map cuts them, and lets the last hole end with the device.
//!
//! An `align` of zero is taken as one byte.
//!
//! No answer walks further than it needs to: a hole counts as found when one unit of it is.

use std::ops::Range;

use super::{Extent, HoleMap, Kind, ask, next_data, next_hole};
use crate::units::Bytes;

/// What lseek(2) looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// SEEK_DATA.
    Data,
    /// SEEK_HOLE. A virtual hole lies at the end of the device.
    Hole,
}

/// The first position at or after `offset` that is of the wanted kind. `None` is ENXIO: `offset` is not below the end
/// of the device, or there is no data from there on.
pub fn seek(map: &dyn HoleMap, align: Bytes, offset: Bytes, whence: Whence) -> Option<Bytes> {
    if offset >= map.len() {
        return None;
    }
    let align = align.max(Bytes::new(1));
    let unit = offset.align_down(align);
    let found = match whence {
        Whence::Data => Some(next_data(map, unit)).filter(|&data| data < map.len()).map(|data| data.align_down(align)),
        Whence::Hole => Some(whole_hole(map, align, unit)),
    };
    found.map(|found| found.max(offset))
}

/// The first unit, from `unit` on, that is a hole; the length if there is none.
fn whole_hole(map: &dyn HoleMap, align: Bytes, unit: Bytes) -> Bytes {
    let len = map.len();
    let mut found = next_hole(map, unit);
    while let Some(hole) = found {
        let Some(unit) = hole.start.align_up(align).filter(|&unit| unit < len) else { break };
        if hole.end >= unit.saturating_add(align).min(len) {
            return unit;
        }
        // Not known to reach that far: it may go on, or there is data.
        found = next_hole(map, hole.end).map(|next| if next.start == hole.end { hole.start..next.end } else { next });
    }
    len
}

/// The rest of the run that holds `offset`, to where its kind really changes.
pub fn run(map: &dyn HoleMap, align: Bytes, offset: Bytes) -> Extent {
    if offset < map.len() { View::new(map, align, map.len()).run(offset) } else { Extent::outside(offset) }
}

/// Whether [`seek`] finds a hole before the end of the device.
pub fn has_hole(map: &dyn HoleMap, align: Bytes) -> bool {
    has_hole_of(map.is_sparse(), align)
        .unwrap_or_else(|| whole_hole(map, align.max(Bytes::new(1)), Bytes::ZERO) < map.len())
}

/// Whether [`seek`] finds a hole, of a map with that [`HoleMap::is_sparse`]; `None` where that does not decide it.
pub fn has_hole_of(is_sparse: Option<bool>, align: Bytes) -> Option<bool> {
    // A hole of 4096 bytes need not hold a larger unit.
    is_sparse.filter(|_| align <= Bytes::new(4096))
}

/// Bytes of data within `range`, where the map can count them without going through its runs.
pub fn count_data(map: &dyn HoleMap, align: Bytes, range: &Range<Bytes>) -> Option<Bytes> {
    let len = range.end.saturating_sub(range.start);
    let inside = range.start <= range.end && range.end <= map.len();
    let count = if inside { map.count_data(range, align.max(Bytes::new(1))) } else { None };
    count.filter(|&count| count <= len)
}

/// The runs within `range`, each with its start; kinds alternate. A run that leaves the range is cut there.
pub fn runs(map: &dyn HoleMap, align: Bytes, range: Range<Bytes>) -> impl Iterator<Item = (Bytes, Extent)> {
    let mut view = View::new(map, align, range.end);
    let end = range.end.min(view.len);
    let mut at = range.start;
    std::iter::from_fn(move || {
        let start = (at < end).then_some(at)?;
        let run = view.run(start);
        at = run.end.min(end);
        Some((start, Extent { end: at, kind: run.kind }))
    })
}

/// A map seen in units. Remembers the last answer, so that a walk asks for each of the map's runs once.
struct View<'a> {
    map: &'a dyn HoleMap,
    len: Bytes,
    align: Bytes,
    /// Where a walk stops: the end of a unit, or of the device.
    limit: Bytes,
    known: Option<(Bytes, Extent)>,
}

impl<'a> View<'a> {
    fn new(map: &'a dyn HoleMap, align: Bytes, limit: Bytes) -> Self {
        let len = map.len();
        let align = align.max(Bytes::new(1));
        let limit = limit.align_up(align).map_or(len, |unit_end| unit_end.min(len));
        Self { map, len, align, limit, known: None }
    }

    fn ask(&mut self, offset: Bytes) -> Extent {
        match self.known {
            Some((start, run)) if start <= offset && offset < run.end => run,
            _ => {
                let run = ask(self.map, offset);
                self.known = Some((offset, run));
                run
            }
        }
    }

    /// The rest of the run that holds `offset`, which is below the limit.
    fn run(&mut self, offset: Bytes) -> Extent {
        let unit = offset.align_down(self.align);
        let data = self.first_data(unit);
        if data > unit {
            Extent { end: data, kind: Kind::Hole }
        } else {
            Extent { end: self.first_hole(unit), kind: Kind::Data }
        }
    }

    /// The first unit, from `unit` on, that has a byte of data; the limit if there is none before it.
    fn first_data(&mut self, unit: Bytes) -> Bytes {
        let mut at = unit;
        while at < self.limit {
            let run = self.ask(at);
            if run.kind == Kind::Data {
                return at.align_down(self.align);
            }
            at = run.end;
        }
        self.limit
    }

    /// The first unit, from `unit` on, that is a hole; the limit if there is none before it.
    fn first_hole(&mut self, mut unit: Bytes) -> Bytes {
        while unit < self.limit {
            match self.data_in(unit) {
                // Every unit up to the end of the data has some.
                Some(end) => unit = end.align_up(self.align).unwrap_or(self.limit),
                None => return unit,
            }
        }
        self.limit
    }

    /// Where the first data in `unit` ends, or `None` if the unit is a hole.
    fn data_in(&mut self, unit: Bytes) -> Option<Bytes> {
        let unit_end = unit.saturating_add(self.align).min(self.len);
        let mut at = unit;
        while at < unit_end {
            let run = self.ask(at);
            if run.kind == Kind::Data {
                return Some(run.end);
            }
            at = run.end;
        }
        None
    }
}
