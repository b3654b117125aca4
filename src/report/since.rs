//! The changes since a snapshot as JSON, with the identity of what was compared.

use std::io::{self, Write};

use super::plain::change_status;
use super::{Extents, quoted};
use crate::source::changes::{Identity, IdentityValue};

/// Prints `{"identity":{"kind",...},"extents":[{"start","length","state"}]}`, one extent on each line.
pub fn map(out: &mut dyn Write, identity: &Identity, extents: Extents<'_>) -> io::Result<()> {
    write!(out, "{{ \"identity\": {{ \"kind\": {}", quoted(identity.kind))?;
    for (name, value) in &identity.fields {
        let value = match value {
            IdentityValue::Text(text) => quoted(text),
            IdentityValue::Number(number) => number.to_string(),
            IdentityValue::None => "null".to_owned(),
        };
        write!(out, ", {}: {value}", quoted(name))?;
    }
    write!(out, "}},\n\"extents\": [")?;
    let mut before = "\n";
    for extent in extents {
        let (start, extent) = extent?;
        let (length, (_, state)) = (extent.end.saturating_sub(start), change_status(extent.kind));
        write!(out, "{before}{{ \"start\": {start}, \"length\": {length}, \"state\": {}}}", quoted(state))?;
        before = ",\n";
    }
    writeln!(out, "]}}")
}

#[cfg(test)]
mod tests {
    use super::super::MapFormat;
    use super::super::tests::{CHANGES, printed};

    #[test]
    fn changes_have_an_identity_and_states() {
        let text = printed(MapFormat::Json, true, &CHANGES);
        let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
        let identity = serde_json::json!({ "kind": "thin", "pool-uuid": "a\"b", "newer": 7, "name": null });
        assert_eq!(parsed["identity"], identity);
        let extent =
            |start: u64, length: u64, state| serde_json::json!({"start": start, "length": length, "state": state});
        let expected = [
            extent(0, 65_536, "unchanged"),
            extent(65_536, 65_536, "data"),
            extent(131_072, 65_536, "zero"),
            extent(196_608, 803_392, "unchanged"),
        ];
        assert_eq!(parsed["extents"].as_array().unwrap(), &expected);
        assert_eq!(text.lines().count(), 2 + expected.len());
        let none: serde_json::Value = serde_json::from_str(&printed(MapFormat::Json, true, &[])).unwrap();
        assert_eq!(none["extents"], serde_json::json!([]));
    }
}
