//! See `tests/support/fuzz/partitions.rs`.
#![no_main]

#[path = "../../support/fuzz/partitions.rs"]
mod partitions;

libfuzzer_sys::fuzz_target!(|input: &[u8]| partitions::run(input));
