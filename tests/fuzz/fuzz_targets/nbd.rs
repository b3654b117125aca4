//! See `tests/support/fuzz/nbd.rs`.
#![no_main]

#[path = "../../support/fuzz/nbd.rs"]
mod nbd;

libfuzzer_sys::fuzz_target!(|input: &[u8]| nbd::run(input));
