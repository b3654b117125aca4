//! Table and status lines of `thin` and `thin-pool`.
//!
//! Invariant: no text makes a parser panic, and no status puts more bytes inside a device than it has.
#![no_main]

use blkholefs::source::thin::{DataBlockSize, params};
use blkholefs::units::{Bytes, Sectors};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u64, u32, &str)| {
    let (len, block, text) = input;
    let _ = (params::thin_table(text), params::pool_table(text), params::pool_status(text));
    if let (Some(mapped), Some(block)) = (params::thin_status(text), DataBlockSize::new(Sectors::new(block.into()))) {
        let len = Bytes::new(len);
        assert!(mapped.inside(len, block).is_none_or(|inside| inside <= len));
    }
});
