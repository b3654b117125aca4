//! The answers of lseek(2), and the runs of the printed map, computed from any map.
//!
//! Clients that read with O_DIRECT need holes that start and end on their alignment. Therefore a device is divided into
//! units of `align` bytes, the last of which ends with the device. A unit is a hole if all of its bytes are in holes, and
//! data otherwise. So holes are rounded inwards, and the last hole ends with the device. A run is a maximal sequence of
//! units of one kind. A unit that holds several kinds of holes is a plain [`ExtentKind::Hole`].
//!
//! An `align` of zero means one byte.
//!
//! No function queries more of the map than its answer needs: a search for a hole ends at the first unit of the hole.

use std::ops::Range;

#[cfg(doc)]
use super::ExtentKind;
use super::{Extent, HoleMap, checked_extent, checked_next_data, checked_next_hole};
use crate::units::Bytes;

/// What lseek(2) searches for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// SEEK_DATA.
    Data,
    /// SEEK_HOLE, for a hole of any kind. The end of the device counts as a hole.
    Hole,
}

/// The first position at or after `offset` that is data, or in a hole. `None` stands for ENXIO: `offset` is not below the
/// end of the device, or there is no data at or after it.
pub fn seek(map: &dyn HoleMap, align: Bytes, offset: Bytes, whence: Whence) -> Option<Bytes> {
    if offset >= map.len() {
        return None;
    }
    let align = align.max(Bytes::new(1));
    let unit = offset.align_down(align);
    let found = match whence {
        Whence::Data => {
            Some(checked_next_data(map, unit)).filter(|&data| data < map.len()).map(|data| data.align_down(align))
        }
        Whence::Hole => Some(first_hole_unit(map, align, unit)),
    };
    found.map(|found| found.max(offset))
}

/// As [`seek`], if the answer lies inside of the device and holds whatever the lengths of its layers are now.
pub fn seek_inside(map: &dyn HoleMap, align: Bytes, offset: Bytes, whence: Whence) -> Option<Bytes> {
    let align = align.max(Bytes::new(1));
    let unit = offset.align_down(align);
    let found = match whence {
        Whence::Data => map.data_inside(unit).filter(|&data| unit <= data)?.align_down(align),
        Whence::Hole => {
            let hole = map.hole_inside(unit).filter(|hole| unit <= hole.start)?;
            hole.start.align_up(align).filter(|unit| unit.checked_add(align).is_some_and(|end| end <= hole.end))?
        }
    };
    (found.max(offset) < map.len()).then(|| found.max(offset))
}

/// The first unit, from `unit` on, that is a hole; the length if there is none.
fn first_hole_unit(map: &dyn HoleMap, align: Bytes, unit: Bytes) -> Bytes {
    let len = map.len();
    let mut found = checked_next_hole(map, unit);
    while let Some(hole) = found {
        let Some(unit) = hole.start.align_up(align).filter(|&unit| unit < len) else { break };
        if hole.end >= unit.saturating_add(align).min(len) {
            return unit;
        }
        // The rest of the unit is not known yet: either the hole continues there, or there is data.
        found = checked_next_hole(map, hole.end)
            .map(|next| if next.start == hole.end { hole.start..next.end } else { next });
    }
    len
}

/// Whether [`seek`] finds a hole before the end of the device.
pub fn has_hole(map: &dyn HoleMap, align: Bytes) -> bool {
    has_hole_of(map.is_sparse(), align)
        .unwrap_or_else(|| first_hole_unit(map, align.max(Bytes::new(1)), Bytes::ZERO) < map.len())
}

/// Whether [`seek`] finds a hole, of a map with that [`HoleMap::is_sparse`]; `None` where that does not decide it.
pub fn has_hole_of(is_sparse: Option<bool>, align: Bytes) -> Option<bool> {
    // A hole of 4096 bytes need not hold a larger unit.
    is_sparse.filter(|_| align <= Bytes::new(4096))
}

/// Bytes of data within `range`. `None` where the map cannot count them faster than extent by extent.
pub fn count_data(map: &dyn HoleMap, align: Bytes, range: &Range<Bytes>) -> Option<Bytes> {
    let len = range.end.saturating_sub(range.start);
    let inside = range.start <= range.end && range.end <= map.len();
    let count = if inside { map.count_data(range, align.max(Bytes::new(1))) } else { None };
    count.filter(|&count| count <= len)
}

/// The runs within `range`, each with its start. Neighbouring runs differ in kind, and each kind of hole has runs of its
/// own. A run that leaves the range is cut there.
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

/// A map in units of `align` bytes. It remembers the last extent, so that a walk queries each extent of the map once.
struct View<'a> {
    map: &'a dyn HoleMap,
    len: Bytes,
    align: Bytes,
    /// The end of the last unit that is needed: at the most the length.
    limit: Bytes,
    /// The last extent, with its start.
    last: Option<(Bytes, Extent)>,
}

impl<'a> View<'a> {
    fn new(map: &'a dyn HoleMap, align: Bytes, limit: Bytes) -> Self {
        let len = map.len();
        let align = align.max(Bytes::new(1));
        let limit = limit.align_up(align).map_or(len, |unit_end| unit_end.min(len));
        Self { map, len, align, limit, last: None }
    }

    fn extent(&mut self, offset: Bytes) -> Extent {
        match self.last {
            Some((start, extent)) if start <= offset && offset < extent.end => extent,
            _ => {
                let extent = checked_extent(self.map, offset);
                self.last = Some((offset, extent));
                extent
            }
        }
    }

    /// The rest of the run that holds `offset`, which is below the limit.
    fn run(&mut self, offset: Bytes) -> Extent {
        let mut run = self.units_from(offset.align_down(self.align));
        while run.end < self.limit {
            let next = self.units_from(run.end);
            if next.kind != run.kind {
                break;
            }
            run.end = next.end;
        }
        run
    }

    /// The kind of the unit that begins at `unit`, and the end of the following units that need no further query to be
    /// known as of the same kind.
    fn units_from(&mut self, unit: Bytes) -> Extent {
        let unit_end = unit.saturating_add(self.align).min(self.len);
        let first = self.extent(unit);
        if first.kind.is_hole() && first.end >= unit_end {
            // The unit at the end of the hole is not whole, unless the device ends there.
            let end = if first.end < self.len { first.end.align_down(self.align) } else { self.len };
            return Extent { end, kind: first.kind };
        }
        let (mut extent, mut kind) = (first, first.kind);
        while kind.is_hole() && extent.end < unit_end {
            extent = self.extent(extent.end);
            kind = kind.combined_with(extent.kind);
        }
        // Every unit in which there is a part of an extent of data is data.
        let end = if kind.is_data() { extent.end.align_up(self.align).unwrap_or(self.len) } else { unit_end };
        Extent { end: end.min(self.len), kind }
    }
}
