//! Whether a client reads in order: one extent after the other, or everything.

use std::ops::Range;

use crate::map::{Extent, ExtentKind};
use crate::units::Bytes;

/// The number of reads in order after which reading ahead begins, or one that follows a hole. A client that reads at random
/// offsets makes none.
const ENOUGH: u32 = 2;
/// How far behind the last byte that was read the next read in order may begin. The kernel skips what it has cached.
const SKIPPED: Bytes = Bytes::new(256 << 10);
/// How far before or behind the last byte a read of a client may begin that reads in order: the kernel sends several reads
/// at once, which overtake each other.
const OVERTAKEN: Bytes = Bytes::new(4 << 20);
/// The number of bytes, without a gap, after which a client is expected to read what nothing is known of.
const WITHOUT_GAP: Bytes = Bytes::new(1 << 20);
/// The number of extents that are looked at to find out whether a client skipped nothing but holes.
const LOOKS: usize = 8;
/// The number of bytes of holes, without a gap, after which a client is expected to read all holes. The kernel reads up to
/// twice its read-ahead behind the end of an extent.
const OF_HOLES: Bytes = Bytes::new(8 << 20);

/// What a read was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It follows the reads before it.
    InOrder,
    /// It is one of several reads in order that were sent at once.
    Overtaken,
    /// It follows nothing.
    Elsewhere,
}

/// The last reads of one open file.
#[derive(Debug, Default)]
pub(super) struct Pattern {
    /// The end of the read in order that ended last; `None` before the first one.
    position: Option<Bytes>,
    /// The number of reads in order without another one in between.
    in_order: u32,
    /// Bytes that were read without a gap.
    without_gap: Bytes,
    /// Bytes of reads, without a gap, that began in holes.
    in_holes: Bytes,
}

impl Pattern {
    /// Notes a read. `expected` gives the extent that is expected at an offset.
    pub(super) fn note_read(&mut self, range: &Range<Bytes>, expected: impl Fn(Bytes) -> Option<Extent>) -> Step {
        let (start, len) = (range.start, range.end.saturating_sub(range.start));
        let position = self.position.unwrap_or(Bytes::MAX);
        let skipped = if self.is_in_order() { OVERTAKEN } else { SKIPPED };
        let follows = position <= start && start <= position.saturating_add(skipped);
        let skips_holes = !follows && position < start && are_holes(&(position..start), &expected);
        if follows || skips_holes {
            // To begin behind a hole is a stronger sign than to begin where the last read ended.
            let sign = if skips_holes { ENOUGH } else { 1 };
            self.in_order = self.in_order.saturating_add(sign);
            self.position = Some(range.end);
            self.without_gap = if follows { self.without_gap.saturating_add(len) } else { len };
            let in_hole = expected(start).is_some_and(|extent| extent.kind.is_hole());
            let of_holes = if in_hole { len } else { Bytes::ZERO };
            self.in_holes = if follows { self.in_holes.saturating_add(of_holes) } else { Bytes::ZERO };
            return Step::InOrder;
        }
        if self.is_in_order() && start < position {
            let is_near = position <= start.saturating_add(OVERTAKEN);
            // The kernel reads a little behind the end of an extent, and nobody waits for that.
            if is_near || expected(start).is_some_and(|extent| extent.kind.is_hole()) {
                self.position = Some(position.max(range.end));
                return Step::Overtaken;
            }
        }
        *self = Self { position: Some(range.end), in_order: 0, without_gap: len, in_holes: Bytes::ZERO };
        Step::Elsewhere
    }

    /// Whether the client reads in order.
    pub(super) fn is_in_order(&self) -> bool {
        self.in_order >= ENOUGH
    }

    /// The end of what the client has read in order.
    pub(super) fn position(&self) -> Bytes {
        self.position.unwrap_or(Bytes::ZERO)
    }

    /// Whether the client will read an extent that it comes to. `None`: nothing is known of the extent.
    pub(super) fn reads(&self, kind: Option<ExtentKind>) -> bool {
        match kind {
            Some(kind) if kind.is_data() => true,
            Some(_) => self.in_holes >= OF_HOLES,
            None => self.without_gap >= WITHOUT_GAP,
        }
    }
}

/// Whether nothing but holes is expected in a range.
fn are_holes(range: &Range<Bytes>, expected: impl Fn(Bytes) -> Option<Extent>) -> bool {
    let mut at = range.start;
    for _ in 0..LOOKS {
        match expected(at) {
            Some(extent) if extent.kind.is_hole() => at = extent.end,
            _ => return false,
        }
        if at >= range.end {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;

    /// 64 KiB of data at the start of each MiB.
    fn sparse(offset: Bytes) -> Option<Extent> {
        let start = offset.align_down(Bytes::new(MIB));
        let data = start.saturating_add(Bytes::new(64 * KIB));
        Some(match offset < data {
            true => Extent { end: data, kind: ExtentKind::Data },
            false => Extent { end: start.saturating_add(Bytes::new(MIB)), kind: ExtentKind::Hole },
        })
    }

    fn read(pattern: &mut Pattern, start: u64, len: u64) -> Step {
        pattern.note_read(&(Bytes::new(start)..Bytes::new(start + len)), sparse)
    }

    #[test]
    fn extents_that_are_read_one_after_the_other_are_in_order() {
        let mut pattern = Pattern::default();
        let steps = [1, 2, 3, 4].map(|index| read(&mut pattern, index * MIB, 64 * KIB));
        assert_eq!(steps, [Step::Elsewhere, Step::InOrder, Step::InOrder, Step::InOrder]);
        assert_eq!(pattern.position(), Bytes::new(4 * MIB + 64 * KIB));
        // The kernel reads a little behind the extent.
        assert_eq!(read(&mut pattern, 4 * MIB + 64 * KIB, 200 * KIB), Step::InOrder);
        assert_eq!(read(&mut pattern, 5 * MIB, 64 * KIB), Step::InOrder);
        assert!(pattern.is_in_order() && !pattern.reads(Some(ExtentKind::Hole)) && !pattern.reads(None));
        assert_eq!(read(&mut pattern, 15 * MIB, 64 * KIB), Step::Elsewhere, "extents were left out");
        assert!(!pattern.is_in_order());
    }

    #[test]
    fn a_client_that_reads_holes_is_expected_to_read_them() {
        let mut pattern = Pattern::default();
        for index in 0..40 {
            read(&mut pattern, index * 64 * KIB, 64 * KIB);
        }
        assert!(!pattern.reads(Some(ExtentKind::Hole)), "the extents of data are shorter than that");
        let all_hole = |_| Some(Extent { end: Bytes::MAX, kind: ExtentKind::Hole });
        for index in 40..200 {
            pattern.note_read(&(Bytes::new(index * 64 * KIB)..Bytes::new((index + 1) * 64 * KIB)), all_hole);
        }
        assert!(pattern.reads(Some(ExtentKind::Hole)) && pattern.reads(None));
    }

    #[test]
    fn a_read_that_was_overtaken_changes_nothing() {
        let mut pattern = Pattern::default();
        let steps = [0, 1, 2, 3].map(|index| read(&mut pattern, index * 128 * KIB, 128 * KIB));
        assert_eq!(steps, [Step::Elsewhere, Step::InOrder, Step::InOrder, Step::InOrder]);
        assert_eq!(read(&mut pattern, 128 * KIB, 128 * KIB), Step::Overtaken);
        assert_eq!(pattern.position(), Bytes::new(512 * KIB));
        assert_eq!(read(&mut pattern, 100 * MIB, 64 * KIB), Step::Elsewhere);
        assert_eq!(read(&mut pattern, 101 * MIB, 4 * KIB), Step::InOrder);
        assert_eq!(read(&mut pattern, 80 * MIB + 512 * KIB, 4 * KIB), Step::Overtaken, "behind an extent");
        assert_eq!(read(&mut pattern, 80 * MIB, 4 * KIB), Step::Elsewhere);
    }

    #[test]
    fn reads_at_random_offsets_are_never_in_order() {
        let mut pattern = Pattern::default();
        let all_data = |_| Some(Extent { end: Bytes::MAX, kind: ExtentKind::Data });
        let mut at = 1;
        for _ in 0..10_000 {
            at = at * 48271 % 0x7fff_ffff;
            let start = Bytes::new(at * 4096);
            pattern.note_read(&(start..start.saturating_add(Bytes::new(4096))), all_data);
            assert!(!pattern.is_in_order());
        }
    }
}
