//! Sparse images of a regular shape.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::common::run;

/// Where data is: the first `data` bytes of each `pitch`, up to `size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of the whole.
    pub size: u64,
    /// From the start of one extent to that of the next.
    pub pitch: u64,
    /// Bytes of an extent.
    pub data: u64,
}

impl Shape {
    /// `extents` pieces of `data` bytes, evenly over `size`.
    pub fn new(size: u64, extents: u64, data: u64) -> Self {
        let pitch = size / extents / 4096 * 4096;
        Self { size: pitch * extents, pitch, data }
    }

    /// All data.
    pub fn dense(size: u64) -> Self {
        Self { size, pitch: size, data: size }
    }

    /// How many extents there are.
    pub fn extents(&self) -> u64 {
        self.size / self.pitch
    }

    /// Reads what [`Shape`]'s `Display` wrote.
    pub fn parse(text: &str) -> Self {
        let numbers: Vec<u64> = text.split(',').map(|number| number.parse().expect("SIZE,PITCH,DATA")).collect();
        Self { size: numbers[0], pitch: numbers[1], data: numbers[2] }
    }

    /// Writes an image of this shape.
    pub fn write(&self, path: &Path) {
        let file = File::create_new(path).expect("a new file");
        file.set_len(self.size).expect("a size that the file system can hold");
        let chunk: Vec<u8> = (0..self.data.min(1 << 20)).map(|at| (at % 251) as u8 | 1).collect();
        for extent in 0..self.extents() {
            let start = extent * self.pitch;
            let mut at = 0;
            while at < self.data {
                let count = (self.data - at).min(chunk.len() as u64);
                let bytes = &chunk[..usize::try_from(count).expect("at most a MiB")];
                file.write_all_at(bytes, start + at).expect("room for the image");
                at += count;
            }
        }
        file.sync_all().expect("the image reaches the disk");
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{}", self.size, self.pitch, self.data)
    }
}

/// A directory for everything that a run makes; gone with this value.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    /// A directory on a file system that can hold the images: below `TMPDIR`.
    pub fn new() -> Self {
        Self(tempfile::Builder::new().prefix("blkholefs-bench-").tempdir().expect("a temporary directory"))
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        self.0.path()
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An image of this shape.
    pub fn image(&self, name: &str, shape: Shape) -> PathBuf {
        let path = self.path(name);
        shape.write(&path);
        path
    }
}

/// Drops what the page caches hold of a file or device, so that the next read is cold.
pub fn forget(path: &Path) {
    let file = File::open(path).expect("the file opens");
    file.sync_all().expect("the file reaches the disk");
    if path.starts_with("/dev") {
        run("blockdev", ["--flushbufs".as_ref(), path.as_os_str()]);
    }
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("advice");
}
