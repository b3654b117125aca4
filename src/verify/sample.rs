//! Pieces of holes that are chosen at random.
//!
//! All holes of a device, one after the other without the data in between, are divided into pieces of [`SAMPLE`] bytes. The
//! pieces of a sample are different, and each one has the same chance. So each byte of a hole has the same chance, however long the
//! hole is. A piece may consist of several short holes.

use std::collections::{BTreeSet, btree_set};
use std::hash::{BuildHasher, RandomState};
use std::iter::Peekable;
use std::ops::Range;

use crate::error::Result;
use crate::units::Bytes;

/// The length of a piece.
pub const SAMPLE: Bytes = Bytes::new(64 << 10);

/// The largest number of pieces: their numbers are kept in memory.
pub const LARGEST_SAMPLE: u64 = 1_000_000;

/// A seed that nobody can predict.
pub fn random_seed() -> u64 {
    RandomState::new().hash_one(0)
}

/// The random numbers of a seed: SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014). The
/// standard library has no generator with a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not zero. All have the same chance.
    fn below(&mut self, limit: u64) -> u64 {
        // Numbers from the last, incomplete round of `limit` numbers are not used.
        let end = u64::MAX - u64::MAX % limit;
        loop {
            let number = self.next();
            if number < end {
                return number % limit;
            }
        }
    }
}

/// The numbers of `count` different pieces, or of all, if holes have `bytes` bytes (R. W. Floyd's algorithm, "Programming Pearls: A
/// Sample of Brilliance", 1987).
pub(super) fn choose(count: u64, bytes: Bytes, seed: u64) -> BTreeSet<u64> {
    let pieces = bytes.get().div_ceil(SAMPLE.get());
    let mut random = Random(seed);
    let mut chosen = BTreeSet::new();
    for last in pieces.saturating_sub(count)..pieces {
        let number = random.below(last + 1);
        if !chosen.insert(number) {
            chosen.insert(last);
        }
    }
    chosen
}

/// The chosen pieces of holes that come in ascending order. A piece is divided where one hole ends and the next one begins.
pub(super) struct Chosen<I> {
    holes: I,
    chosen: Peekable<btree_set::IntoIter<u64>>,
    /// The current hole, and the bytes of all holes before it.
    hole: Option<Range<Bytes>>,
    before: Bytes,
}

impl<I> Chosen<I> {
    pub(super) fn of(holes: I, chosen: BTreeSet<u64>) -> Self {
        Self { holes, chosen: chosen.into_iter().peekable(), hole: None, before: Bytes::ZERO }
    }
}

impl<I: Iterator<Item = Result<Range<Bytes>>>> Iterator for Chosen<I> {
    type Item = Result<(Range<Bytes>, ())>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let number = *self.chosen.peek()?;
            let start = Bytes::new(number.saturating_mul(SAMPLE.get()));
            let end = start.saturating_add(SAMPLE);
            let hole = match self.hole.take() {
                Some(hole) => hole,
                None => match self.holes.next()? {
                    Ok(hole) => hole,
                    Err(error) => return Some(Err(error)),
                },
            };
            let behind = self.before.saturating_add(hole.end.saturating_sub(hole.start));
            if behind <= start {
                self.before = behind;
                continue;
            }
            let at = |position: Bytes| hole.start.saturating_add(position.saturating_sub(self.before));
            let part = at(start.max(self.before))..at(end.min(behind));
            if end <= behind {
                self.chosen.next();
                self.hole = Some(hole);
            } else {
                self.before = behind;
            }
            return Some(Ok((part, ())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::differences::tests::ranges;
    use super::*;

    const K: u64 = 1024;

    fn chosen(holes: &[Range<Bytes>], numbers: &[u64]) -> Vec<Range<Bytes>> {
        let holes = holes.iter().cloned().map(Ok);
        Chosen::of(holes, numbers.iter().copied().collect()).map(|part| part.unwrap().0).collect()
    }

    #[test]
    fn pieces_are_parts_of_holes() {
        // 40 KiB, 8 KiB, 200 KiB of holes: four pieces, the last one of 56 KiB.
        let holes = ranges(&[(4 * K, 44 * K), (100 * K, 108 * K), (1000 * K, 1200 * K)]);
        assert_eq!(chosen(&holes, &[0]), ranges(&[(4 * K, 44 * K), (100 * K, 108 * K), (1000 * K, 1016 * K)]));
        assert_eq!(chosen(&holes, &[1, 3]), ranges(&[(1016 * K, 1080 * K), (1144 * K, 1200 * K)]));
        assert_eq!(chosen(&holes, &[2]), ranges(&[(1080 * K, 1144 * K)]));
        // Holes that became data since they were counted.
        assert_eq!(chosen(&holes[..1], &[1, 2]), []);
        assert_eq!(chosen(&[], &[0]), []);
    }

    #[test]
    fn all_pieces_are_all_holes() {
        let holes = ranges(&[(0, 4 * K), (8 * K, 300 * K), (301 * K, 302 * K), (400 * K, 4000 * K)]);
        let bytes =
            |ranges: &[Range<Bytes>]| ranges.iter().map(|range| range.end.get() - range.start.get()).sum::<u64>();
        let total = bytes(&holes);
        let all: Vec<_> = choose(u64::MAX, Bytes::new(total), 1).into_iter().collect();
        assert_eq!(all, (0..total.div_ceil(SAMPLE.get())).collect::<Vec<_>>());
        let parts = chosen(&holes, &all);
        assert_eq!(bytes(&parts), total);
        assert!(parts.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(parts.iter().all(|part| holes.iter().any(|hole| hole.start <= part.start && part.end <= hole.end)));
    }

    #[test]
    fn a_seed_repeats_its_pieces_and_another_one_has_others() {
        let bytes = Bytes::new(1 << 40);
        assert_eq!(choose(100, bytes, 7), choose(100, bytes, 7));
        assert_ne!(choose(100, bytes, 7), choose(100, bytes, 8));
        assert_eq!(choose(100, bytes, 7).len(), 100);
        assert!(choose(100, Bytes::ZERO, 7).is_empty());
        // The first numbers of the published generator for the seed 1234567.
        let mut random = Random(1_234_567);
        assert_eq!([random.next(), random.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }

    #[test]
    fn each_piece_has_the_same_chance() {
        let pieces = 50;
        let mut counts = vec![0_u32; pieces];
        for seed in 0..10_000 {
            let chosen = choose(5, Bytes::new(pieces as u64 * SAMPLE.get()), seed);
            assert_eq!(chosen.len(), 5);
            chosen.into_iter().for_each(|number| counts[usize::try_from(number).unwrap()] += 1);
        }
        // 1000 are expected of each, with a standard deviation of 30.
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
    }
}
