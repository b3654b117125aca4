//! See `tests/support/fuzz/dm_tables.rs`.
#![no_main]

#[path = "../../support/fuzz/dm_tables.rs"]
mod dm_tables;

libfuzzer_sys::fuzz_target!(|input: &[u8]| dm_tables::run(input));
