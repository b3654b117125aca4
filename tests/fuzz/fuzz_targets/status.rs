//! See `tests/support/fuzz/status.rs`.
#![no_main]

#[path = "../../support/fuzz/status.rs"]
mod status;

libfuzzer_sys::fuzz_target!(|input: &[u8]| status::run(input));
