//! Device-mapper's replies and the arguments of targets.
//!
//! Invariant: no input makes a parser panic, loop or allocate more than the input's size allows: a table has no more
//! targets than target headers fit into the reply, and a striped target no more legs than words.
#![no_main]

use blkholefs::source::dm::params;
use blkholefs::sys::dm::Table;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if let Some(table) = Table::parse(input) {
        assert!(table.targets.len() <= input.len() / 40 + 1);
    }
    let text = String::from_utf8_lossy(input);
    let _ = params::linear(&text);
    if let Some(striped) = params::striped(&text) {
        assert!(!striped.legs.is_empty() && striped.legs.len() <= text.len() / 2);
        assert!(striped.chunk.get() > 0);
    }
});
