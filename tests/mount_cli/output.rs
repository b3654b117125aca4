//! What is printed and where it goes: output that is lost is an error, and an argument that means nothing is refused.

use std::fs;
use std::process::Command;

use crate::bench::{Bench, Ran};
use crate::common::needs;

impl Bench {
    /// Runs the program under a name with redirections of a shell.
    fn redirected(&self, name: &str, words: &[&str], redirections: &str) -> Ran {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec \"$@\" {redirections}"), "sh"]).arg(self.bin(name)).args(words);
        Ran::of(command.current_dir(self.path("")))
    }
}

/// The commands that print something, each with its program.
fn printing(device: &str) -> Vec<(&'static str, Vec<&str>)> {
    let own = [
        &["-h"][..],
        &["--help"],
        &["help"],
        &["-V"],
        &["map", "-h"],
        &["mount", "-h"],
        &["umount", "-V"],
        &["map", device],
        &["map", "--json", device],
        &["map", "--totals", device],
        &["map", "--format", "bmap", device],
        &["info", device],
        &["info", "--json", device],
        &["verify", device],
        &["verify", "--sample", "1", device],
        &["demo"],
    ];
    let own = own.into_iter().map(|words| ("blkholefs", words.to_vec()));
    own.chain([("mount.blkholefs", vec!["-h"]), ("umount.blkholefs", vec!["--version"])]).collect()
}

#[test]
fn output_that_is_lost_is_an_error() {
    needs!(root);
    let bench = Bench::new();
    for (name, words) in printing(bench.device.path().to_str().unwrap()) {
        for (redirections, why) in [
            (">/dev/full", "No space left on device"),
            (">&-", "Bad file descriptor"),
            ("1</dev/null", "Bad file descriptor"),
        ] {
            let ran = bench.redirected(name, &words, redirections);
            ran.fails(32, &format!("{name}: cannot write the output: {why}"));
            assert_eq!(ran.err.lines().count(), 1, "{words:?} {redirections}: {ran:?}");
        }
    }
}

/// /dev/null is a place to write to, however it was opened: service managers open it for reading and writing.
#[test]
fn output_that_nobody_wants_is_no_error() {
    needs!(root);
    let bench = Bench::new();
    for (name, words) in printing(bench.device.path().to_str().unwrap()) {
        let all = ["1<>/dev/null", ">/dev/null", "<&- 2>&- >/dev/null", "2>/dev/full >/dev/null"];
        // The demo copies a GiB.
        let count = if words == ["demo"] { 1 } else { all.len() };
        for redirections in &all[..count] {
            let ran = bench.redirected(name, &words, redirections);
            assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{words:?} {redirections}");
        }
    }
}

/// Where the error itself cannot be printed, the exit code is left.
#[test]
fn an_error_that_cannot_be_printed_has_its_exit_code() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    for (name, words, code) in [
        ("blkholefs", &["frob"][..], 1),
        ("blkholefs", &["map"], 1),
        ("blkholefs", &["map", "/nonexistent"], 32),
        ("blkholefs", &["umount", "mnt"], 32),
        ("mount.blkholefs", &[device, "mnt", "-o", "frob"], 1),
        ("mount.blkholefs", &[device, "nonexistent"], 32),
        ("mount.blkholefs", &[device, "mnt", "-fv"], 0),
        ("umount.blkholefs", &["-v"], 1),
    ] {
        for redirections in ["2>/dev/full", "2>&-", "<&- >&- 2>&-"] {
            let ran = bench.redirected(name, words, redirections);
            assert_eq!((ran.code, ran.err.as_str()), (code, ""), "{words:?} {redirections}");
        }
    }
}

/// A mount prints nothing, so it works with all descriptors closed. The daemon has /dev/null there, and never a device.
#[test]
fn a_mount_needs_no_descriptors() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    for (name, words) in [("mount.blkholefs", &[device, "mnt"][..]), ("blkholefs", &["mount", "-v", device, "mnt"])] {
        assert_eq!(bench.redirected(name, words, "<&- >&- 2>&-").code, 0);
        let daemon = bench.daemon().unwrap();
        for fd in 0..3 {
            let target = fs::read_link(format!("/proc/{daemon}/fd/{fd}")).unwrap();
            assert_eq!(target.to_str(), Some("/dev/null"), "{fd}");
        }
        assert_eq!(bench.redirected("umount.blkholefs", &["-v", "mnt"], "<&- >&- 2>&-").code, 0);
    }
}

#[test]
fn an_argument_that_means_nothing_is_refused() {
    needs!(root);
    let bench = Bench::new();
    for (words, text) in [
        (&["demo", "x"][..], "demo: unexpected argument 'x'"),
        (&["demo", "--json"], "demo: unexpected argument '--json'"),
        (&["--version", "x"], "--version: unexpected argument 'x'"),
        (&["-h", "map"], "-h: unexpected argument 'map'"),
        (&["help", "x"], "help: unexpected argument 'x'"),
        (&["umount", "a", "b"], "expected one directory to unmount"),
        (&["mount", "a", "b", "c"], "expected a device and a directory"),
        (&["frob"], "there is no command 'frob'"),
        (&["frob", "mnt"], "there is no command 'frob'"),
        (&["a\nb"], "there is no command 'a\\nb'"),
        (&[""], "there is no command ''"),
        (&[], "a command is missing"),
    ] {
        bench.run("blkholefs", words).fails(1, text);
    }
    let version = format!("blkholefs {}\n", env!("CARGO_PKG_VERSION"));
    for command in ["map", "info", "verify", "demo", "mount", "umount"] {
        assert_eq!(bench.run("blkholefs", [command, "--version"]).out, version);
        assert!(bench.run("blkholefs", [command, "--help"]).out.contains("Usage:"));
    }
}

/// Of the spellings of a word one is suggested, and a word that takes no value is not suggested for itself.
#[test]
fn one_spelling_is_suggested() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    let refused = |option: &str| bench.run("mount.blkholefs", [device, "mnt", "-o", option]).err;
    for option in ["alow_other", "allow-othr"] {
        let expected = format!("mount.blkholefs: unknown option '{option}'\ndid you mean allow_other?\n");
        assert_eq!(refused(option), expected);
    }
    assert_eq!(refused("allow_other=1"), "mount.blkholefs: option 'allow_other' takes no value\n");
    assert_eq!(refused("fsname"), "mount.blkholefs: option 'fsname' needs a value: fsname=...\n");
}
