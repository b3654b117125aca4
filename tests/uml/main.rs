//! Tests on a real kernel with device-mapper: `tests/run` runs them inside user-mode-linux.
//!
//! Every test is ignored by a plain `cargo test`, because the kernel that it runs on may have no device-mapper.

#[path = "../common/mod.rs"]
mod common;

mod fixtures;
