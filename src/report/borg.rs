//! The input map of borg 2: `borg create --map`.
//!
//! The format is in the section "Input maps" of borg's documentation of `borg create` (`docs/usage/create.rst.inc` of borg
//! 2.0.0b23): a line `START LENGTH STATE` for each range, contiguous from 0 to the length of the input.

use std::io::{self, Write};

use super::{Extents, Subject};
use crate::map::ExtentKind;

/// Prints `data` and `zero` ranges; for a map of changes also `same` ranges, which borg takes from its archive of the older
/// device (`--reuse-from`). borg stores a `zero` range as a hole, also in a map of changes.
pub fn map(out: &mut dyn Write, subject: &Subject<'_>, extents: Extents<'_>) -> io::Result<()> {
    writeln!(out, "# input map of borg create --map, by blkholefs")?;
    for extent in extents {
        let (start, extent) = extent?;
        let state = match extent.kind {
            ExtentKind::Data => "data",
            ExtentKind::Unchanged if subject.since.is_some() => "same",
            ExtentKind::Hole | ExtentKind::Free | ExtentKind::Unchanged => "zero",
        };
        writeln!(out, "{start} {} {state}", extent.end.saturating_sub(start))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::MapFormat;
    use super::super::tests::{CHANGES, EXTENTS, printed};

    #[test]
    fn ranges_have_the_states_of_borg() {
        let lines = |text: String| text.lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
        let plain = lines(printed(MapFormat::Borg, false, &EXTENTS));
        assert_eq!(plain, ["0 1048576 zero", "1048576 65536 data", "1114112 9371648 zero"]);
        let changes = lines(printed(MapFormat::Borg, true, &CHANGES));
        assert_eq!(changes, ["0 65536 same", "65536 65536 data", "131072 65536 zero", "196608 803392 same"]);
    }
}
