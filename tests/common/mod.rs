//! Fixtures shared by the tests: images, devices and mounts that clean up after themselves, and the checks that every
//! device has to pass.
//!
//! A fixture panics when it cannot be made or cannot be taken away again: a device that is still held after its mount is
//! gone is a failure of the program under test.

#![allow(dead_code, reason = "each test crate uses its own part of the fixtures")]

pub mod check;
pub mod differential;
pub mod dm;
pub mod freshness;
pub mod fuse_image;
pub mod history;
pub mod image;
pub mod ioctl;
pub mod log_writes;
pub mod loop_device;
pub mod mount;
pub mod nbd;
pub mod random;
pub mod readme;
pub mod scsi;
pub mod tail;
pub mod written;

use std::ffi::OsStr;
use std::fmt;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// One KiB.
pub const KIB: u64 = 1024;
/// One MiB.
pub const MIB: u64 = 1024 * KIB;
/// One GiB.
pub const GIB: u64 = 1024 * MIB;

/// Runs a program to its end and returns what it printed. Panics if it fails.
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> String {
    run_with_input(program, arguments, "")
}

/// [`run`], with text on the program's standard input.
pub fn run_with_input<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>, input: &str) -> String {
    try_run(program, arguments, input).unwrap_or_else(|error| panic!("{error}"))
}

/// [`run_with_input`] for programs that may fail: the error has the command and its standard error.
pub fn try_run<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
    input: &str,
) -> Result<String, String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    // A program that fails early closes its input; its exit status and standard error are the better report.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8(output.stdout).map_err(|error| format!("{command:?}: {error}"))
}

/// The first line of a test: what the test needs. If something is missing, the test fails where `CI` is set, and otherwise
/// ends with a printed line that names it.
///
/// - `root`: root's rights, loop devices and FUSE
/// - `programs["cp", "tar"]`: programs in the search path
/// - `modules["dm-clone"]`: modules of the kernel, which are loaded
#[allow(unused_macros, reason = "the benchmarks use the fixtures too, and have no needs")]
macro_rules! needs {
    (@ root) => { $crate::common::requires_root() };
    (@ programs [$($name:expr),+]) => { $crate::common::requires(&[$($name),+]) };
    (@ modules [$($name:expr),+]) => { $crate::common::requires_modules(&[$($name),+]) };
    ($($need:ident $([$($name:expr),+])?),+) => {
        if !($($crate::common::needs!(@ $need $([$($name),+])?))&&+) {
            return;
        }
    };
}
#[allow(unused_imports, reason = "as above")]
pub(crate) use needs;

/// Whether the programs are there. If not: a failure where `CI` is set, else a printed skip.
#[must_use]
pub fn requires(programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |program: &str| std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    programs.iter().all(|program| found(program) || skip(program))
}

/// Whether this process may make loop devices and mount. If not: as [`requires`].
#[must_use]
pub fn requires_root() -> bool {
    (nix::unistd::geteuid().is_root() || skip("root"))
        && (Path::new("/dev/loop-control").exists() || skip("loop devices"))
        && (Path::new("/dev/fuse").exists() || skip("/dev/fuse"))
}

/// Loads these modules of the kernel, where they are not part of it. False when this kernel was made without one: a failure,
/// or a skip that is printed at once on the kernels of distributions, which leave some out (`tests/kernels`).
#[must_use]
pub fn requires_modules(modules: &[&str]) -> bool {
    let absent = |module: &&&str| try_run("modprobe", ["--dry-run", **module], "").is_err();
    if let Some(module) = modules.iter().find(absent) {
        assert!(std::env::var_os("MODULES_MAY_LACK").is_some(), "this test needs the kernel's module {module}");
        // Bypasses the test harness, which hides the output of a test that passes.
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("main").to_owned();
        writeln!(std::io::stderr(), "skipped: {name}: this kernel has no module {module}").expect("a place to write");
        return false;
    }
    run("modprobe", ["-a"].iter().chain(modules));
    true
}

fn skip(missing: &str) -> bool {
    assert!(!is_ci(), "this test needs {missing}");
    eprintln!("skipped: this test needs {missing}");
    false
}

/// Whether what is missing must fail a test.
pub fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| !value.is_empty())
}

/// Waits until `condition` holds; false when it does not within a minute. The machine may be loaded or emulated, and only a
/// test that fails waits for as long.
#[must_use]
pub fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Waits until `actual` gives the expected value: after a change, a map may be all data for a while.
pub fn assert_becomes<T: PartialEq + fmt::Debug>(expected: &T, mut actual: impl FnMut() -> T) {
    let mut last = actual();
    let equal = wait_until(|| {
        last = actual();
        last == *expected
    });
    assert!(equal, "expected {expected:?}, and it stays {last:?}");
}
