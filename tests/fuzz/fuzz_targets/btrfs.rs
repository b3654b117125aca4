//! See `tests/support/fuzz/btrfs.rs`.
#![no_main]

#[path = "../../support/fuzz/btrfs.rs"]
mod btrfs;

libfuzzer_sys::fuzz_target!(|input: &[u8]| btrfs::run(input));
