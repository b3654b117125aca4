//! A device as a grid of characters, for a terminal.

use std::fmt::Write as _;
use std::io::{self, Write};

use super::grid::{Grid, Scene, Shade};
use super::{Extents, human};

/// The rows at most, so that a picture fits into a terminal of 24 lines with its legend.
const ROWS: usize = 16;

/// Columns before the cells: a position such as `1023.9GiB`, and two spaces.
const MARGIN: usize = 11;

/// The number of columns of cells is a multiple of this, so that rows begin at round positions.
const STEP: usize = 8;

/// What the terminal can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// The width in characters.
    pub columns: usize,
    /// Whether it shows block characters.
    pub has_unicode: bool,
    /// Whether it shows colours.
    pub has_colours: bool,
}

impl Look {
    fn character(self, shade: Shade) -> char {
        let (unicode, ascii) = match shade {
            Shade::Empty => ('\u{b7}', '.'),
            Shade::Light => ('\u{2591}', '-'),
            Shade::Medium => ('\u{2592}', '+'),
            Shade::Dark => ('\u{2593}', '*'),
            Shade::Full => ('\u{2588}', '#'),
            Shade::PartlyZero => ('o', 'o'),
            Shade::Zero => ('0', '0'),
        };
        if self.has_unicode { unicode } else { ascii }
    }

    /// Appends characters in the colour of their shade. The colours are those of every terminal, in the tones that its user
    /// chose, so that they can be read on any background.
    fn paint(self, shade: Shade, count: usize, text: &mut String) {
        let colour = match shade {
            Shade::Empty => 90,
            Shade::Light | Shade::Medium | Shade::Dark | Shade::Full => 36,
            Shade::PartlyZero | Shade::Zero => 35,
        };
        let characters = std::iter::repeat_n(self.character(shade), count);
        if self.has_colours {
            let _ = write!(text, "\x1b[{colour}m");
        }
        text.extend(characters);
        if self.has_colours {
            text.push_str("\x1b[0m");
        }
    }

    /// Plain text, for a terminal that shows only ASCII with escapes for all else.
    fn plain(self, text: &str) -> String {
        if self.has_unicode {
            return text.to_owned();
        }
        let mut plain = String::new();
        for character in text.chars() {
            match character.is_ascii() {
                true => plain.push(character),
                false => plain.extend(character.escape_default()),
            }
        }
        plain
    }
}

/// Prints the picture of a device, with a title, a legend and the sums. All extents are read before the first line.
///
/// # Errors
/// As write(2), and what `extents` returns.
pub fn picture(out: &mut dyn Write, scene: &Scene<'_>, look: Look, extents: Extents<'_>) -> io::Result<()> {
    let columns = (look.columns.saturating_sub(MARGIN) / STEP * STEP).max(STEP);
    let grid = Grid::of(scene, columns, ROWS, extents)?;
    writeln!(out, "{}", look.plain(&grid.title(scene)))?;
    writeln!(out, "{}\n", grid.measure(scene))?;
    for (start, shades) in grid.rows() {
        let mut line = format!("{:>9}  ", human(start));
        let mut shades = shades.peekable();
        while let Some(shade) = shades.next() {
            let mut count = 1;
            while shades.next_if_eq(&shade).is_some() {
                count += 1;
            }
            look.paint(shade, count, &mut line);
        }
        writeln!(out, "{line}")?;
    }
    writeln!(out)?;
    let legend = grid.legend().iter().map(|(shade, meaning)| {
        let mut item = String::new();
        look.paint(*shade, 1, &mut item);
        let _ = write!(item, " {meaning}");
        (2 + meaning.len(), item)
    });
    items(out, look.columns, legend)?;
    items(out, look.columns, grid.sums().into_iter().map(|sum| (sum.len(), sum)))
}

/// Prints items, which have a width, on as few lines as the terminal allows.
fn items(out: &mut dyn Write, columns: usize, items: impl Iterator<Item = (usize, String)>) -> io::Result<()> {
    const GAP: usize = 3;
    let indent = MARGIN.min(columns / 8);
    let mut used = 0;
    for (width, item) in items {
        let gap = match used {
            0 => indent,
            used if used + GAP + width <= columns => GAP,
            _ => {
                writeln!(out)?;
                used = 0;
                indent
            }
        };
        write!(out, "{:gap$}{item}", "")?;
        used += gap + width;
    }
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::super::tests::items;
    use super::*;
    use crate::map::ExtentKind;
    use crate::units::Bytes;

    const ASCII: Look = Look { columns: 80, has_unicode: false, has_colours: false };

    fn drawn(look: Look, name: &str, older: Option<&str>, extents: &[(u64, u64, ExtentKind)]) -> String {
        let len = Bytes::new(extents.last().map_or(0, |extent| extent.1));
        let scene = Scene { name, older, len, range: &(Bytes::ZERO..len) };
        let mut extents = items(extents);
        let mut out = Vec::new();
        picture(&mut out, &scene, look, &mut extents).unwrap();
        String::from_utf8(out).unwrap()
    }

    const SMALL: [(u64, u64, ExtentKind); 3] = [
        (0, 40 << 10, ExtentKind::Data),
        (40 << 10, 400 << 10, ExtentKind::Hole),
        (400 << 10, 401 << 10, ExtentKind::Data),
    ];

    #[test]
    fn a_small_device() {
        let expected = "\
/dev/x
401KiB, one cell is 4KiB

       0B  ##########......................................................
   256KiB  ....................................#

          . hole   - up to 1/3 data   + up to 2/3   * more   # all data
          data 41KiB (10.2%)   holes 360KiB (89.8%)
";
        assert_eq!(drawn(ASCII, "/dev/x", None, &SMALL), expected);
        let blocks = drawn(Look { has_unicode: true, ..ASCII }, "/dev/x", None, &SMALL);
        assert!(blocks.contains("\u{2588}\u{2588}\u{b7}\u{b7}") && !blocks.contains('\x1b'), "{blocks}");
    }

    #[test]
    fn colours_end_where_they_began() {
        let text = drawn(Look { has_colours: true, ..ASCII }, "/dev/x", None, &SMALL);
        assert!(text.contains("\x1b[36m##########\x1b[0m\x1b[90m......"), "{text}");
        assert_eq!(text.matches("\x1b[").count(), 2 * text.matches("\x1b[0m").count());
        for line in text.lines().filter(|line| line.contains('\x1b')) {
            assert!(line.rfind("\x1b[0m") > line.rfind("\x1b[3"), "{line}");
        }
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for columns in [30, 79, 80, 81, 200] {
            for older in [None, Some("y")] {
                let text = drawn(
                    Look { columns, has_unicode: true, has_colours: false },
                    "x",
                    older,
                    &[(0, 1 << 40, ExtentKind::Data)],
                );
                let widest = text.lines().skip(2).map(|line| line.chars().count()).max().unwrap();
                assert!(widest <= columns, "{columns}: {text}");
                let cells: Vec<_> =
                    text.lines().filter(|line| line.contains('\u{2588}') && line.contains("B  ")).collect();
                assert!(cells.len() <= ROWS && cells.len() * 2 >= ROWS, "{text}");
            }
        }
    }

    #[test]
    fn ascii_is_ascii_whatever_the_name() {
        let text = drawn(ASCII, "/dev/m\u{fc}ll", Some("/dev/\u{202e}"), &SMALL);
        assert!(text.is_ascii() && text.contains("m\\u{fc}ll"), "{text}");
    }

    #[test]
    fn an_empty_range_has_no_rows() {
        let text = drawn(ASCII, "x", None, &[]);
        assert!(text.starts_with("x\n0B, one cell is 4KiB\n\n\n"), "{text}");
        assert!(text.ends_with("data 0B (0.0%)   holes 0B (0.0%)\n"), "{text}");
    }
}
