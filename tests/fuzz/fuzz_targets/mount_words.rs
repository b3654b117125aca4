//! The words of mount(8): arguments, `-o` lists, and the kernel's list of mounts.
//!
//! Invariant: no input makes a parser panic, and a list has no more mounts than lines.
#![no_main]

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use blkholefs::mount::options::{self, Unknown};
use blkholefs::mount::{argv, mountinfo};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let list = OsStr::from_bytes(input);
    for unknown in [Unknown::Refused, Unknown::Tolerated] {
        let _ = options::parse(list, unknown);
    }
    let words: Vec<OsString> = input.split(|byte| *byte == 0).map(|word| OsStr::from_bytes(word).to_owned()).collect();
    let _ = (argv::mount_helper(&words), argv::mount_command(&words), argv::umount(&words));
    let mounts = mountinfo::parse(input);
    assert!(mounts.len() <= input.split(|byte| *byte == b'\n').count());
    let _ = mountinfo::top(&mounts, Path::new("/mnt"));
});
