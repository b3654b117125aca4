//! Image files with holes.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

use super::random::Random;
use super::{ioctl, run};

/// A sparse file in the temporary directory. Dropping this value removes it.
pub struct Image(tempfile::TempPath);

impl Image {
    /// A file of `size` bytes that is one hole.
    pub fn new(size: u64) -> Self {
        let file = tempfile::Builder::new().prefix("blkholefs-").suffix(".img").tempfile().expect("a temporary file");
        file.as_file().set_len(size).expect("a size that the file system can hold");
        Self(file.into_temp_path())
    }

    /// A file of `size` bytes with data in the ranges, in the directory of the build. The temporary directory may be in memory,
    /// where the times of a file do not show writes to a mapping.
    pub fn on_disk(size: u64, data: &[Range<u64>]) -> Self {
        let place = env!("CARGO_TARGET_TMPDIR");
        std::fs::create_dir_all(place).expect("the directory of the build is writable");
        let file = tempfile::Builder::new().prefix("blkholefs-").suffix(".img").tempfile_in(place).expect("a file");
        file.as_file().set_len(size).expect("a size that the file system can hold");
        let image = Self(file.into_temp_path());
        data.iter().for_each(|range| image.write(range.clone()));
        image
    }

    /// A file of `size` bytes with data in the ranges.
    pub fn with_data(size: u64, data: &[Range<u64>]) -> Self {
        let image = Self::new(size);
        for range in data {
            image.write(range.clone());
        }
        image
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Fills a range with bytes that are not zero.
    pub fn write(&self, range: Range<u64>) {
        write(self.path(), range);
    }

    /// Makes a range a hole.
    pub fn punch(&self, range: Range<u64>) {
        let offset = range.start.to_string();
        let length = (range.end - range.start).to_string();
        run(
            "fallocate",
            ["--punch-hole", "--offset", &offset, "--length", &length]
                .map(AsRef::as_ref)
                .into_iter()
                .chain([self.path().as_os_str()]),
        );
    }

    /// Changes the size.
    pub fn resize(&self, size: u64) {
        open_for_writing(self.path()).set_len(size).expect("the image can be resized");
    }
}

/// Fills a range of a file or device with bytes that are not zero; they are on the device when this returns.
pub fn write(path: &Path, range: Range<u64>) {
    let file = open_for_writing(path);
    write_at(&file, range);
    file.sync_data().expect("data reaches the device");
}

/// Makes a range of an open file zeros by FALLOC_FL_PUNCH_HOLE.
///
/// # Errors
/// As fallocate(2).
pub fn try_punch(file: &File, range: &Range<u64>) -> std::io::Result<()> {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let signed = |value: u64| i64::try_from(value).expect("an offset of a file");
    Ok(fallocate(file, mode, signed(range.start), signed(range.end - range.start))?)
}

/// Discards a range of a device, even if it is open elsewhere.
pub fn discard(device: &Path, range: Range<u64>) {
    ioctl::discard(&open_for_writing(device), range);
}

/// Fills a range of an open file or device with bytes that are not zero and depend on the offset; writes back nothing.
pub fn write_at(file: &File, range: Range<u64>) {
    let mut random = Random::new(range.start);
    let mut offset = range.start;
    while offset < range.end {
        let chunk = random.bytes((range.end - offset).min(1 << 20));
        file.write_all_at(&chunk, offset).expect("a write inside the device");
        offset += chunk.len() as u64;
    }
}

/// Opens an existing file or device for reading and writing.
pub fn open_rw(path: &Path) -> File {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Opens an existing file or device for writing.
pub fn open_for_writing(path: &Path) -> File {
    OpenOptions::new().write(true).open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
