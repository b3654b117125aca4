//! The output of `qemu-img map --output=json`.

use std::io::{self, Write};

use super::Extents;

/// Prints the extents as `qemu-img map --output=json` does for the same bytes.
pub fn map(out: &mut dyn Write, extents: Extents<'_>) -> io::Result<()> {
    let mut before = "[";
    for extent in extents {
        let (start, extent) = extent?;
        let (length, data) = (extent.end.saturating_sub(start), extent.kind.is_data());
        write!(
            out,
            "{before}{{ \"start\": {start}, \"length\": {length}, \"depth\": 0, \"present\": true, \"zero\": {zero}, \
             \"data\": {data}, \"compressed\": false, \"offset\": {start}}}",
            zero = !data,
        )?;
        before = ",\n";
    }
    writeln!(out, "{}]", if before == "[" { "[" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::super::MapFormat;
    use super::super::tests::{CHANGES, EXTENTS, printed};

    #[test]
    fn json_looks_like_qemu_img() {
        let text = printed(MapFormat::Json, false, &EXTENTS);
        assert!(text.starts_with(
            "[{ \"start\": 0, \"length\": 1048576, \"depth\": 0, \"present\": true, \"zero\": true, \"data\": false, \
             \"compressed\": false, \"offset\": 0},\n{ \"start\": 1048576,"
        ));
        let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(parsed[1]["data"], true);
        assert_eq!(parsed[2]["offset"], 1_114_112);
        assert_eq!(printed(MapFormat::Json, false, &[]), "[]\n");
        assert_eq!(printed(MapFormat::Json, false, &CHANGES).matches("\"data\": false").count(), 3);
    }
}
