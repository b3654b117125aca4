//! One line for each extent: start, length, the status flags of NBD and a word.

use std::io::{self, Write};

use super::Extents;
use crate::map::ExtentKind;

/// The status flags of NBD's metadata context `base:allocation` for a kind of extent, and the word for them in the output
/// of `nbdinfo`.
pub fn status(kind: ExtentKind) -> (u8, &'static str) {
    match kind {
        ExtentKind::Data => (0, "data"),
        ExtentKind::Hole => (3, "hole,zero"),
        ExtentKind::Unchanged => (3, "unchanged"),
        ExtentKind::Free => (3, "free"),
    }
}

/// The same for a map of changes. The flags are those of the newer device: what is unchanged may be data in it.
pub fn change_status(kind: ExtentKind) -> (u8, &'static str) {
    match kind {
        ExtentKind::Data => (0, "data"),
        ExtentKind::Hole | ExtentKind::Free => (3, "zero"),
        ExtentKind::Unchanged => (0, "unchanged"),
    }
}

/// Prints the extents of a map of data and holes, as `nbdinfo --map` does.
pub fn map(out: &mut dyn Write, extents: Extents<'_>) -> io::Result<()> {
    lines(out, extents, status)
}

/// Prints the extents of a map of changes.
pub fn changes(out: &mut dyn Write, extents: Extents<'_>) -> io::Result<()> {
    lines(out, extents, change_status)
}

fn lines(out: &mut dyn Write, extents: Extents<'_>, status: fn(ExtentKind) -> (u8, &'static str)) -> io::Result<()> {
    for extent in extents {
        let (start, extent) = extent?;
        let (bits, word) = status(extent.kind);
        let length = extent.end.saturating_sub(start).get();
        writeln!(out, "{start:>10} {length:>11} {bits:>4}  {word}", start = start.get())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::MapFormat;
    use super::super::tests::{CHANGES, EXTENTS, printed};
    use super::*;

    #[test]
    fn lines_look_like_nbdinfo() {
        assert_eq!(
            printed(MapFormat::Plain, false, &EXTENTS),
            "         0     1048576    3  hole,zero\n   1048576       65536    0  data\n   1114112     9371648    3  hole,zero\n"
        );
    }

    #[test]
    fn every_kind_of_hole_has_a_word() {
        let runs = [(0, 512, ExtentKind::Unchanged), (512, 1024, ExtentKind::Free), (1024, 2048, ExtentKind::Data)];
        let plain = printed(MapFormat::Plain, false, &runs);
        assert_eq!(
            plain.lines().map(|line| line.trim()).collect::<Vec<_>>(),
            ["0         512    3  unchanged", "512         512    3  free", "1024        1024    0  data"]
        );
    }

    #[test]
    fn unchanged_has_no_flag_that_says_zeros() {
        let lines = printed(MapFormat::Plain, true, &CHANGES);
        let words: Vec<Vec<_>> = lines.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            words[..3],
            [["0", "65536", "0", "unchanged"], ["65536", "65536", "0", "data"], ["131072", "65536", "3", "zero"]]
        );
    }
}
