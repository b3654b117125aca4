//! See `tests/support/fuzz/nbd_client.rs`.
#![no_main]

#[path = "../../support/fuzz/nbd_client.rs"]
mod nbd_client;

libfuzzer_sys::fuzz_target!(|input: &[u8]| nbd_client::run(input));
