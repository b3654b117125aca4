//! See `tests/support/fuzz/kernel_texts.rs`.
#![no_main]

#[path = "../../support/fuzz/kernel_texts.rs"]
mod kernel_texts;

libfuzzer_sys::fuzz_target!(|input: &[u8]| kernel_texts::run(input));
