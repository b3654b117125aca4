//! See `tests/support/fuzz/thin_params.rs`.
#![no_main]

#[path = "../../support/fuzz/thin_params.rs"]
mod thin_params;

libfuzzer_sys::fuzz_target!(|input: &[u8]| thin_params::run(input));
