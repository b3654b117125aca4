//! See `tests/support/fuzz/xfs.rs`.
#![no_main]

#[path = "../../support/fuzz/xfs.rs"]
mod xfs;

libfuzzer_sys::fuzz_target!(|input: &[u8]| xfs::run(input));
