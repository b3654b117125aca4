//! Cases that need a kernel with device-mapper.

use std::fs;
use std::process::{Command, Stdio};

use crate::Bench;
use crate::measure::Table;

/// Memory of the other kernel, whose temporary files are in memory too.
const MEMORY: &str = "3G";

/// Runs a case in user-mode-linux, which has one processor, and adds its rows.
pub fn in_user_mode_linux(bench: &Bench, case: &str, table: &mut Table) {
    if !bench.has(table, "linux.uml", case) {
        return;
    }
    // The other kernel sees the files of this machine, except for those in the directories for temporary ones.
    let program = std::env::current_exe().expect("this program has a path");
    let directory =
        tempfile::tempdir_in(program.parent().expect("it is in a directory")).expect("a temporary directory");
    let job = directory.path().join("job");
    let quick = if bench.quick { "--quick" } else { "" };
    fs::write(&job, format!("exec {} {case} {quick}\n", program.display())).expect("it is ours");
    let mut boot = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/uml/boot"));
    boot.arg(directory.path()).arg(&job).arg(MEMORY).stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = boot.output().expect("the script starts");
    let console = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{console}");
    console.lines().for_each(|line| table.add_printed(line));
}
