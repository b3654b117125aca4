//! What is left of a read in the memory of the machine.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

use std::fs;
use std::path::Path;

use common::mount::LoopMount;
use common::{MIB, requires, requires_root, run};

/// Bytes of a device that are in its page cache.
fn cached(device: &Path) -> u64 {
    let words = ["--bytes", "--raw", "--noheadings", "--output", "RES", device.to_str().expect("text")];
    run("fincore", words).trim().parse().expect("a number")
}

#[test]
fn a_read_does_not_fill_the_cache_of_the_device() {
    if !requires_root() || !requires(&["fincore"]) {
        return;
    }
    let source = LoopMount::new(32 * MIB, &[0..32 * MIB]);
    run("blockdev", ["--flushbufs".as_ref(), source.device.path().as_os_str()]);
    fs::read(source.file()).expect("the file can be read");
    let cached = cached(source.device.path());
    assert!(cached < MIB, "{cached} bytes");
}
