//! The output of `blkholefs map` and `blkholefs info`.

use std::fmt::Write as _;
use std::io::{self, Write};

use crate::map::{Extent, ExtentKind, HoleMap, view};
use crate::source::thin::offline::Found;
use crate::source::{Layer, Stack};
use crate::units::Bytes;

/// How a map is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MapFormat {
    /// One line for each extent, as `nbdinfo --map` prints it.
    #[default]
    Plain,
    /// The output of `qemu-img map --output=json` for the same bytes.
    Json,
    /// The sums of data and holes in bytes, as `nbdinfo --map --totals` prints them.
    Totals,
}

/// Prints extents one by one: the memory that it takes does not depend on their number.
pub struct MapPrinter<W: Write> {
    out: W,
    format: MapFormat,
    extents: u64,
    data: Bytes,
    holes: Bytes,
}

/// The status flags of NBD's metadata context `base:allocation` for a kind of extent, and the word for them in the output
/// of `nbdinfo`.
fn status(kind: ExtentKind) -> (u8, &'static str) {
    match kind {
        ExtentKind::Data => (0, "data"),
        ExtentKind::Hole => (3, "hole,zero"),
        ExtentKind::Unchanged => (3, "unchanged"),
        ExtentKind::Free => (3, "free"),
    }
}

impl<W: Write> MapPrinter<W> {
    /// A printer to `out`.
    pub fn new(out: W, format: MapFormat) -> Self {
        Self { out, format, extents: 0, data: Bytes::ZERO, holes: Bytes::ZERO }
    }

    /// Prints the extent that begins at `start`.
    ///
    /// # Errors
    /// As write(2).
    pub fn extent(&mut self, start: Bytes, extent: Extent) -> io::Result<()> {
        let length = extent.end.saturating_sub(start);
        let (data, holes) = if extent.kind.is_data() { (length, Bytes::ZERO) } else { (Bytes::ZERO, length) };
        self.add(data, holes);
        self.extents += 1;
        match self.format {
            MapFormat::Plain => {
                let (bits, word) = status(extent.kind);
                writeln!(
                    self.out,
                    "{start:>10} {length:>11} {bits:>4}  {word}",
                    start = start.get(),
                    length = length.get()
                )
            }
            MapFormat::Json => self.json(start, length, extent.kind.is_data()),
            MapFormat::Totals => Ok(()),
        }
    }

    fn json(&mut self, start: Bytes, length: Bytes, data: bool) -> io::Result<()> {
        let before = if self.extents == 1 { "[" } else { ",\n" };
        write!(
            self.out,
            "{before}{{ \"start\": {start}, \"length\": {length}, \"depth\": 0, \"present\": true, \"zero\": {zero}, \
             \"data\": {data}, \"compressed\": false, \"offset\": {start}}}",
            zero = !data,
        )
    }

    /// Adds to the sums, for a range whose extents are not printed one by one.
    pub fn add(&mut self, data: Bytes, holes: Bytes) {
        self.data = self.data.saturating_add(data);
        self.holes = self.holes.saturating_add(holes);
    }

    /// Prints what follows the last extent, and flushes the output.
    ///
    /// # Errors
    /// As write(2).
    pub fn finish(mut self) -> io::Result<()> {
        match self.format {
            MapFormat::Plain => {}
            MapFormat::Json => writeln!(self.out, "{}]", if self.extents == 0 { "[" } else { "" })?,
            MapFormat::Totals => {
                let all = self.data.saturating_add(self.holes).get().max(1);
                for (sum, kind) in [(self.data, ExtentKind::Data), (self.holes, ExtentKind::Hole)] {
                    let (bits, word) = status(kind);
                    // Tenths of a percent, rounded in integers: a sum of bytes may have too many digits for a float.
                    let tenths = (u128::from(sum.get()) * 1000 + u128::from(all) / 2) / u128::from(all);
                    let (whole, tenth) = (tenths / 10, tenths % 10);
                    writeln!(self.out, "{sum:>10} {whole:>3}.{tenth}% {bits:>3} {word}", sum = sum.get())?;
                }
            }
        }
        self.out.flush()
    }
}

/// A stack as a tree of text: the name, kind and length of each layer, and where its holes come from or why it has none.
pub fn tree(stack: &Stack) -> String {
    let loaded = stack.load();
    let sparse = view::has_hole(loaded.map(), Bytes::new(4096));
    let mut text = String::new();
    branch(&stack.top, "", "", &mut text);
    let verdict = match (loaded.map().dense_because(), sparse) {
        (Some(reason), _) => format!("dense: {reason}"),
        (None, true) => "has holes".to_owned(),
        (None, false) => "has no holes now".to_owned(),
    };
    let _ = writeln!(text, "{verdict}");
    text
}

fn branch(layer: &Layer, lead: &str, below_lead: &str, text: &mut String) {
    let holes = holes(layer);
    let _ = writeln!(text, "{lead}{}  {}, {}, {holes}", layer.name, layer.kind, human(layer.len()));
    for (index, below) in layer.below.iter().enumerate() {
        let last = index + 1 == layer.below.len();
        let (tick, rest) = if last { ("`- ", "   ") } else { ("|- ", "|  ") };
        branch(below, &format!("{below_lead}{tick}"), &format!("{below_lead}{rest}"), text);
    }
}

/// Where the holes of a layer come from, or why it has none.
fn holes(layer: &Layer) -> String {
    match layer.map.dense_because() {
        Some(reason) => format!("dense: {reason}"),
        None => format!("holes: {}", layer.holes_from),
    }
}

/// The volumes of an offline pool, one on each line; for a damaged volume, the damage. Reads all of their mapping trees.
pub fn volumes(found: &[Found]) -> String {
    let line = |found: &Found| match volume_sizes(found) {
        Ok((len, data)) => format!("volume {}  thin, {}, {} of it data\n", found.id, human(len), human(data)),
        Err(damage) => format!("volume {}  damaged: {damage}\n", found.id),
    };
    found.iter().map(line).collect()
}

/// The volumes of an offline pool as JSON: `[{"volume","size","data"}]`, or `{"volume","damaged"}` for a damaged volume.
pub fn volumes_json(found: &[Found]) -> String {
    let object = |found: &Found| match volume_sizes(found) {
        Ok((len, data)) => format!("{{ \"volume\": {}, \"size\": {len}, \"data\": {data}}}", found.id),
        Err(damage) => format!("{{ \"volume\": {}, \"damaged\": {}}}", found.id, quoted(&damage)),
    };
    let objects: Vec<_> = found.iter().map(object).collect();
    format!("[{}]\n", objects.join(",\n"))
}

/// The length of a volume and its bytes of data.
///
/// # Errors
/// The damage.
fn volume_sizes(found: &Found) -> Result<(Bytes, Bytes), String> {
    let volume = found.volume.as_ref().map_err(ToString::to_string)?;
    let map = volume.map().map_err(|error| error.to_string())?;
    Ok((volume.len(), map.allocated().unwrap_or(volume.len())))
}

/// A stack as JSON: `{"name","kind","size","holes-from","dense-because","below":[...]}`.
pub fn json(stack: &Stack) -> String {
    let loaded = stack.load();
    let sparse = view::has_hole(loaded.map(), Bytes::new(4096));
    let mut text = String::new();
    json_layer(&stack.top, Some(sparse), &mut text);
    text.push('\n');
    text
}

fn json_layer(layer: &Layer, sparse: Option<bool>, text: &mut String) {
    let dense = layer.map.dense_because().map(|reason| reason.to_string());
    let _ = write!(
        text,
        "{{ \"name\": {}, \"kind\": {}, \"size\": {}, \"holes-from\": {}, \"dense-because\": {}",
        quoted(&layer.name),
        quoted(&layer.kind),
        layer.len(),
        if dense.is_some() { "null".to_owned() } else { quoted(&layer.holes_from) },
        dense.as_deref().map_or("null".to_owned(), quoted),
    );
    if let Some(sparse) = sparse {
        let _ = write!(text, ", \"has-holes\": {sparse}");
    }
    text.push_str(", \"below\": [");
    for (index, below) in layer.below.iter().enumerate() {
        text.push_str(if index == 0 { "" } else { ", " });
        json_layer(below, None, text);
    }
    text.push_str("]}");
}

/// A JSON string (RFC 8259, section 7).
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            control if control.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(control));
            }
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}

/// A length in binary units with one decimal place, rounded down: `1.5GiB`.
pub fn human(bytes: Bytes) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut tenths = u128::from(bytes.get()) * 10;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    match tenths % 10 {
        0 => format!("{}{}", tenths / 10, UNITS[unit]),
        tenth => format!("{}.{tenth}{}", tenths / 10, UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(format: MapFormat, extents: &[(u64, u64, ExtentKind)]) -> String {
        let mut out = Vec::new();
        let mut printer = MapPrinter::new(&mut out, format);
        for (start, end, kind) in extents {
            printer.extent(Bytes::new(*start), Extent { end: Bytes::new(*end), kind: *kind }).unwrap();
        }
        printer.finish().unwrap();
        String::from_utf8(out).unwrap()
    }

    const EXTENTS: [(u64, u64, ExtentKind); 3] = [
        (0, 1_048_576, ExtentKind::Hole),
        (1_048_576, 1_114_112, ExtentKind::Data),
        (1_114_112, 10_485_760, ExtentKind::Hole),
    ];

    #[test]
    fn plain_and_totals_look_like_nbdinfo() {
        assert_eq!(
            printed(MapFormat::Plain, &EXTENTS),
            "         0     1048576    3  hole,zero\n   1048576       65536    0  data\n   1114112     9371648    3  hole,zero\n"
        );
        assert_eq!(
            printed(MapFormat::Totals, &EXTENTS),
            "     65536   0.6%   0 data\n  10420224  99.4%   3 hole,zero\n"
        );
    }

    #[test]
    fn every_kind_of_hole_has_a_word_and_counts_as_hole() {
        let runs = [(0, 512, ExtentKind::Unchanged), (512, 1024, ExtentKind::Free), (1024, 2048, ExtentKind::Data)];
        let plain = printed(MapFormat::Plain, &runs);
        assert_eq!(
            plain.lines().map(|line| line.trim()).collect::<Vec<_>>(),
            ["0         512    3  unchanged", "512         512    3  free", "1024        1024    0  data"]
        );
        let totals = printed(MapFormat::Totals, &runs);
        assert_eq!(totals, "      1024  50.0%   0 data\n      1024  50.0%   3 hole,zero\n");
        assert_eq!(printed(MapFormat::Json, &runs).matches("\"data\": false").count(), 2);
    }

    #[test]
    fn json_looks_like_qemu_img() {
        let text = printed(MapFormat::Json, &EXTENTS);
        assert!(text.starts_with(
            "[{ \"start\": 0, \"length\": 1048576, \"depth\": 0, \"present\": true, \"zero\": true, \"data\": false, \
             \"compressed\": false, \"offset\": 0},\n{ \"start\": 1048576,"
        ));
        let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(parsed[1]["data"], true);
        assert_eq!(parsed[2]["offset"], 1_114_112);
        assert_eq!(printed(MapFormat::Json, &[]), "[]\n");
    }

    #[test]
    fn names_are_quoted_for_json() {
        assert_eq!(quoted("a\"b\\c\nd"), "\"a\\\"b\\\\c\\u000ad\"");
    }

    #[test]
    fn lengths_for_people() {
        for (bytes, text) in
            [(0, "0B"), (1023, "1023B"), (1024, "1KiB"), (1536, "1.5KiB"), (1 << 40, "1TiB"), (u64::MAX, "15.9EiB")]
        {
            assert_eq!(human(Bytes::new(bytes)), text);
        }
    }
}
