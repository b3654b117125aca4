//! The sums of the extents of each kind.

use std::io::{self, Write};

use super::Extents;
use super::plain::{change_status, status};
use crate::map::ExtentKind;
use crate::units::Bytes;

/// The bytes of data, of unchanged ranges, and of all other holes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    data: Bytes,
    unchanged: Bytes,
    holes: Bytes,
}

impl Totals {
    /// The sums of a range that was counted without its extents.
    pub fn new(data: Bytes, holes: Bytes) -> Self {
        Self { data, holes, unchanged: Bytes::ZERO }
    }

    /// Adds up all extents.
    pub fn of(extents: Extents<'_>) -> io::Result<Self> {
        let mut totals = Self::default();
        for extent in extents {
            let (start, extent) = extent?;
            let sum = match extent.kind {
                ExtentKind::Data => &mut totals.data,
                ExtentKind::Unchanged => &mut totals.unchanged,
                ExtentKind::Hole | ExtentKind::Free => &mut totals.holes,
            };
            *sum = sum.saturating_add(extent.end.saturating_sub(start));
        }
        Ok(totals)
    }

    /// Prints the sums as `nbdinfo --map --totals` does. A map of changes has a line for what is unchanged; else that counts
    /// as a hole.
    ///
    /// # Errors
    /// As write(2).
    pub fn print(self, out: &mut dyn Write, is_since: bool) -> io::Result<()> {
        let all_holes = self.holes.saturating_add(self.unchanged);
        let all = u128::from(self.data.saturating_add(all_holes).get().max(1));
        let lines = match is_since {
            true => vec![
                (self.data, change_status(ExtentKind::Data)),
                (self.holes, change_status(ExtentKind::Hole)),
                (self.unchanged, change_status(ExtentKind::Unchanged)),
            ],
            false => vec![(self.data, status(ExtentKind::Data)), (all_holes, status(ExtentKind::Hole))],
        };
        for (sum, (bits, word)) in lines {
            // Tenths of a percent, rounded in integers: a sum of bytes may have too many digits for a float.
            let tenths = (u128::from(sum.get()) * 1000 + all / 2) / all;
            let (whole, tenth) = (tenths / 10, tenths % 10);
            writeln!(out, "{sum:>10} {whole:>3}.{tenth}% {bits:>3} {word}", sum = sum.get())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::MapFormat;
    use super::super::tests::{CHANGES, EXTENTS, printed};
    use super::*;

    #[test]
    fn totals_look_like_nbdinfo() {
        assert_eq!(
            printed(MapFormat::Totals, false, &EXTENTS),
            "     65536   0.6%   0 data\n  10420224  99.4%   3 hole,zero\n"
        );
        let runs = [(0, 512, ExtentKind::Unchanged), (512, 1024, ExtentKind::Free), (1024, 2048, ExtentKind::Data)];
        let totals = printed(MapFormat::Totals, false, &runs);
        assert_eq!(totals, "      1024  50.0%   0 data\n      1024  50.0%   3 hole,zero\n");
    }

    #[test]
    fn changes_have_three_sums() {
        assert_eq!(
            printed(MapFormat::Totals, true, &CHANGES),
            "     65536   6.6%   0 data\n     65536   6.6%   3 zero\n    868928  86.9%   0 unchanged\n"
        );
    }
}
