//! The output of `qemu-img map --output=json`: byte for byte that of QEMU 8.2 and newer (`dump_map_entry` in qemu-img.c). Older
//! versions have no `compressed`.

use std::io::{self, Write};

use super::{Extents, Subject};
use crate::map::Extent;
use crate::map::ExtentKind;
use crate::units::Bytes;

/// The unit of the lengths of QEMU's block layer. The length of a file is rounded up to it, and what is added is zeros.
const SECTOR: Bytes = Bytes::new(512);

/// Prints the extents as `qemu-img map --output=json` does for the same bytes.
///
/// # Errors
/// As write(2), and what `extents` returns.
pub fn map(out: &mut dyn Write, subject: &Subject<'_>, extents: Extents<'_>) -> io::Result<()> {
    let mut waiting: Option<(Bytes, Bytes, bool)> = None;
    write!(out, "[")?;
    for extent in extents.chain(padding(subject).map(Ok)) {
        let (start, extent) = extent?;
        let data = extent.kind.is_data();
        waiting = match waiting {
            // Extents of one kind are one entry, as in QEMU (`entry_mergeable`).
            Some((first, end, kind)) if kind == data && end == start => Some((first, extent.end, data)),
            Some(before) => {
                entry(out, before)?;
                writeln!(out, ",")?;
                Some((start, extent.end, data))
            }
            None => Some((start, extent.end, data)),
        };
    }
    match waiting {
        Some(last) => entry(out, last)?,
        None => write!(
            out,
            "{{ \"start\": {start}, \"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \"data\": false, \
             \"compressed\": false}}",
            start = subject.part.0,
        )?,
    }
    writeln!(out, "]")
}

/// The zeros between the end of a file and the end of its last sector, as far as they were asked for.
fn padding(subject: &Subject<'_>) -> Option<(Bytes, Extent)> {
    let (offset, length) = subject.part;
    let end = subject.len.align_up(SECTOR)?;
    let end = length.and_then(|length| offset.checked_add(length)).map_or(end, |asked| asked.min(end));
    let start = subject.len.max(offset);
    (start < end).then_some((start, Extent { end, kind: ExtentKind::Hole }))
}

/// Prints the entry of the bytes from `start` to `end`.
fn entry(out: &mut dyn Write, (start, end, data): (Bytes, Bytes, bool)) -> io::Result<()> {
    write!(
        out,
        "{{ \"start\": {start}, \"length\": {length}, \"depth\": 0, \"present\": true, \"zero\": {zero}, \"data\": {data}, \
         \"compressed\": false, \"offset\": {start}}}",
        length = end.saturating_sub(start),
        zero = !data,
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::{EXTENTS, WHOLE, printed};
    use super::super::{MapFormat, map as report};
    use super::*;

    /// The map of extents that are data or not, of a device that ends with the last one.
    fn of(part: (u64, Option<u64>), extents: &[(u64, u64, bool)]) -> String {
        let len = Bytes::new(extents.last().map_or(0, |extent| extent.1));
        let part = (Bytes::new(part.0), part.1.map(Bytes::new));
        let kind = |data| if data { ExtentKind::Data } else { ExtentKind::Hole };
        let mut extents = extents
            .iter()
            .map(|(start, end, data)| Ok((Bytes::new(*start), Extent { end: Bytes::new(*end), kind: kind(*data) })));
        let mut out = Vec::new();
        report(&mut out, MapFormat::Json, &Subject { len, part, since: None }, &mut extents).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn line(start: u64, length: u64, data: bool) -> String {
        let (zero, rest) = (!data, "\"compressed\": false, \"offset\"");
        format!(
            "{{ \"start\": {start}, \"length\": {length}, \"depth\": 0, \"present\": true, \"zero\": {zero}, \"data\": \
             {data}, {rest}: {start}}}"
        )
    }

    #[test]
    fn json_is_that_of_qemu_img() {
        let text = printed(MapFormat::Json, false, &EXTENTS);
        let expected =
            [line(0, 1_048_576, false), line(1_048_576, 65_536, true), line(1_114_112, 9_371_648, false)].join(",\n");
        assert_eq!(text, format!("[{expected}]\n"));
        assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok());
        assert_eq!(WHOLE, (Bytes::ZERO, None));
    }

    #[test]
    fn extents_of_one_kind_are_one_entry() {
        let extents = [(0, 512, true), (512, 1024, true), (1024, 2048, false), (2048, 4096, false)];
        assert_eq!(of((0, None), &extents), format!("[{},\n{}]\n", line(0, 1024, true), line(1024, 3072, false)));
    }

    #[test]
    fn nothing_is_an_entry_that_is_not_present() {
        let empty = |start: u64| {
            format!(
                "[{{ \"start\": {start}, \"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \"data\": \
                 false, \"compressed\": false}}]\n"
            )
        };
        assert_eq!(of((0, None), &[]), empty(0));
        assert_eq!(of((8192, None), &[]), empty(8192));
    }

    #[test]
    fn a_file_ends_with_a_whole_sector() {
        let file = [(0, 4096, true), (4096, 9000, false)];
        assert_eq!(of((0, None), &file), format!("[{},\n{}]\n", line(0, 4096, true), line(4096, 5120, false)));
        let file = [(0, 1000, true)];
        for (part, padding) in [
            ((0, None), Some(24)),
            ((0, Some(1024)), Some(24)),
            ((0, Some(2048)), Some(24)),
            ((0, Some(1001)), Some(1)),
            ((0, Some(1000)), None),
        ] {
            let padding = padding.map(|padding| format!(",\n{}", line(1000, padding, false))).unwrap_or_default();
            assert_eq!(of(part, &file), format!("[{}{padding}]\n", line(0, 1000, true)), "{part:?}");
        }
    }
}
