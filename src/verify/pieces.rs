//! Ranges in pieces that one read has.

use std::ops::Range;

use super::PIECE;
use crate::error::Result;
use crate::units::Bytes;

/// Cuts ranges at the multiples of [`PIECE`]. Each piece has the kind of its range.
pub(super) struct Pieces<I, K> {
    ranges: I,
    rest: Option<(Range<Bytes>, K)>,
}

impl<I, K> Pieces<I, K>
where
    I: Iterator<Item = Result<(Range<Bytes>, K)>>,
{
    pub(super) fn of(ranges: I) -> Self {
        Self { ranges, rest: None }
    }
}

impl<I, K: Copy> Iterator for Pieces<I, K>
where
    I: Iterator<Item = Result<(Range<Bytes>, K)>>,
{
    type Item = Result<(Range<Bytes>, K)>;

    fn next(&mut self) -> Option<Self::Item> {
        let (range, kind) = match self.rest.take() {
            Some(rest) => rest,
            None => match self.ranges.next()? {
                Ok(range) => range,
                Err(error) => return Some(Err(error)),
            },
        };
        let cut = range.start.align_down(PIECE).saturating_add(PIECE);
        if cut < range.end {
            self.rest = Some((cut..range.end, kind));
        }
        Some(Ok((range.start..range.end.min(cut), kind)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::differences::tests::ranges;
    use super::*;

    #[test]
    fn ranges_are_cut_at_whole_pieces() {
        let piece = PIECE.get();
        let given = ranges(&[(4096, 3 * piece + 4096), (4 * piece, 5 * piece), (6 * piece + 1, 6 * piece + 2)]);
        let pieces = Pieces::of(given.into_iter().map(|range| Ok((range, ()))));
        let found: Vec<_> = pieces.map(|piece| piece.unwrap().0).collect();
        let expected = [
            (4096, piece),
            (piece, 2 * piece),
            (2 * piece, 3 * piece),
            (3 * piece, 3 * piece + 4096),
            (4 * piece, 5 * piece),
            (6 * piece + 1, 6 * piece + 2),
        ];
        assert_eq!(found, ranges(&expected));
    }
}
