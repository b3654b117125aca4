//! `blkholefs verify`: holes that are zeros, wrong holes, writers at the same time, samples, and copies.

#![allow(clippy::single_range_in_vec_init, reason = "some lists of ranges have one element")]

mod common;
#[path = "verify/copies.rs"]
mod copies;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "nbd/fake.rs"]
mod fake;
#[path = "verify/readme.rs"]
mod readme;
#[path = "verify/servers.rs"]
mod servers;

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blkholefs::testing::export;
use blkholefs::testing::handle::Handle;
use blkholefs::testing::verify::{Progress, holes};

use common::image::{Image, discard, open_for_writing};
use common::loop_device::Loop;
use common::random::{Length, Random};
use common::{KIB, MIB, needs, run};

/// Where something does not agree or cannot be read.
const FAILED: i32 = 32;
const USAGE: i32 = 1;

/// What a run of `blkholefs verify` printed, and its exit code.
struct Verified {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Verified {
    fn of<S: AsRef<OsStr>>(words: &[S]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blkholefs"));
        let output = command.arg("verify").args(words).stdin(Stdio::null()).output().expect("the program starts");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        let code = output.status.code().expect("an exit code");
        Self { code, stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Asserts that all agreed. Returns the lines.
    fn agreed(&self) -> Vec<&str> {
        assert_eq!((self.code, &*self.stderr), (0, ""), "{}", self.stdout);
        self.stdout.lines().collect()
    }

    /// Asserts that something did not agree. Returns the lines.
    fn failed(&self) -> Vec<&str> {
        assert_eq!(self.code, FAILED, "{}{}", self.stdout, self.stderr);
        assert!(self.stderr.ends_with(": verification failed\n"), "{}", self.stderr);
        self.stdout.lines().collect()
    }
}

fn verify(device: &Path) -> Verified {
    Verified::of(&[device])
}

fn against(copy: &Path, device: &Path) -> Verified {
    Verified::of(&["--against".as_ref(), copy.as_os_str(), device.as_os_str()])
}

/// Data at the begin, in the middle, and at the end, which is no whole block.
const SIZE: u64 = 8 * MIB + 512;
const DATA: [std::ops::Range<u64>; 4] = [0..4 * KIB, 64 * KIB..192 * KIB, 3 * MIB..3 * MIB + 4 * KIB, 8 * MIB..SIZE];
const HOLES: u64 = 3;
const HOLE_BYTES: u64 = 8 * MIB - 136 * KIB;

#[test]
fn true_holes_agree() {
    needs!(root);
    let image = Image::with_data(SIZE, &DATA);
    let device = Loop::new(image.path());
    for path in [image.path(), device.path()] {
        let expected =
            format!("{}: {HOLE_BYTES} bytes in {HOLES} holes: {HOLE_BYTES} bytes read, all zero", path.display());
        assert_eq!(verify(path).agreed(), [expected]);
    }
    let before = device.bytes_read();
    verify(device.path()).agreed();
    assert_eq!(device.bytes_read() - before, HOLE_BYTES, "the holes are read from the device, and nothing else");
}

#[test]
fn without_holes_there_is_nothing_to_verify() {
    needs!(root);
    let image = Image::with_data(MIB, &[0..MIB]);
    assert_eq!(verify(image.path()).agreed(), [format!("{}: no holes: nothing to verify", image.path().display())]);
    let empty = Image::new(0);
    assert_eq!(verify(empty.path()).agreed().len(), 1);

    // A loop device without direct I/O over a block device has no certain holes.
    let sparse = Image::new(MIB);
    let lower = Loop::new(sparse.path());
    let upper = Loop::with_options(lower.path(), &["--direct-io=off"]);
    let verified = verify(upper.path());
    let [line] = verified.agreed()[..] else { panic!("one line") };
    let reason = line.strip_prefix(&format!("{}: no holes: nothing to verify: ", upper.path().display()));
    assert!(reason.is_some_and(|reason| reason.contains("direct I/O")), "{line}");
}

/// The free space of a file system holds old bytes, which the view of the used space does not have.
#[test]
fn a_view_is_read_through_the_view() {
    needs!(root, programs["mkfs.ext4"]);
    let image = Image::with_data(16 * MIB, &[0..16 * MIB]);
    run("mkfs.ext4", ["-q", "-F", "-E", "nodiscard"].map(OsStr::new).into_iter().chain([image.path().as_os_str()]));
    let device = Loop::new(image.path());
    let used = ["-o".as_ref(), "used".as_ref(), device.path().as_os_str()];
    let verified = Verified::of(&used);
    let [line] = verified.agreed()[..] else { panic!("one line") };
    assert!(line.ends_with("bytes read, all zero") && !line.contains(" 0 bytes"), "{line}");
    // The copy of the view is no copy of the device.
    let copy = Image::new(0);
    std::fs::write(copy.path(), std::fs::read(image.path()).expect("an image")).expect("a copy");
    assert!(against(copy.path(), device.path()).agreed().len() == 2);
    let all = [["--against".as_ref(), copy.path().as_os_str()].as_slice(), &used].concat();
    assert!(Verified::of(&all).failed()[0].starts_with("different: "));
}

/// Writers that write the same bytes again and again, and discard them at once, cause no alarm.
#[test]
fn writers_at_the_same_time_cause_no_alarm() {
    needs!(root);
    const BLOCK: u64 = 64 * KIB;
    let image = Image::new(8 * MIB);
    let device = Loop::new(image.path());
    let done = AtomicBool::new(false);
    let write = |seed| {
        let file = open_for_writing(device.path());
        let mut random = Random::new(seed);
        let mut writes = 0_u64;
        while !done.load(Ordering::SeqCst) {
            // A few blocks only, so that the same ones are written and discarded all the time.
            let at = random.within(0..8) * MIB + seed * BLOCK;
            file.write_all_at(&[0xa5; BLOCK as usize], at).expect("a write");
            file.sync_data().expect("data reaches the device");
            discard(device.path(), at..at + BLOCK);
            writes += 1;
        }
        writes
    };
    // One handle for all rounds, and a new process in each round.
    let export = export::open(device.path()).unwrap_or_else(|error| panic!("{error}"));
    let handle = Handle::new(export, Arc::default(), Arc::default());
    let verify_all = || {
        for _ in Length::rounds(40).numbers() {
            let found = holes(&handle, &Progress::hidden()).unwrap_or_else(|error| panic!("{error}"));
            assert!(found.findings.is_empty(), "{:?}", found.findings);
            verify(device.path()).agreed();
            against(image.path(), image.path()).agreed();
        }
    };
    std::thread::scope(|scope| {
        let writers = [1, 2].map(|seed| scope.spawn(move || write(seed)));
        let verified = std::panic::catch_unwind(std::panic::AssertUnwindSafe(verify_all));
        done.store(true, Ordering::SeqCst);
        assert!(writers.into_iter().all(|writer| writer.join().expect("no write fails") > 0));
        verified.unwrap_or_else(|failure| std::panic::resume_unwind(failure));
    });
}

#[test]
fn a_terminal_gets_a_bar() {
    needs!(programs["script"]);
    let image = Image::with_data(SIZE, &DATA);
    let log = tempfile::NamedTempFile::new().expect("a temporary file");
    // The environment of a test need not have a terminal's name.
    let command = format!("TERM=xterm {} verify {}", env!("CARGO_BIN_EXE_blkholefs"), image.path().display());
    let shown = run("script", ["-qec".as_ref(), command.as_ref(), log.path().as_os_str()]);
    assert!(shown.contains("% of 8.00 MiB"), "{shown:?}");
    let last = shown.lines().last().expect("lines");
    assert!(last.contains("all zero"), "{shown:?}");
}

#[test]
fn wrong_command_lines_are_usage_errors() {
    let image = Image::new(MIB);
    let path = image.path().to_str().expect("text");
    let wrong: [&[&str]; 12] = [
        &[],
        &[path, path],
        &["--sample", path],
        &["--sample", "0", path],
        &["--sample", "1000001", path],
        &["--sample", "-1", path],
        &["--seed", "1", path],
        &["--sample", "1", "--against", path, path],
        &["--json", path],
        &["--offset", "1", path],
        &["-o", "since=x", path],
        &["-o", "allow_other", path],
    ];
    for words in wrong {
        let verified = Verified::of(words);
        assert_eq!((verified.code, &*verified.stdout), (USAGE, ""), "{words:?}: {}", verified.stderr);
        assert!(verified.stderr.starts_with("blkholefs: "), "{}", verified.stderr);
    }
    for words in [&["/nonexistent"][..], &["/dev/null"], &["--against", "/nonexistent", path]] {
        assert_eq!(Verified::of(words).code, FAILED, "{words:?}");
    }
    assert!(Verified::of(&["--help"]).agreed().len() > 20);
}

#[test]
fn an_output_that_cannot_be_written_is_a_failure() {
    let image = Image::new(MIB);
    let full = File::options().write(true).open("/dev/full").expect("a device of every Linux");
    let mut command = Command::new(env!("CARGO_BIN_EXE_blkholefs"));
    let output = command.arg("verify").arg(image.path()).stdout(full).stderr(Stdio::piped()).output();
    let output = output.expect("the program starts");
    assert_eq!(output.status.code(), Some(FAILED));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot write the output"));
}
