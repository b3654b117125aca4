//! What the fuzz targets do with an input: a module for each target, with the rule that every input keeps.
//!
//! `tests/fuzz` runs them under libFuzzer, `tests/fuzz_corpus.rs` with the inputs that it found.

pub mod dm_tables;
pub mod kernel_texts;
pub mod mount_words;
pub mod nbd;
pub mod nbd_client;
pub mod scsi_pages;
pub mod thin_metadata;
pub mod thin_params;
