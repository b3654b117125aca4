//! Devices and servers that take milliseconds to answer: what counts is how many requests are under way at a time.

mod nbd;
mod plain_client;
mod random;
mod slow_image;
mod slow_loop;
mod volumes;

pub use nbd::all as of_nbd;
pub use random::all as at_random;
pub use slow_loop::all as of_loop;
pub use volumes::all as volumes;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Bench;
use crate::common::check::{seek_data, seek_hole};
use crate::common::run;
use crate::measure::seconds;
use crate::metadata::in_memory;

/// A directory in memory for images, sockets and copies, so that only the delay takes time; gone with this value.
fn directory(bench: &Bench) -> tempfile::TempDir {
    let parent = in_memory(bench.scratch.directory());
    tempfile::Builder::new().prefix("blkholefs-bench-").tempdir_in(parent).expect("a temporary directory")
}

/// The path as an argument of a program.
fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

/// A client that reads a whole sparse file.
#[derive(Clone, Copy)]
enum Client {
    /// `cp --sparse=always` to a file in memory.
    Cp,
    /// GNU tar with `--sparse`, into a pipe: tar does not read a file whose archive is `/dev/null`.
    Tar,
    /// [`read_extents`] in this process.
    Reader,
    /// `cat`, which reads the holes too.
    Cat,
}

impl Client {
    fn name(self) -> &'static str {
        match self {
            Self::Cp => "cp",
            Self::Tar => "tar",
            Self::Reader => "a reader of extents",
            Self::Cat => "cat",
        }
    }

    /// Reads the file, and answers seconds. `to` is the name of a copy, which is taken away again.
    fn read(self, file: &Path, to: &Path) -> f64 {
        match self {
            Self::Cp => copy("cp", &["--sparse=always", text(file), text(to)], to),
            Self::Tar => piped("tar", &["--create", "--sparse", "--absolute-names", "--file", "-", text(file)]),
            Self::Reader => seconds(|| read_extents(file)),
            Self::Cat => piped("cat", &[text(file)]),
        }
    }
}

/// Runs a program that makes the file `to`, and answers seconds.
fn copy(program: &str, arguments: &[&str], to: &Path) -> f64 {
    let taken = seconds(|| {
        run(program, arguments);
    });
    fs::remove_file(to).expect("the copy was made");
    taken
}

/// Runs a program whose output is read by `cat` and goes nowhere, and answers seconds.
fn piped(program: &str, arguments: &[&str]) -> f64 {
    seconds(|| {
        let mut command = Command::new(program);
        let mut child = command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect(program);
        let output = child.stdout.take().expect("the output is piped");
        let cat = Command::new("cat").stdin(output).stdout(Stdio::null()).status().expect("cat");
        assert!(child.wait().expect("our child").success() && cat.success(), "{command:?}");
    })
}

/// Bytes of one read of [`read_extents`], as `cp` and `cat` have it.
pub const PIECE: u64 = 128 << 10;

/// Reads the extents of a file one after another, each in pieces.
pub fn read_extents(path: &Path) {
    let file = fs::File::open(path).expect("the file opens");
    let mut buffer = vec![0; usize::try_from(PIECE).expect("small")];
    let mut at = 0;
    while let Some(data) = seek_data(&file, at) {
        let end = seek_hole(&file, data).expect("data has an end");
        at = data;
        while at < end {
            let count = usize::try_from((end - at).min(PIECE)).expect("small");
            file.read_exact_at(&mut buffer[..count], at).expect("the file can be read");
            at += count as u64;
        }
    }
}

/// The only file of a mount.
fn only_file(directory: &Path) -> PathBuf {
    let mut entries = fs::read_dir(directory).expect("the mount can be listed");
    entries.next().expect("the mount has a file").expect("the mount can be listed").path()
}
