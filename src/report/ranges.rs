//! The ranges that a form lists, where it lists only one kind of range.

use std::io;
use std::ops::Range;

use super::{Extents, Subject};
use crate::map::ExtentKind;
use crate::units::Bytes;

/// Whether a form that has one kind of range lists extents of that kind.
///
/// A map of data and holes lists the data. A map of changes lists all that is not unchanged. That includes zeros: without them,
/// a program that writes the listed ranges over the older device would keep the old bytes there.
pub fn is_listed(kind: ExtentKind, subject: &Subject<'_>) -> bool {
    match subject.since {
        Some(_) => kind != ExtentKind::Unchanged,
        None => kind.is_data(),
    }
}

/// Calls `each` with the listed ranges, rounded outwards to blocks of `block` bytes and merged where they touch. The last one
/// ends with the device if its last block is not whole.
///
/// # Errors
/// As `each`, and what `extents` returns.
pub fn listed(
    subject: &Subject<'_>,
    block: Bytes,
    extents: Extents<'_>,
    mut each: impl FnMut(Range<Bytes>) -> io::Result<()>,
) -> io::Result<()> {
    let mut waiting: Option<Range<Bytes>> = None;
    for extent in extents {
        let (start, extent) = extent?;
        if !is_listed(extent.kind, subject) {
            continue;
        }
        let start = start.align_down(block);
        let end = extent.end.align_up(block).unwrap_or(subject.len).min(subject.len).max(extent.end);
        waiting = match waiting {
            Some(before) if start <= before.end => Some(before.start..end),
            Some(before) => each(before).map(|()| Some(start..end))?,
            None => Some(start..end),
        };
    }
    waiting.map_or(Ok(()), each)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::Extent;

    #[test]
    fn ranges_are_rounded_outwards_and_merged() {
        let extents =
            [(0, 4095, true), (4095, 5000, false), (5000, 5001, true), (5001, 9000, false), (9000, 9001, true)];
        let of = |block: u64| {
            let subject = Subject { len: Bytes::new(9001), part: (Bytes::ZERO, None), since: None };
            let kind = |data| if data { ExtentKind::Data } else { ExtentKind::Hole };
            let mut extents = extents.iter().map(|(start, end, data)| {
                Ok((Bytes::new(*start), Extent { end: Bytes::new(*end), kind: kind(*data) }))
            });
            let mut found = Vec::new();
            let each = |range: Range<Bytes>| {
                found.push((range.start.get(), range.end.get()));
                Ok(())
            };
            listed(&subject, Bytes::new(block), &mut extents, each).unwrap();
            found
        };
        assert_eq!(of(1), [(0, 4095), (5000, 5001), (9000, 9001)]);
        assert_eq!(of(4096), [(0, 9001)]);
        assert_eq!(of(512), [(0, 4096), (4608, 5120), (8704, 9001)]);
    }
}
