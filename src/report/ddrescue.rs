//! A mapfile of GNU ddrescue, for its option `--domain-mapfile`.
//!
//! The format is in the chapter "Mapfile structure" of ddrescue's manual. ddrescue copies the blocks that are marked finished
//! (`+`) in a domain mapfile. The others are marked non-tried (`?`).

use std::io::{self, Write};

use super::ranges::is_listed;
use super::{Extents, Subject};

/// Prints data as finished; for a map of changes, all but unchanged ranges.
pub fn map(out: &mut dyn Write, subject: &Subject<'_>, extents: Extents<'_>) -> io::Result<()> {
    writeln!(out, "# Mapfile. Created by blkholefs, for ddrescue --domain-mapfile")?;
    writeln!(out, "# current_pos  current_status  current_pass")?;
    writeln!(out, "0x00000000     ?               1")?;
    writeln!(out, "#      pos        size  status")?;
    for extent in extents {
        let (start, extent) = extent?;
        let status = if is_listed(extent.kind, subject) { '+' } else { '?' };
        let length = extent.end.saturating_sub(start).get();
        writeln!(out, "0x{:08X}  0x{length:08X}  {status}", start.get())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::MapFormat;
    use super::super::tests::{CHANGES, EXTENTS, printed};

    #[test]
    fn zeros_are_finished_in_a_map_of_changes_only() {
        let blocks = |text: String| {
            text.lines().skip(4).map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
        };
        let plain = blocks(printed(MapFormat::Ddrescue, false, &EXTENTS));
        assert_eq!(plain, ["0x00000000 0x00100000 ?", "0x00100000 0x00010000 +", "0x00110000 0x008F0000 ?"]);
        let changes = blocks(printed(MapFormat::Ddrescue, true, &CHANGES));
        assert_eq!(changes[1..3], ["0x00010000 0x00010000 +", "0x00020000 0x00010000 +"]);
        assert!(changes[0].ends_with('?') && changes[3].ends_with('?'));
    }
}
