//! The use of the page cache and of descriptors by reads.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use common::check::open;
use common::mount::LoopMount;
use common::{MIB, needs, run};

/// The number of bytes of a device that are in its page cache.
fn cached(device: &Path) -> u64 {
    let words = ["--bytes", "--raw", "--noheadings", "--output", "RES", device.to_str().expect("text")];
    run("fincore", words).trim().parse().expect("a number")
}

/// The page cache of a device may be older than its lower device. A daemon without free descriptors must not read
/// from this cache.
#[test]
fn without_descriptors_an_open_fails_and_no_read_is_stale() {
    needs!(root, programs["prlimit"]);
    let source = LoopMount::new(MIB, &[]);
    let holder = open(source.device.path());
    holder.read_exact_at(&mut vec![0; 1 << 20], 0).expect("the device can be read");
    source.image.write(0..MIB);
    let (daemon, mut bytes) = (source.mount.pid().to_string(), vec![0; 4096]);
    let open_files = || fs::read_dir(format!("/proc/{daemon}/fd")).expect("the daemon runs").count();
    let (mut refused, mut opened) = (0, 0);
    for more in 0..16 {
        let limit = format!("--nofile={}:", open_files() + more);
        run("prlimit", ["--pid", &daemon, &limit]);
        match File::open(source.file()).and_then(|file| file.read_exact_at(&mut bytes, 64 << 10)) {
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EMFILE), "with {limit}");
                refused += 1;
            }
            Ok(()) => {
                assert!(bytes.iter().all(|&byte| byte != 0), "stale bytes with {limit}");
                opened += 1;
            }
        }
    }
    assert!(refused > 0 && opened > 0, "{refused} {opened}");
    drop(holder);
}

#[test]
fn the_daemon_raises_its_limit_of_descriptors_to_the_hard_limit() {
    needs!(root);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("every process has one");
    // Enough for the other tests of this process.
    setrlimit(Resource::RLIMIT_NOFILE, soft.min(hard - 1).min(1000), hard).expect("the limit can be lowered");
    let source = LoopMount::new(MIB, &[]);
    let limits = fs::read_to_string(format!("/proc/{}/limits", source.mount.pid())).expect("the daemon runs");
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).expect("proc(5) has it");
    let words: Vec<_> = line.split_whitespace().collect();
    assert_eq!(words[0], words[1], "{line}");
}

#[test]
fn a_read_does_not_fill_the_page_cache_of_the_device() {
    needs!(root, programs["fincore"]);
    let source = LoopMount::new(32 * MIB, &[0..32 * MIB]);
    run("blockdev", ["--flushbufs".as_ref(), source.device.path().as_os_str()]);
    fs::read(source.file()).expect("the file can be read");
    let cached = cached(source.device.path());
    assert!(cached < MIB, "{cached} bytes");
}
