//! A device as a grid of squares, in a picture of its own for documents: SVG 1.1.

use std::fmt::Write as _;
use std::io::{self, Write};

use super::grid::{Grid, Scene, Shade};
use super::{Extents, human};

/// The cells in a row, and the rows at most.
const COLUMNS: usize = 64;
const ROWS: usize = 32;

/// The pixels of a square with the gap to the next one, and of the square.
const PITCH: usize = 12;
const SQUARE: usize = 10;

/// Where the squares begin, from the left and from above.
const LEFT: usize = 96;
const TOP: usize = 84;
const WIDTH: usize = LEFT + COLUMNS * PITCH + 24;

/// The pixels from one line of text to the next.
const LINE: usize = 24;
/// The pixels of the picture that an item of the legend, and a sum, takes. The longest ones fit.
const ITEM: usize = 150;
const SUM: usize = 250;
/// The items of the legend in a line.
const ITEMS: usize = (WIDTH - LEFT) / ITEM;
/// How much fits into the first line, in half the width of a usual letter.
const NAME: usize = 140;

/// The first lines of each picture. A file that begins with them may be replaced by another picture. Documents of other programs
/// begin with the first one, too.
pub const BEGIN: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!-- a picture by blkholefs map -->\n";

/// The colour of a shade. Blue, orange and grey differ for all kinds of colour vision, and the tones of each also by brightness.
/// (The ramp of blue tones is "Blues" of ColorBrewer, that of orange tones is "Oranges".)
fn colour(shade: Shade, is_since: bool) -> &'static str {
    match (shade, is_since) {
        (Shade::Empty, _) => "#eceef1",
        (Shade::Light, false) | (Shade::PartlyZero, _) => "#9ecae1",
        (Shade::Medium, false) => "#4292c6",
        (Shade::Dark, false) => "#2160a8",
        (Shade::Full, false) => "#08306b",
        (Shade::Zero, _) => "#2171b5",
        (Shade::Light, true) => "#fdc08c",
        (Shade::Medium, true) => "#f58a3a",
        (Shade::Dark, true) => "#c94a02",
        (Shade::Full, true) => "#7f2704",
    }
}

/// Prints the picture of a device, with a title, a legend and the sums. All extents are read before the first line.
///
/// # Errors
/// As write(2), and what `extents` returns.
pub fn svg(out: &mut dyn Write, scene: &Scene<'_>, extents: Extents<'_>) -> io::Result<()> {
    let grid = Grid::of(scene, COLUMNS, ROWS, extents)?;
    let (sums, legend) = (grid.sums(), TOP + grid.rows().count() * PITCH + LINE);
    let below = legend + grid.legend().len().div_ceil(ITEMS) * LINE + LINE / 2;
    head(out, &grid.title(scene), &grid.measure(scene), &sums, below + LINE)?;
    cells(out, &grid, scene.older.is_some())?;
    for (index, (shade, meaning)) in grid.legend().iter().enumerate() {
        let (x, y) = (LEFT + index % ITEMS * ITEM, legend + index / ITEMS * LINE);
        let fill = colour(*shade, scene.older.is_some());
        writeln!(out, "<rect x=\"{x}\" y=\"{y}\" width=\"{PITCH}\" height=\"{PITCH}\" fill=\"{fill}\"/>")?;
        writeln!(out, "<text x=\"{}\" y=\"{}\">{meaning}</text>", x + PITCH + 6, y + SQUARE + 1)?;
    }
    for (index, sum) in sums.iter().enumerate() {
        let x = LEFT + index * SUM;
        writeln!(out, "<text x=\"{x}\" y=\"{below}\" font-weight=\"bold\">{}</text>", escaped(sum))?;
    }
    writeln!(out, "</g>\n</svg>")
}

/// Prints the positions at the left, and all squares of a shade as one path.
fn cells(out: &mut dyn Write, grid: &Grid, is_since: bool) -> io::Result<()> {
    let legend = grid.legend();
    let mut squares = vec![String::new(); legend.len()];
    writeln!(out, "<g font-size=\"11\" fill=\"#57606a\" text-anchor=\"end\">")?;
    for (row, (start, shades)) in grid.rows().enumerate() {
        let y = TOP + row * PITCH;
        // Every second row: a label is higher than a row.
        if row % 2 == 0 {
            writeln!(out, "<text x=\"{}\" y=\"{}\">{}</text>", LEFT - 12, y + SQUARE - 1, human(start))?;
        }
        for (column, shade) in shades.enumerate() {
            let path = legend.iter().position(|item| item.0 == shade).and_then(|index| squares.get_mut(index));
            if let Some(path) = path {
                let _ = write!(path, "M{} {y}h{SQUARE}v{SQUARE}h-{SQUARE}z", LEFT + column * PITCH);
            }
        }
    }
    writeln!(out, "</g>")?;
    for ((shade, meaning), path) in legend.iter().zip(&squares).filter(|(_, path)| !path.is_empty()) {
        let fill = colour(*shade, is_since);
        writeln!(out, "<path fill=\"{fill}\" d=\"{path}\"><title>{meaning}</title></path>")?;
    }
    Ok(())
}

/// The first elements: the title and the description for screen readers, the background, which makes the picture readable in light
/// and in dark documents, and the first two lines of text.
fn head(out: &mut dyn Write, title: &str, measure: &str, sums: &[String], height: usize) -> io::Result<()> {
    write!(out, "{BEGIN}")?;
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" version=\"1.1\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} \
         {height}\" role=\"img\" aria-labelledby=\"title description\">"
    )?;
    writeln!(out, "<title id=\"title\">{}</title>", escaped(title))?;
    writeln!(out, "<desc id=\"description\">{}: {}</desc>", escaped(measure), escaped(&sums.join(", ")))?;
    let (width, high) = (WIDTH - 1, height - 1);
    writeln!(
        out,
        "<rect x=\"0.5\" y=\"0.5\" width=\"{width}\" height=\"{high}\" rx=\"8\" fill=\"#ffffff\" stroke=\"#d0d7de\"/>"
    )?;
    writeln!(
        out,
        "<g font-family=\"system-ui, 'DejaVu Sans', Helvetica, Arial, sans-serif\" font-size=\"12\" fill=\"#1f2328\">"
    )?;
    let name = escaped(&shortened(title));
    writeln!(out, "<text x=\"24\" y=\"36\" font-size=\"16\" font-weight=\"bold\">{name}</text>")?;
    writeln!(out, "<text x=\"24\" y=\"60\" font-size=\"13\" fill=\"#57606a\">{}</text>", escaped(measure))
}

/// The begin and the end of a text that is too long for its line.
fn shortened(text: &str) -> String {
    if text.chars().map(width).sum::<usize>() <= NAME {
        return text.to_owned();
    }
    let half = |characters: &mut dyn Iterator<Item = char>| {
        let mut left = NAME / 2 - width('\u{2026}');
        let fits = characters.take_while(|character| {
            left = left.saturating_sub(width(*character));
            left > 0
        });
        fits.collect::<Vec<_>>()
    };
    let (begin, mut end) = (half(&mut text.chars()), half(&mut text.chars().rev()));
    end.reverse();
    begin.into_iter().chain(['\u{2026}']).chain(end).collect()
}

/// The width of a character, at most, in half the width of a usual letter.
fn width(character: char) -> usize {
    match character {
        'A'..='Z' | 'm' | 'w' => 3,
        _ if character.is_ascii() => 2,
        _ => 4,
    }
}

/// Text of an XML document (XML 1.0, section 2.2: not every character may be in one, not even as a reference).
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\u{fffe}' | '\u{ffff}' => escaped.extend(character.escape_default()),
            control if control.is_control() => escaped.extend(control.escape_default()),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::tests::items;
    use super::*;
    use crate::map::ExtentKind;
    use crate::units::Bytes;

    fn drawn(name: &str, older: Option<&str>, extents: &[(u64, u64, ExtentKind)]) -> String {
        let len = Bytes::new(extents.last().map_or(0, |extent| extent.1));
        let scene = Scene { name, older, len, range: &(Bytes::ZERO..len) };
        let mut extents = items(extents);
        let mut out = Vec::new();
        svg(&mut out, &scene, &mut extents).unwrap();
        String::from_utf8(out).unwrap()
    }

    const HALF: [(u64, u64, ExtentKind); 2] = [(0, 1 << 20, ExtentKind::Data), (1 << 20, 2 << 20, ExtentKind::Hole)];

    #[test]
    fn squares_of_each_shade() {
        let text = drawn("/dev/x", None, &HALF);
        let squares = |shade| {
            let line = text.lines().find(|line| line.starts_with(&format!("<path fill=\"{}\"", colour(shade, false))));
            line.map_or(0, |line| line.matches('M').count())
        };
        assert_eq!((squares(Shade::Full), squares(Shade::Empty), squares(Shade::Light)), (256, 256, 0));
        for part in [
            "<title id=\"title\">/dev/x</title>",
            ">data 1MiB (50.0%)</text>",
            ">1.5MiB</text>",
            "2MiB, one cell is 4KiB",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn names_cannot_break_the_document() {
        let text = drawn("</title>&\"\u{1}\u{ffff}]]>", None, &HALF);
        assert!(text.contains("<title id=\"title\">&lt;/title&gt;&amp;\"\\u{1}\\u{ffff}]]&gt;</title>"), "{text}");
        let one = drawn("x", None, &[(0, 1, ExtentKind::Data), (1, 1 << 40, ExtentKind::Hole)]);
        assert!(one.contains(">data 1B (&lt;0.1%)</text>"), "{one}");
    }

    #[test]
    fn a_long_name_keeps_its_ends() {
        assert_eq!(shortened("/dev/x"), "/dev/x");
        let long = shortened(&format!("/dev/a{}z", "-".repeat(500)));
        assert!(long.starts_with("/dev/a-") && long.ends_with("-z") && long.chars().count() <= NAME / 2, "{long}");
        for wide in ["W", "\u{65e5}"] {
            // The widest letters are 18 pixels wide, in the font of 16 pixels.
            assert!(shortened(&wide.repeat(500)).chars().count() * 18 <= WIDTH - 24, "{wide}");
        }
    }

    #[test]
    fn the_texts_of_the_legend_and_the_sums_fit() {
        for older in [None, Some("y")] {
            let scene = Scene { name: "x", older, len: Bytes::ZERO, range: &(Bytes::ZERO..Bytes::ZERO) };
            let grid = Grid::of(&scene, 1, 1, &mut std::iter::empty()).unwrap();
            // A character of 12 pixels is 8 pixels wide at most on average, and one of a bold font 9.
            assert!(grid.legend().iter().all(|item| item.1.len() * 8 + PITCH < ITEM));
            assert!(grid.sums().len() * SUM <= WIDTH - LEFT + 24);
            assert!("changed data 1023.9GiB (>99.9%)".len() * 8 <= SUM);
        }
    }
}
