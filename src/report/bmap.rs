//! A block map of bmaptool, version 2.0.
//!
//! The elements are those that `bmaptools/BmapCopy.py` of bmap-tools reads, which accepts them in any order. The sums and the
//! checksum of the file are written last, so that the ranges are asked and written once. Ranges have no checksums of their own
//! (`chksum` is optional): those would take reading all data.

use std::io::{self, Write};

use rustls::crypto::hash;
use rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;

use super::ranges::listed;
use super::{Extents, Subject};
use crate::error::Error;
use crate::units::Bytes;

/// The size of a block, which bmaptool uses for images on most file systems.
const BLOCK: Bytes = Bytes::new(4096);

/// Prints the blocks that have data; for a map of changes, all but unchanged blocks.
///
/// # Errors
/// As write(2); and for a device without bytes, of which bmaptool makes and reads no block map.
pub fn map(out: &mut dyn Write, subject: &Subject<'_>, extents: Extents<'_>) -> io::Result<()> {
    if subject.len == Bytes::ZERO {
        return Err(io::Error::other(Error::failed("bmaptool has no block map for a device without bytes")));
    }
    let mut out = Hashed { out, hash: sha256()? };
    writeln!(out, "<?xml version=\"1.0\" ?>\n<bmap version=\"2.0\">")?;
    writeln!(out, "    <ImageSize> {} </ImageSize>", subject.len)?;
    writeln!(out, "    <BlockSize> {BLOCK} </BlockSize>")?;
    writeln!(out, "    <BlocksCount> {} </BlocksCount>", subject.len.get().div_ceil(BLOCK.get()))?;
    writeln!(out, "    <BlockMap>")?;
    let mut mapped: u64 = 0;
    listed(subject, BLOCK, extents, |range| {
        let (first, after) = (range.start.get() / BLOCK.get(), range.end.get().div_ceil(BLOCK.get()));
        mapped += after - first;
        match after - 1 {
            last if last == first => writeln!(out, "        <Range> {first} </Range>"),
            last => writeln!(out, "        <Range> {first}-{last} </Range>"),
        }
    })?;
    writeln!(out, "    </BlockMap>")?;
    writeln!(out, "    <MappedBlocksCount> {mapped} </MappedBlocksCount>")?;
    writeln!(out, "    <ChecksumType> sha256 </ChecksumType>")?;
    write!(out, "    <BmapFileChecksum> ")?;
    // The checksum is that of the file with digits 0 in the place of the checksum.
    let after = " </BmapFileChecksum>\n</bmap>\n";
    let Hashed { out, mut hash } = out;
    hash.update(&[b'0'; 64]);
    hash.update(after.as_bytes());
    for byte in hash.finish().as_ref() {
        write!(out, "{byte:02x}")?;
    }
    write!(out, "{after}")
}

/// A new SHA-256, of the library for TLS.
fn sha256() -> io::Result<Box<dyn hash::Context>> {
    let suite =
        TLS13_AES_128_GCM_SHA256.tls13().ok_or_else(|| io::Error::other("the library for TLS has no SHA-256"))?;
    Ok(suite.common.hash_provider.start())
}

/// Writes bytes, and hashes them.
struct Hashed<'a> {
    out: &'a mut dyn Write,
    hash: Box<dyn hash::Context>,
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::MapFormat;
    use super::super::tests::{CHANGES, EXTENTS, printed};
    use super::*;
    use crate::map::ExtentKind;

    fn values(text: &str, element: &str) -> Vec<String> {
        let open = format!("<{element}> ");
        text.lines()
            .filter_map(|line| line.trim().strip_prefix(&open)?.split_once(' ').map(|it| it.0.to_owned()))
            .collect()
    }

    #[test]
    fn blocks_are_those_that_hold_data() {
        let text = printed(MapFormat::Bmap, false, &EXTENTS);
        assert_eq!(values(&text, "Range"), ["256-271"]);
        assert_eq!(values(&text, "MappedBlocksCount"), ["16"]);
        assert_eq!(values(&text, "BlocksCount"), ["2560"]);
        let text = printed(MapFormat::Bmap, true, &CHANGES);
        assert_eq!(values(&text, "Range"), ["16-47"]);
        assert_eq!(values(&text, "BlocksCount"), ["245"], "the last block is not whole");
        let text = printed(MapFormat::Bmap, false, &[(0, 4095, ExtentKind::Hole), (4095, 4097, ExtentKind::Data)]);
        assert_eq!(
            (values(&text, "Range"), values(&text, "ImageSize")),
            (vec!["0-1".to_owned()], vec!["4097".to_owned()])
        );
    }

    #[test]
    fn the_checksum_is_that_of_the_file_with_zeros() {
        let text = printed(MapFormat::Bmap, false, &EXTENTS);
        let checksum = values(&text, "BmapFileChecksum").remove(0);
        assert_eq!(checksum.len(), 64);
        let mut hash = sha256().unwrap();
        hash.update(text.replace(&checksum, &"0".repeat(64)).as_bytes());
        let expected: String = hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(checksum, expected);
    }
}
