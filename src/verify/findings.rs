//! What a verification found.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use super::differences::are_neighbours;
use crate::error::Error;
use crate::units::Bytes;

/// The number of ranges that are kept. Of further ones only the bytes are counted.
const KEPT: usize = 1024;

/// Ranges of a device, of which the first ones are kept. Neighbours are merged.
#[derive(Debug, Default)]
pub struct Ranges {
    /// The end of each range, by its start.
    kept: BTreeMap<Bytes, Bytes>,
    /// The bytes of the ranges that were not kept.
    further: Bytes,
}

impl Ranges {
    /// Adds a range, which overlaps none that was added before. They may come in any order.
    pub(super) fn add(&mut self, mut range: Range<Bytes>) {
        if let Some((&start, &end)) = self.kept.range(..=range.start).next_back()
            && are_neighbours(&(start..end), &range)
        {
            range.start = start;
        }
        if let Some((&start, &end)) = self.kept.range(range.end..).next()
            && are_neighbours(&range, &(start..end))
        {
            self.kept.remove(&start);
            range.end = end;
        }
        self.kept.insert(range.start, range.end);
        if self.kept.len() > KEPT
            && let Some((start, end)) = self.kept.pop_last()
        {
            self.further = self.further.saturating_add(end.saturating_sub(start));
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// The bytes of all ranges.
    pub fn bytes(&self) -> Bytes {
        self.iter().fold(self.further, |sum, range| sum.saturating_add(range.end.saturating_sub(range.start)))
    }

    /// The ranges that were kept, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Range<Bytes>> {
        self.kept.iter().map(|(&start, &end)| start..end)
    }
}

/// The number of failed reads that are described.
const DESCRIBED: usize = 16;

/// What does not agree.
#[derive(Debug, Default)]
pub struct Findings {
    /// Holes that do not read as zeros.
    pub wrong: Ranges,
    /// Ranges that were not zero whenever they were read, and a hole whenever the map was asked, while the device was written so
    /// often that this may be the work of its writers.
    pub undecided: Ranges,
    /// Where the copy differs from the device.
    pub different: Ranges,
    /// Ranges that could not be read.
    pub unread: Ranges,
    /// Why, for the first of them.
    pub errors: Vec<String>,
}

impl Findings {
    /// Whether there is nothing that does not agree.
    pub fn is_empty(&self) -> bool {
        [&self.wrong, &self.undecided, &self.different, &self.unread].into_iter().all(Ranges::is_empty)
    }

    /// Notes a range that could not be read.
    pub(super) fn add_unread(&mut self, range: &Range<Bytes>, error: &Error) {
        self.unread.add(range.clone());
        if self.errors.len() < DESCRIBED {
            self.errors.push(error.to_string());
        }
    }
}

/// All findings in a few words, such as `4096 bytes in holes not zero`.
impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            (&self.different, "different"),
            (&self.wrong, "in holes not zero"),
            (&self.undecided, "in holes not zero, or written at that moment"),
            (&self.unread, "unreadable"),
        ];
        let mut separator = "";
        for (ranges, what) in parts.into_iter().filter(|(ranges, _)| !ranges.is_empty()) {
            let bytes = ranges.bytes().get();
            write!(f, "{separator}{bytes} {} {what}", if bytes == 1 { "byte" } else { "bytes" })?;
            separator = "; ";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::differences::tests::ranges;
    use super::*;

    #[test]
    fn neighbours_are_merged_in_any_order() {
        let parts = ranges(&[(0, 4096), (4096, 5000), (8192, 8193), (12_300, 12_400), (40_000, 40_001)]);
        let orders = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3], [1, 3, 0, 2, 4]];
        for order in orders {
            let mut found = Ranges::default();
            order.into_iter().for_each(|index| found.add(parts[index].clone()));
            assert_eq!(found.iter().collect::<Vec<_>>(), ranges(&[(0, 12_400), (40_000, 40_001)]), "{order:?}");
            assert_eq!(found.bytes(), Bytes::new(12_401));
        }
    }

    #[test]
    fn the_first_ranges_are_kept_and_all_are_counted() {
        let mut found = Ranges::default();
        assert!(found.is_empty());
        for index in (0..5000_u64).rev() {
            found.add(Bytes::new(index << 20)..Bytes::new((index << 20) + 10));
        }
        assert_eq!(found.bytes(), Bytes::new(50_000));
        assert_eq!(found.iter().count(), KEPT);
        assert_eq!(found.iter().next(), Some(Bytes::ZERO..Bytes::new(10)));
    }

    #[test]
    fn findings_in_a_few_words() {
        let mut findings = Findings::default();
        assert!(findings.is_empty() && findings.to_string().is_empty());
        findings.wrong.add(Bytes::new(5)..Bytes::new(6));
        let piece = Bytes::ZERO..Bytes::new(4096);
        (0..100).for_each(|_| findings.add_unread(&piece, &Error::failed("cannot read at 0")));
        assert!(!findings.is_empty());
        assert_eq!(findings.errors.len(), DESCRIBED);
        assert_eq!(findings.to_string(), "1 byte in holes not zero; 4096 bytes unreadable");
    }
}
