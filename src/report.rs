//! The output of `blkholefs map`, `blkholefs info` and `blkholefs status`.
//!
//! A map is printed by one function for each form. It takes the extents one by one: the memory that it needs does not depend
//! on their number, and no form needs a sum before the first extent.

mod bmap;
mod borg;
mod csi;
mod ddrescue;
mod grid;
mod picture;
mod plain;
mod qemu;
mod ranges;
mod since;
mod stack;
mod status;
mod svg;
mod text;
mod totals;
mod volumes;

use std::io::{self, Write};

use crate::map::Extent;
use crate::source::changes::Identity;
use crate::units::Bytes;

pub use grid::Scene;
pub use picture::{Look, picture};
pub use stack::{json, json_fields, tree};
pub use status::{status, status_json};
pub use svg::{BEGIN as SVG_BEGIN, svg};
pub use text::{human, quoted};
pub use totals::Totals;
pub use volumes::{volumes, volumes_json};

/// How a map is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MapFormat {
    /// One line for each extent, as `nbdinfo --map` prints it.
    #[default]
    Plain,
    /// The output of `qemu-img map --output=json` for the same bytes; for a map of changes, a form of its own.
    Json,
    /// The sums of the kinds in bytes, as `nbdinfo --map --totals` prints them.
    Totals,
    /// The input map of `borg create --map` (borg 2).
    Borg,
    /// A block map of bmaptool, version 2.0.
    Bmap,
    /// A mapfile of GNU ddrescue, for its option `--domain-mapfile`.
    Ddrescue,
    /// A response of the SnapshotMetadata service of the Container Storage Interface, as JSON.
    Csi,
}

impl MapFormat {
    /// The forms of other programs, by the names that `--format` takes.
    pub const NAMED: [(&str, Self); 4] =
        [("borg", Self::Borg), ("bmap", Self::Bmap), ("ddrescue", Self::Ddrescue), ("csi", Self::Csi)];

    /// Whether the form describes a whole device, and cannot describe a part of one.
    pub fn needs_all(self) -> bool {
        matches!(self, Self::Borg | Self::Bmap)
    }
}

/// What a map is of.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// The length of the device.
    pub len: Bytes,
    /// The part that was asked for, where it is not all of the device: its start, and its length if there is a limit.
    pub part: (Bytes, Option<Bytes>),
    /// For a map of changes, the devices that were compared. `None` for a map of data and holes.
    pub since: Option<&'a Identity>,
}

/// Extents in ascending order, without gaps, each with its start. An error ends the output.
pub type Extents<'a> = &'a mut dyn Iterator<Item = io::Result<(Bytes, Extent)>>;

/// Prints a map, and flushes the output. [`MapFormat::Totals`] prints the sums of the extents.
///
/// # Errors
/// As write(2), and what `extents` returns.
pub fn map(out: &mut dyn Write, format: MapFormat, subject: &Subject<'_>, extents: Extents<'_>) -> io::Result<()> {
    match (format, subject.since) {
        (MapFormat::Plain, None) => plain::map(out, extents)?,
        (MapFormat::Plain, Some(_)) => plain::changes(out, extents)?,
        (MapFormat::Json, None) => qemu::map(out, subject, extents)?,
        (MapFormat::Json, Some(identity)) => since::map(out, identity, extents)?,
        (MapFormat::Totals, since) => Totals::of(extents)?.print(out, since.is_some())?,
        (MapFormat::Borg, _) => borg::map(out, subject, extents)?,
        (MapFormat::Bmap, _) => bmap::map(out, subject, extents)?,
        (MapFormat::Ddrescue, _) => ddrescue::map(out, subject, extents)?,
        (MapFormat::Csi, _) => csi::map(out, subject, extents)?,
    }
    out.flush()
}

/// What the tests of the forms share.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::ExtentKind;
    use crate::source::changes::IdentityValue;

    pub const EXTENTS: [(u64, u64, ExtentKind); 3] = [
        (0, 1_048_576, ExtentKind::Hole),
        (1_048_576, 1_114_112, ExtentKind::Data),
        (1_114_112, 10_485_760, ExtentKind::Hole),
    ];

    /// The part that is all of a device.
    pub const WHOLE: (Bytes, Option<Bytes>) = (Bytes::ZERO, None);

    /// The extents of a map of changes: one of each kind, and two that must be listed as one range.
    pub const CHANGES: [(u64, u64, ExtentKind); 4] = [
        (0, 65_536, ExtentKind::Unchanged),
        (65_536, 131_072, ExtentKind::Data),
        (131_072, 196_608, ExtentKind::Hole),
        (196_608, 1_000_000, ExtentKind::Unchanged),
    ];

    pub fn identity() -> Identity {
        let text = |text: &str| IdentityValue::Text(text.to_owned());
        let fields =
            vec![("pool-uuid", text("a\"b")), ("newer", IdentityValue::Number(7)), ("name", IdentityValue::None)];
        Identity { kind: "thin", fields }
    }

    /// The extents as a map gives them, from the start, the end and the kind of each.
    pub fn items(extents: &[(u64, u64, ExtentKind)]) -> impl Iterator<Item = io::Result<(Bytes, Extent)>> {
        let item = |(start, end, kind): &_| Ok((Bytes::new(*start), Extent { end: Bytes::new(*end), kind: *kind }));
        extents.iter().map(item)
    }

    pub fn printed(format: MapFormat, is_since: bool, extents: &[(u64, u64, ExtentKind)]) -> String {
        let identity = identity();
        let len = Bytes::new(extents.last().map_or(0, |extent| extent.1));
        let subject = Subject { len, part: WHOLE, since: is_since.then_some(&identity) };
        let mut extents = items(extents);
        let mut out = Vec::new();
        map(&mut out, format, &subject, &mut extents).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_error_of_the_extents_ends_every_form() {
        let identity = identity();
        for format in
            [MapFormat::Plain, MapFormat::Json, MapFormat::Totals].into_iter().chain(MapFormat::NAMED.map(|it| it.1))
        {
            for since in [None, Some(&identity)] {
                let data = Extent { end: Bytes::new(4096), kind: ExtentKind::Data };
                let mut extents = [Ok((Bytes::ZERO, data)), Err(io::ErrorKind::TimedOut.into())].into_iter();
                let subject = Subject { len: Bytes::new(8192), part: WHOLE, since };
                let error = map(&mut Vec::new(), format, &subject, &mut extents).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{format:?}");
            }
        }
    }
}
