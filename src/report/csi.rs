//! Block metadata of the Container Storage Interface, which Kubernetes uses for backups of changed blocks.
//!
//! The messages are `GetMetadataAllocatedResponse` and `GetMetadataDeltaResponse` of the SnapshotMetadata service (`csi.proto`
//! since version 1.10), which have the same fields. This is one such message in the JSON mapping of Protocol Buffers: names in
//! camel case, and numbers of 64 bits as strings.

use std::io::{self, Write};

use super::ranges::listed;
use super::{Extents, Subject};
use crate::units::Bytes;

/// Prints the ranges of data; for a map of changes, all but unchanged ranges: the tuples have no way to say "zeros".
pub fn map(out: &mut dyn Write, subject: &Subject<'_>, extents: Extents<'_>) -> io::Result<()> {
    writeln!(out, "{{ \"blockMetadataType\": \"VARIABLE_LENGTH\", \"volumeCapacityBytes\": \"{}\",", subject.len)?;
    write!(out, "\"blockMetadata\": [")?;
    let mut before = "\n";
    listed(subject, Bytes::new(1), extents, |range| {
        let size = range.end.saturating_sub(range.start);
        write!(out, "{before}{{ \"byteOffset\": \"{}\", \"sizeBytes\": \"{size}\"}}", range.start)?;
        before = ",\n";
        Ok(())
    })?;
    writeln!(out, "]}}")
}

#[cfg(test)]
mod tests {
    use super::super::MapFormat;
    use super::super::tests::{CHANGES, EXTENTS, printed};

    #[test]
    fn tuples_are_json_of_protocol_buffers() {
        let message = |is_since, extents| -> serde_json::Value {
            serde_json::from_str(&printed(MapFormat::Csi, is_since, extents)).unwrap()
        };
        let expected = |capacity: &str, tuples: &[(&str, &str)]| {
            let tuples: Vec<_> =
                tuples.iter().map(|(at, size)| serde_json::json!({"byteOffset": at, "sizeBytes": size})).collect();
            serde_json::json!({
                "blockMetadataType": "VARIABLE_LENGTH", "volumeCapacityBytes": capacity, "blockMetadata": tuples
            })
        };
        assert_eq!(message(false, &EXTENTS), expected("10485760", &[("1048576", "65536")]));
        assert_eq!(message(true, &CHANGES), expected("1000000", &[("65536", "131072")]));
        assert_eq!(message(true, &[]), expected("0", &[]));
    }
}
