//! See `tests/support/fuzz/ext.rs`.
#![no_main]

#[path = "../../support/fuzz/ext.rs"]
mod ext;

libfuzzer_sys::fuzz_target!(|input: &[u8]| ext::run(input));
