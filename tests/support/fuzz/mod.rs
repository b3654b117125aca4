//! What the fuzz targets do with an input: a module for each target. Its header states the invariant that is checked.
//!
//! `tests/fuzz` runs them under libFuzzer. `tests/fuzz_corpus.rs` runs them with the inputs that libFuzzer found, and with
//! random changes of these (`mutate.rs`).

pub mod btrfs;
pub mod dm_tables;
pub mod ext;
pub mod kernel_texts;
pub mod mount_words;
pub mod nbd;
pub mod nbd_client;
pub mod partitions;
pub mod qcow2;
pub mod scsi_pages;
pub mod status;
pub mod thin_changes;
pub mod thin_metadata;
pub mod thin_params;
pub mod xfs;
