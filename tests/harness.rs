//! Tests of parts of the harness that only some machines need.

use std::path::Path;
use std::process::Command;

/// Compiles a program or library of `tests/uml`.
#[cfg(target_arch = "x86_64")]
fn compile(source: &str, options: &[&str], output: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/uml").join(source);
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-Wall", "-Werror"]).args(options).arg("-o").arg(output).arg(source);
    assert!(cc.status().expect("cc exists because Rust links with it").success(), "{cc:?}");
}

/// On every processor whose extended state has more than its first part: a short write fails without the library, as
/// that of user-mode-linux does on a processor with AMX, and is made whole with it. Other writes are as without it.
#[test]
#[cfg(target_arch = "x86_64")]
fn short_writes_of_the_extended_processor_state_are_completed() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (library, program) = (directory.path().join("xstate.so"), directory.path().join("xstate_check"));
    compile("xstate.c", &["-shared", "-fPIC"], &library);
    compile("xstate_check.c", &[], &program);
    let lines = |preloaded: Option<&Path>| {
        let mut check = Command::new(&program);
        let output = check.envs(preloaded.map(|path| ("LD_PRELOAD", path))).output().expect("the program starts");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("text").lines().map(ToOwned::to_owned).collect::<Vec<_>>()
    };
    let (without, with) = (lines(None), lines(Some(&library)));
    if without[0].starts_with("small") {
        return eprintln!("skipped: this processor has no extended state beyond the first part: {}", without[0]);
    }
    let others = ["all: written, same", "bad header: Invalid argument", "no process: No such process"];
    let [short_without, short_with] = [&without, &with].map(|lines| {
        assert_eq!([&lines[0], &lines[2], &lines[3]], others);
        lines[1].as_str()
    });
    assert_eq!(short_without, "first part: Bad address, first differs, rest kept");
    assert_eq!(short_with, "first part: written, first as written, rest kept");
}
