//! See `tests/support/fuzz/scsi_pages.rs`.
#![no_main]

#[path = "../../support/fuzz/scsi_pages.rs"]
mod scsi_pages;

libfuzzer_sys::fuzz_target!(|input: &[u8]| scsi_pages::run(input));
