//! See `tests/support/fuzz/thin_changes.rs`.
#![no_main]

#[path = "../../support/fuzz/thin_changes.rs"]
mod thin_changes;

libfuzzer_sys::fuzz_target!(|input: &[u8]| thin_changes::run(input));
