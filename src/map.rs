//! Hole maps: which ranges of a device are proven to read as zeros.
//!
//! This module knows no devices. Each source in [`crate::source`] makes the map of one device or image. The types here
//! compose such maps the same way as the devices are stacked, and [`view`] computes the answers of lseek(2) from a map.

mod change;
mod compose;
mod either;
mod fill;
mod free;
#[cfg(test)]
mod model;
mod stripe;
#[cfg(test)]
mod tests;
pub mod view;
mod written;

pub use change::ChangeMap;
pub use compose::{Clip, Concat, Overlay, Uniform};
pub use either::Either;
pub use fill::{Block, FillBuilder, FillMap, Filler};
pub use free::FreeSpace;
pub use stripe::{Stripe, Unstripe};
pub use written::{Written, WrittenRanges};

use std::convert::Infallible;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Once;

use crate::reason::{Degraded, DenseReason};
use crate::units::Bytes;

/// What an extent holds. There is one kind of data and there are several kinds of holes.
///
/// A range of any kind of hole reads as zeros from the file that the map is of. lseek(2) does not distinguish between the
/// kinds of holes; the printed map does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Bytes that must be read. This is always a correct answer.
    Data,
    /// A hole: the range is proven to read as zeros now.
    Hole,
    /// A hole in a file that shows only what changed since a snapshot: the range has not changed.
    Unchanged,
    /// A hole in a file that shows only the used space of a device: the range is free space.
    Free,
}

impl ExtentKind {
    /// Whether the range must be read.
    pub const fn is_data(self) -> bool {
        matches!(self, Self::Data)
    }

    /// Whether the range is proven to read as zeros.
    pub const fn is_hole(self) -> bool {
        !self.is_data()
    }

    /// The kind of a range in which both kinds occur, or of which two layers have these kinds: data if either is data, and
    /// a plain hole for two different kinds of holes.
    const fn combined_with(self, other: Self) -> Self {
        match (self, other) {
            (Self::Data, _) | (_, Self::Data) => Self::Data,
            (Self::Unchanged, Self::Unchanged) => Self::Unchanged,
            (Self::Free, Self::Free) => Self::Free,
            (Self::Hole | Self::Unchanged | Self::Free, _) => Self::Hole,
        }
    }
}

/// A range of one kind. It begins at the offset that was passed to [`HoleMap::extent_at`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first byte after the range.
    pub end: Bytes,
    /// What the range holds.
    pub kind: ExtentKind,
}

impl Extent {
    /// The answer for an offset at or beyond the end of the device: one byte of data.
    pub fn outside(offset: Bytes) -> Self {
        Self { end: offset.saturating_add(Bytes::new(1)), kind: ExtentKind::Data }
    }
}

/// The data and holes of a device.
///
/// No method fails. A range about which a map has no information is data, and the source logs why.
pub trait HoleMap: Send + Sync {
    /// The length of the device.
    fn len(&self) -> Bytes;

    /// Whether the device has no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == Bytes::ZERO
    }

    /// The extent from `offset` on, with `offset < end <= len`.
    ///
    /// It need not be maximal: the next extent may be of the same kind. For an `offset` that is not below
    /// [`HoleMap::len`] the answer is [`Extent::outside`] or longer data, so that a loop over extents always advances.
    fn extent_at(&self, offset: Bytes) -> Extent;

    /// The extent from `offset` on as far as it is known without a query that takes long: a hint for reading ahead, and no
    /// promise. `None` where nothing is known. In a map whose source is not queried live it is [`HoleMap::extent_at`].
    fn expected_extent(&self, offset: Bytes) -> Option<Extent> {
        Some(self.extent_at(offset))
    }

    /// The first byte of data at or after `offset`, or the length if there is none.
    ///
    /// A map implements this, or [`HoleMap::next_hole`], where it finds the answer faster than extent by extent.
    fn next_data(&self, offset: Bytes) -> Bytes {
        next_data_by_extents(self, offset)
    }

    /// The first hole at or after `offset`, of any kind. The hole may continue after the end of the returned range.
    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        next_hole_by_extents(self, offset)
    }

    /// As [`HoleMap::next_data`], if the answer holds whatever the lengths of the layers are now: a look at the source below all
    /// of them found data there. It is below [`HoleMap::len`].
    fn data_inside(&self, _offset: Bytes) -> Option<Bytes> {
        None
    }

    /// As [`HoleMap::next_hole`], if the answer holds whatever the lengths of the layers are now.
    fn hole_inside(&self, _offset: Bytes) -> Option<Range<Bytes>> {
        None
    }

    /// Bytes of data within `range`, which must lie within the map. `None` where the map cannot count them faster than
    /// extent by extent.
    ///
    /// Holes are rounded inwards to `unit` bytes, as in [`view`]: the parts that are rounded off count as data.
    fn count_data(&self, _range: &Range<Bytes>, _unit: Bytes) -> Option<Bytes> {
        None
    }

    /// Bytes of data of the whole device. `None` where that takes a walk over the map.
    fn allocated(&self) -> Option<Bytes> {
        None
    }

    /// Whether there is a hole of 4096 bytes or more. `None` where that takes a walk over the map.
    fn is_sparse(&self) -> Option<bool> {
        None
    }

    /// Why the map can find no holes at all, if so. Some maps know it only after the first [`HoleMap::extent_at`].
    fn dense_because(&self) -> Option<DenseReason> {
        None
    }

    /// Since when the source of the map fails to answer, and why, if it failed at the last query. A composition does not have
    /// this of its parts: each of them is the map of a layer.
    fn degraded(&self) -> Option<Degraded> {
        None
    }

    /// Whether the guards of the stack notice each change of the extents, as those of extents that are stored in metadata do.
    /// A source that is queried at each question may have other extents at any time.
    fn is_guarded(&self) -> bool {
        false
    }

    /// The extents as a bitmap, where they are stored as one: a mapped block is data, and every other block is a hole. So
    /// they can be copied without a walk over all extents.
    fn fill_map(&self) -> Option<&FillMap> {
        None
    }

    /// The memory that the map occupies, which counts towards the limit of all maps of a mount.
    fn memory(&self) -> Bytes {
        Bytes::ZERO
    }
}

/// [`HoleMap::extent_at`] with a check of the answer. An extent that does not advance or that ends beyond the device is
/// replaced by data up to the end of the device. At and beyond the end of the map there is data without end.
fn checked_extent(map: &dyn HoleMap, offset: Bytes) -> Extent {
    let Ok(extent) = ask_now(map, offset);
    extent
}

/// Asks a part of a composition for the extent that is true now: [`checked_extent`].
fn ask_now(map: &dyn HoleMap, offset: Bytes) -> Result<Extent, Infallible> {
    checked(map, offset, || Ok(map.extent_at(offset)))
}

/// Nothing is known of an offset without a query.
struct NothingExpected;

/// Asks a part of a composition for [`HoleMap::expected_extent`], with the check of [`checked_extent`].
fn ask_expected(map: &dyn HoleMap, offset: Bytes) -> Result<Extent, NothingExpected> {
    checked(map, offset, || map.expected_extent(offset).ok_or(NothingExpected))
}

fn checked<E>(map: &dyn HoleMap, offset: Bytes, ask: impl FnOnce() -> Result<Extent, E>) -> Result<Extent, E> {
    let len = map.len();
    match offset < len {
        true => ask().map(|extent| valid_or_data(extent, offset, len)),
        false => Ok(Extent { end: Bytes::MAX, kind: ExtentKind::Data }),
    }
}

/// The extent of a device of `len` bytes all of which are bytes of `inner`: what `ask` says of `inner` at `at`, whose end
/// `back` moves to the device. Data up to the end of the device where `inner` has no such byte.
fn extent_of_inner<E>(
    (inner, at): (&dyn HoleMap, Option<Bytes>),
    len: Bytes,
    back: impl FnOnce(Bytes) -> Bytes,
    ask: impl Fn(&dyn HoleMap, Bytes) -> Result<Extent, E>,
) -> Result<Extent, E> {
    let Some(at) = at.filter(|&at| at < inner.len()) else { return Ok(Extent { end: len, kind: ExtentKind::Data }) };
    ask(inner, at).map(|extent| Extent { end: back(extent.end).min(len), kind: extent.kind })
}

/// `extent` if it keeps the contract of [`HoleMap::extent_at`], else data up to the end of the device.
fn valid_or_data(extent: Extent, offset: Bytes, len: Bytes) -> Extent {
    if offset < extent.end && extent.end <= len {
        return extent;
    }
    warn_of_invalid(&extent, offset, len);
    Extent { end: len, kind: ExtentKind::Data }
}

/// The default of [`HoleMap::next_data`], which goes from extent to extent.
pub fn next_data_by_extents<M: HoleMap + ?Sized>(map: &M, offset: Bytes) -> Bytes {
    let mut at = offset;
    while at < map.len() {
        let extent = valid_or_data(map.extent_at(at), at, map.len());
        if extent.kind.is_data() {
            return at;
        }
        at = extent.end;
    }
    map.len()
}

/// The default of [`HoleMap::next_hole`], which goes from extent to extent.
pub fn next_hole_by_extents<M: HoleMap + ?Sized>(map: &M, offset: Bytes) -> Option<Range<Bytes>> {
    let mut at = offset;
    while at < map.len() {
        let extent = valid_or_data(map.extent_at(at), at, map.len());
        if extent.kind.is_hole() {
            return Some(at..extent.end);
        }
        at = extent.end;
    }
    None
}

/// [`HoleMap::next_data`] from an `offset` below the length. An answer out of bounds is replaced by data at `offset`.
fn checked_next_data(map: &dyn HoleMap, offset: Bytes) -> Bytes {
    let data = map.next_data(offset);
    if offset <= data && data <= map.len() {
        return data;
    }
    warn_of_invalid(&data, offset, map.len());
    offset
}

/// [`HoleMap::next_hole`] from an `offset` below the length. An answer out of bounds counts as no hole.
fn checked_next_hole(map: &dyn HoleMap, offset: Bytes) -> Option<Range<Bytes>> {
    let hole = map.next_hole(offset).filter(|_| offset < map.len())?;
    if offset <= hole.start && hole.start < hole.end && hole.end <= map.len() {
        return Some(hole);
    }
    warn_of_invalid(&hole, offset, map.len());
    None
}

/// Logs, once for all maps, that a map returned something invalid.
fn warn_of_invalid(answer: &dyn Debug, offset: Bytes, len: Bytes) {
    static WARNED: Once = Once::new();
    WARNED.call_once(|| log::warn!("a hole map returned {answer:?} at {offset} of {len}: used as data"));
}
