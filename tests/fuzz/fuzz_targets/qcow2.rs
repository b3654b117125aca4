//! See `tests/support/fuzz/qcow2.rs`.
#![no_main]

#[path = "../../support/fuzz/qcow2.rs"]
mod qcow2;

libfuzzer_sys::fuzz_target!(|input: &[u8]| qcow2::run(input));
