//! Where bytes differ.

use std::ops::Range;

use crate::units::Bytes;

/// Bytes are compared in blocks of this length. Differences in neighbouring blocks are one range.
pub(super) const BLOCK: usize = 4096;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// The ranges of bytes that are not zero in `bytes`, which begin at `start`.
pub(super) fn not_zero(bytes: &[u8], start: Bytes) -> Vec<Range<Bytes>> {
    differing(bytes, start, |block| &ZEROS[..block.len()])
}

/// The ranges in which `left` and `right`, which begin at `start`, differ. What only one of them has is different.
pub(super) fn between(left: &[u8], right: &[u8], start: Bytes) -> Vec<Range<Bytes>> {
    let (shorter, longer) = (left.len().min(right.len()), left.len().max(right.len()));
    let mut ranges = differing(&left[..shorter], start, |block| &right[block]);
    if shorter < longer {
        push(&mut ranges, position(start, shorter)..position(start, longer));
    }
    ranges
}

/// Each range begins with the first byte that differs, and ends with the last one.
fn differing<'a>(left: &[u8], start: Bytes, right: impl Fn(Range<usize>) -> &'a [u8]) -> Vec<Range<Bytes>> {
    let mut ranges = Vec::new();
    for (index, block) in left.chunks(BLOCK).enumerate() {
        let at = index * BLOCK;
        let other = right(at..at + block.len());
        // Slices are compared by memcmp(3), which is as fast as the memory.
        if block == other {
            continue;
        }
        let differs = |(one, other): (&u8, &u8)| one != other;
        let first = block.iter().zip(other).position(differs).unwrap_or(0);
        let last = block.iter().zip(other).rposition(differs).unwrap_or(block.len() - 1);
        push(&mut ranges, position(start, at + first)..position(start, at + last + 1));
    }
    ranges
}

/// Appends a range, which is merged with the last one if they are neighbours.
fn push(ranges: &mut Vec<Range<Bytes>>, range: Range<Bytes>) {
    match ranges.last_mut() {
        Some(last) if are_neighbours(last, &range) => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// Whether the second range begins in the block in which the first one ends, or in the next one.
pub(super) fn are_neighbours(first: &Range<Bytes>, second: &Range<Bytes>) -> bool {
    let block = Bytes::new(BLOCK as u64);
    first.end.align_up(block).is_none_or(|end| second.start.align_down(block) <= end)
}

/// The parts of ascending ranges that are in ascending `others` too.
pub(super) fn intersection(ranges: &[Range<Bytes>], others: &[Range<Bytes>]) -> Vec<Range<Bytes>> {
    let mut common = Vec::new();
    let mut from = 0;
    for range in ranges {
        while others.get(from).is_some_and(|other| other.end <= range.start) {
            from += 1;
        }
        for other in others[from..].iter().take_while(|other| other.start < range.end) {
            common.push(range.start.max(other.start)..range.end.min(other.end));
        }
    }
    common
}

fn position(start: Bytes, at: usize) -> Bytes {
    start.saturating_add(Bytes::new(at as u64))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn ranges(numbers: &[(u64, u64)]) -> Vec<Range<Bytes>> {
        numbers.iter().map(|&(start, end)| Bytes::new(start)..Bytes::new(end)).collect()
    }

    #[test]
    fn one_byte_is_found_wherever_it_is() {
        for len in [1, 511, 4096, 4097, 3 * BLOCK + 5] {
            for at in [0, 1, 4095, 4096, 4097, len / 2, len - 1].into_iter().filter(|at| *at < len) {
                let mut bytes = vec![0; len];
                assert_eq!(not_zero(&bytes, Bytes::new(100)), []);
                bytes[at] = 1;
                let found = ranges(&[(100 + at as u64, 101 + at as u64)]);
                assert_eq!(not_zero(&bytes, Bytes::new(100)), found, "{at} of {len}");
                assert_eq!(between(&bytes, &vec![0; len], Bytes::new(100)), found, "{at} of {len}");
                assert_eq!(between(&bytes, &bytes, Bytes::ZERO), []);
            }
        }
    }

    #[test]
    fn neighbouring_blocks_are_one_range_and_others_are_not() {
        let mut bytes = vec![0; 8 * BLOCK];
        for at in [10, BLOCK + 5, 2 * BLOCK, 5 * BLOCK, 5 * BLOCK + 4095] {
            bytes[at] = 1;
        }
        let block = BLOCK as u64;
        assert_eq!(not_zero(&bytes, Bytes::ZERO), ranges(&[(10, 2 * block + 1), (5 * block, 6 * block)]));
    }

    #[test]
    fn what_only_one_side_has_differs() {
        assert_eq!(between(&[1; 5000], &[1; 4000], Bytes::ZERO), ranges(&[(4000, 5000)]));
        assert_eq!(between(&[1; 4000], &[1; 5000], Bytes::ZERO), ranges(&[(4000, 5000)]));
        assert_eq!(between(&[1, 2], &[1, 3, 4], Bytes::ZERO), ranges(&[(1, 3)]));
        assert_eq!(between(&[], &[], Bytes::ZERO), []);
    }

    #[test]
    fn intersections_equal_those_found_byte_by_byte() {
        let mut state = 1_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..500 {
            let mut side = || {
                let mut at = 0;
                let parts = (0..random(5)).map(|_| {
                    let start = at + random(6) + 1;
                    at = start + random(6) + 1;
                    (start, at)
                });
                ranges(&parts.collect::<Vec<_>>())
            };
            let (one, other) = (side(), side());
            let has = |ranges: &[Range<Bytes>], at| ranges.iter().any(|range| range.contains(&Bytes::new(at)));
            let common = intersection(&one, &other);
            for at in 0..80 {
                assert_eq!(has(&common, at), has(&one, at) && has(&other, at), "{at}: {one:?} {other:?} {common:?}");
            }
        }
    }
}
