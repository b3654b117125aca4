//! What changed in an export of QEMU since a dirty bitmap of it was made.
//!
//! | bitmap | `base:allocation` | the range is |
//! |---|---|---|
//! | clean | any | unchanged |
//! | dirty | reads as zeros | a hole |
//! | dirty | any other | data |

use std::ops::Range;

use super::{Changes, Identity, IdentityValue};
use crate::error::{Error, Result};
use crate::map::{Block, ChangeMap, Extent, ExtentKind, FillBuilder, Filler};
use crate::source::nbd::{BitmapExport, BitmapStatus, Uri};
use crate::units::Bytes;

/// The unit of the map. The unit of a bitmap is at least 512 bytes and 64 KiB by default.
const BLOCK: Bytes = Bytes::new(4096);

/// What changed in the export of `uri` since its dirty bitmap with the name `bitmap` was made. The whole export is asked once,
/// over one connection.
///
/// # Errors
/// As [`BitmapExport::open`] and [`BitmapExport::status`]; a status that lies beside the blocks of the server; more changes
/// than fit into memory.
pub fn since_bitmap(uri: &Uri, bitmap: &str) -> Result<Changes> {
    let export = BitmapExport::open(uri, bitmap)?;
    let failed = |why: &str| Error::failed(why).on(export.uri().to_string());
    let size = export.size();
    let builders = [FillBuilder::new(size, BLOCK), FillBuilder::new(size, BLOCK)];
    let mut marker = Marker { len: size, changed: builders[0].filler(), cleared: builders[1].filler() };
    let mut at = Bytes::ZERO;
    while at < size {
        let status = export.status(at)?;
        let end = end_of(&status).min(size);
        let end = if end < size { end.align_down(export.minimum_block()) } else { end };
        if end <= at {
            return Err(failed("the server's answer about the bitmap ends inside of a block"));
        }
        marker.mark(at..end, &status);
        at = end;
    }
    drop(marker);
    let [changed, cleared] = builders.map(FillBuilder::finish);
    let maps = changed.zip(cleared).ok_or_else(|| failed("it has more changes than fit into memory"))?;
    let map = ChangeMap::new(maps.0, maps.1).ok_or_else(|| failed("the maps of the changes have different lengths"))?;
    let fields = vec![
        ("export", IdentityValue::Text(uri.to_string())),
        ("bitmap", IdentityValue::Text(bitmap.to_owned())),
        ("size", IdentityValue::Number(size.get())),
    ];
    // A server reports no write of another client.
    Ok(Changes::new(Identity { kind: "nbd", fields }, map, || false))
}

/// The end of what both contexts of a status cover.
fn end_of(status: &BitmapStatus) -> Bytes {
    let end = |extents: &[Extent]| extents.last().map_or(Bytes::ZERO, |last| last.end);
    end(&status.allocation).min(end(&status.bitmap))
}

/// Marks what changed in the two maps of a [`ChangeMap`].
struct Marker<'a> {
    len: Bytes,
    changed: Filler<'a>,
    cleared: Filler<'a>,
}

impl Marker<'_> {
    /// Marks `range`, which a status begins with and covers.
    fn mark(&mut self, range: Range<Bytes>, status: &BitmapStatus) {
        let (mut allocation, mut bitmap) = (status.allocation.iter().peekable(), status.bitmap.iter().peekable());
        let mut at = range.start;
        while at < range.end {
            while allocation.next_if(|extent| extent.end <= at).is_some() {}
            while bitmap.next_if(|extent| extent.end <= at).is_some() {}
            let (Some(stored), Some(dirty)) = (allocation.peek(), bitmap.peek()) else {
                return self.mark_changed(at..range.end);
            };
            let end = stored.end.min(dirty.end).min(range.end);
            match (dirty.kind, stored.kind) {
                (ExtentKind::Unchanged, _) => {}
                (_, ExtentKind::Hole) => self.mark_cleared(at..end),
                _ => self.mark_changed(at..end),
            }
            at = end;
        }
    }

    /// Marks every block that has a byte of `range`.
    fn mark_changed(&mut self, range: Range<Bytes>) {
        if range.start < range.end {
            self.changed.set_range(block(range.start)..Block::new(range.end.get().div_ceil(BLOCK.get())));
        }
    }

    /// Marks every block that lies inside of `range` as cleared. A block that it shares with another range is data, since
    /// that one may be unchanged.
    fn mark_cleared(&mut self, range: Range<Bytes>) {
        // The last block of the device may be a partial one.
        let down = range.end.align_down(BLOCK);
        let end = if range.end == self.len { range.end } else { down };
        let start = range.start.align_up(BLOCK).unwrap_or(range.end);
        if start >= end {
            return self.mark_changed(range);
        }
        self.cleared.set_range(block(start)..Block::new(end.get().div_ceil(BLOCK.get())));
        self.mark_changed(range.start..start);
        self.mark_changed(end..range.end);
    }
}

/// The block with the byte at `at`.
fn block(at: Bytes) -> Block {
    Block::new(at.get() / BLOCK.get())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::HoleMap as _;
    use proptest::prelude::*;

    const LEN: u64 = 40_000;

    fn extents(list: &[(u64, ExtentKind)]) -> Vec<Extent> {
        list.iter().map(|(end, kind)| Extent { end: Bytes::new(*end), kind: *kind }).collect()
    }

    /// The map of a device of `LEN` bytes from statuses that follow each other.
    fn map(statuses: &[(Range<u64>, BitmapStatus)]) -> ChangeMap {
        let builders = [0; 2].map(|_| FillBuilder::new(Bytes::new(LEN), BLOCK));
        let mut marker = Marker { len: Bytes::new(LEN), changed: builders[0].filler(), cleared: builders[1].filler() };
        for (range, status) in statuses {
            marker.mark(Bytes::new(range.start)..Bytes::new(range.end), status);
        }
        drop(marker);
        let [changed, cleared] = builders.map(|builder| builder.finish().unwrap());
        ChangeMap::new(changed, cleared).unwrap()
    }

    #[test]
    fn clean_is_unchanged_and_dirty_zeros_are_a_hole() {
        use ExtentKind::{Data, Hole, Unchanged};
        let allocation = extents(&[(8192, Data), (20_480, Hole), (LEN, Data)]);
        let bitmap = extents(&[(4096, Unchanged), (24_576, Data), (LEN, Unchanged)]);
        let map = map(&[(0..LEN, BitmapStatus { allocation, bitmap })]);
        let kinds = [0, 4096, 8192, 16_384, 20_480, 24_576, LEN - 1].map(|at| map.extent_at(Bytes::new(at)).kind);
        assert_eq!(kinds, [Unchanged, Data, Hole, Hole, Data, Unchanged, Unchanged]);
    }

    /// Kinds of random runs, one for each byte.
    fn bytes(runs: &[(u64, bool)], kinds: [ExtentKind; 2]) -> Vec<Extent> {
        let mut end = 0;
        let mut list: Vec<Extent> = Vec::new();
        for (len, kind) in runs.iter().chain([&(LEN, true)]) {
            end = LEN.min(end + len);
            list.push(Extent { end: Bytes::new(end), kind: kinds[usize::from(*kind)] });
            if end == LEN {
                break;
            }
        }
        list
    }

    fn kind_at(extents: &[Extent], at: u64) -> ExtentKind {
        extents.iter().find(|extent| at < extent.end.get()).unwrap().kind
    }

    proptest! {
        /// At every byte, the map promises no more than the two contexts do, whatever the lengths of extents and answers.
        #[test]
        fn no_promise_without_proof(
            stored in prop::collection::vec((1..9000_u64, any::<bool>()), 0..12),
            dirty in prop::collection::vec((1..9000_u64, any::<bool>()), 0..12),
            cut in 1..LEN,
        ) {
            let stored = bytes(&stored, [ExtentKind::Hole, ExtentKind::Data]);
            let dirty = bytes(&dirty, [ExtentKind::Unchanged, ExtentKind::Data]);
            let from = |extents: &[Extent], at: u64| -> Vec<Extent> {
                extents.iter().copied().filter(|extent| extent.end.get() > at).collect()
            };
            let status = |at| BitmapStatus { allocation: from(&stored, at), bitmap: from(&dirty, at) };
            let map = map(&[(0..cut, status(0)), (cut..LEN, status(cut))]);
            for at in 0..LEN {
                match map.extent_at(Bytes::new(at)).kind {
                    ExtentKind::Unchanged => prop_assert_eq!(kind_at(&dirty, at), ExtentKind::Unchanged),
                    ExtentKind::Hole => {
                        prop_assert_eq!(kind_at(&dirty, at), ExtentKind::Data);
                        prop_assert_eq!(kind_at(&stored, at), ExtentKind::Hole);
                    }
                    kind => prop_assert_eq!(kind, ExtentKind::Data),
                }
            }
        }
    }

    #[test]
    fn what_a_status_does_not_cover_is_data() {
        let status = BitmapStatus { allocation: extents(&[(4096, ExtentKind::Data)]), bitmap: Vec::new() };
        assert_eq!(map(&[(0..LEN, status)]).extent_at(Bytes::ZERO).kind, ExtentKind::Data);
    }
}
