//! Table and status lines of `thin` and `thin-pool`, and the records of metadata snapshots.
//!
//! Invariant: no text makes a parser panic, and no status line leads to more mapped bytes than the device has. A record gives
//! a step only for the pool that it names, and text after its last complete line changes nothing.
//!
//! An input is the length of a device (eight bytes), a block size in sectors (four bytes), and a text.

use blkholefs::testing::source::thin::{DataBlockSize, params, record};
use blkholefs::testing::units::{Bytes, Sectors};

pub fn run(input: &[u8]) {
    let Some((len, rest)) = input.split_first_chunk() else { return };
    let Some((block, text)) = rest.split_first_chunk() else { return };
    let (len, block) = (u64::from_le_bytes(*len), u32::from_le_bytes(*block));
    let text = String::from_utf8_lossy(text);
    let _ = (params::thin_table(&text), params::pool_table(&text), params::pool_status(&text));
    if let (Some(mapped), Some(block)) = (params::thin_status(&text), DataBlockSize::new(Sectors::new(block.into()))) {
        let len = Bytes::new(len);
        assert!(mapped.inside(len, block).is_none_or(|inside| inside <= len));
    }
    record(&text);
}

fn record(text: &str) {
    let (uuid, _) = text.split_once('\n').unwrap_or((text, ""));
    let step = record::parse(text, uuid);
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    assert_eq!(step, record::parse(whole, uuid), "an unfinished line is not read");
    assert_eq!(record::parse(text, &format!("{uuid}x")), None, "the record of another pool");
}
