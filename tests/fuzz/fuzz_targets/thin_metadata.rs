//! See `tests/support/fuzz/thin_metadata.rs`.
#![no_main]

#[path = "../../support/fuzz/thin_metadata.rs"]
mod thin_metadata;

libfuzzer_sys::fuzz_target!(|input: &[u8]| thin_metadata::run(input));
