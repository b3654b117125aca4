//! See `tests/support/fuzz/mount_words.rs`.
#![no_main]

#[path = "../../support/fuzz/mount_words.rs"]
mod mount_words;

libfuzzer_sys::fuzz_target!(|input: &[u8]| mount_words::run(input));
