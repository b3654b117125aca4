//! Maps, and the checks that every device has to pass.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::assert_becomes;

/// The kind of an extent, as lseek(2) reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The range may hold any bytes.
    Data,
    /// The range reads as zeros.
    Hole,
}

/// One line of a map.
#[derive(Clone, PartialEq, Eq)]
pub struct Extent(pub Kind, pub Range<u64>);

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}..{}", self.0, self.1.start, self.1.end)
    }
}

/// Opens for reading.
pub fn open(path: &Path) -> File {
    File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `lseek(SEEK_DATA)`, where `None` is ENXIO. Any other error panics.
pub fn seek_data(file: &File, offset: u64) -> Option<u64> {
    seek(file, offset, Whence::SeekData)
}

/// `lseek(SEEK_HOLE)`, where `None` is ENXIO. Any other error panics.
pub fn seek_hole(file: &File, offset: u64) -> Option<u64> {
    seek(file, offset, Whence::SeekHole)
}

fn seek(file: &File, offset: u64, whence: Whence) -> Option<u64> {
    match lseek(file, i64::try_from(offset).expect("an offset of lseek"), whence) {
        Ok(found) => Some(u64::try_from(found).expect("lseek returns an offset")),
        Err(Errno::ENXIO) => None,
        Err(error) => panic!("lseek({offset}): {error}"),
    }
}

/// The extents of a file, found as the kernel series' `map_holes.py` finds them: SEEK_HOLE first; where that returns the
/// offset itself there is a hole, which ends at SEEK_DATA or at the end of the file.
pub fn map_holes(path: &Path) -> Vec<Extent> {
    let file = open(path);
    let end = u64::try_from(lseek(&file, 0, Whence::SeekEnd).expect("files have an end")).expect("an offset");
    let mut extents = Vec::new();
    let (mut offset, mut changes) = (0, 0);
    while offset < end {
        let hole = seek_hole(&file, offset).expect("SEEK_HOLE inside the file always finds one");
        let extent = if hole == offset {
            Extent(Kind::Hole, offset..seek_data(&file, offset).unwrap_or(end))
        } else {
            Extent(Kind::Data, offset..hole)
        };
        // The hole became data between the two seeks, because a map may be all data for a while.
        if extent.1.is_empty() && changes < 100 {
            changes += 1;
            continue;
        }
        assert!(offset < extent.1.end && extent.1.end <= end, "no progress at {offset}: {extent:?}");
        offset = extent.1.end;
        extents.push(extent);
    }
    extents
}

/// The map of a file of `size` bytes that has data in these ranges only.
pub fn map_of(size: u64, data: &[Range<u64>]) -> Vec<Extent> {
    let mut extents = Vec::new();
    let mut offset = 0;
    for range in data {
        if offset < range.start {
            extents.push(Extent(Kind::Hole, offset..range.start));
        }
        extents.push(Extent(Kind::Data, range.clone()));
        offset = range.end;
    }
    if offset < size {
        extents.push(Extent(Kind::Hole, offset..size));
    }
    extents
}

/// Checks what holds for every device that is not being written: holes read as zeros, the file has the device's bytes, and
/// `st_blocks` is below the size exactly when there is a hole.
pub fn check(file: &Path, device: &Path) {
    check_holes(&map_holes(file), device);
    check_same_bytes(file, device);
    check_blocks(file);
}

/// Every hole reads as zeros on the device itself.
pub fn check_holes(map: &[Extent], device: &Path) {
    let device = Direct::open(device);
    let zeros = vec![0; Direct::CHUNK];
    for Extent(kind, range) in map {
        if *kind == Kind::Hole {
            device.chunks(range.clone(), |offset, bytes| {
                assert!(
                    bytes == &zeros[..bytes.len()],
                    "the hole {range:?} is not zero, at {offset} or after, in {map:?}"
                );
            });
        }
    }
}

/// Runs `blkholefs verify`: it finds no wrong hole, even if processes write to the device at the same time.
pub fn verify(device: &Path) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blkholefs"));
    let output = command.arg("verify").arg(device).stdin(Stdio::null()).output().expect("the program starts");
    let [found, error] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{command:?}: {}: {found}{error}", output.status);
}

/// The file has the size and the bytes of the device.
pub fn check_same_bytes(file: &Path, device: &Path) {
    let file = open(file);
    let size = file.metadata().expect("the file has attributes").len();
    let device = Direct::open(device);
    assert_eq!(size, device.size(), "size of the file");
    let mut shown = vec![0; Direct::CHUNK];
    device.chunks(0..size, |offset, bytes| {
        let shown = &mut shown[..bytes.len()];
        file.read_exact_at(shown, offset).unwrap_or_else(|error| panic!("read at {offset}: {error}"));
        if shown != bytes {
            let wrong = shown.iter().zip(bytes).position(|(a, b)| a != b).expect("they differ");
            panic!("wrong byte at {}: {} for {}", offset + wrong as u64, shown[wrong], bytes[wrong]);
        }
    });
}

/// `st_blocks` is never 0, and below the size exactly when there is a hole.
pub fn check_blocks(file: &Path) {
    // Right after a change the map or `st_blocks` may still report all data, so the comparison is repeated.
    assert_becomes(&true, || {
        let has_hole = map_holes(file).iter().any(|extent| extent.0 == Kind::Hole);
        let shown = std::fs::metadata(file).expect("the file has attributes");
        assert_ne!(shown.blocks(), 0, "st_blocks");
        has_hole == (shown.blocks() < shown.len() / 512)
    });
}

/// Waits until a file has this map.
pub fn assert_map(file: &Path, expected: &[Extent]) {
    assert_becomes(&expected.to_vec(), || map_holes(file));
}

/// The sysfs directory of a block device.
pub fn sysfs(device: &Path) -> PathBuf {
    let number = std::fs::metadata(device).expect("the device exists").rdev();
    format!("/sys/dev/block/{}:{}", nix::sys::stat::major(number), nix::sys::stat::minor(number)).into()
}

/// Bytes that were read from a block device so far, by all processes: sysfs counts 512-byte sectors.
pub fn bytes_read(device: &Path) -> u64 {
    let path = sysfs(device).join("stat");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let sectors: u64 = text.split_whitespace().nth(2).and_then(|word| word.parse().ok()).expect("a count of sectors");
    sectors * 512
}

/// A block device read with O_DIRECT, so that the page cache plays no part, or a file.
struct Direct(File);

impl Direct {
    const CHUNK: usize = 1 << 20;
    const ALIGNMENT: usize = 4096;

    fn open(path: &Path) -> Self {
        let flags = if path.is_file() { 0 } else { libc::O_DIRECT };
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
        Self(file.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    fn size(&self) -> u64 {
        u64::try_from(lseek(&self.0, 0, Whence::SeekEnd).expect("devices have an end")).expect("an offset")
    }

    /// Calls `each` with the bytes of a range, piece by piece.
    fn chunks(&self, range: Range<u64>, mut each: impl FnMut(u64, &[u8])) {
        let mut memory = vec![0; Self::CHUNK + Self::ALIGNMENT];
        let skipped = memory.as_ptr().align_offset(Self::ALIGNMENT);
        let buffer = &mut memory[skipped..][..Self::CHUNK];
        let mut offset = range.start;
        while offset < range.end {
            let length = (range.end - offset).min(Self::CHUNK as u64);
            let buffer = &mut buffer[..usize::try_from(length).expect("a chunk's length")];
            self.0.read_exact_at(buffer, offset).unwrap_or_else(|error| panic!("device at {offset}: {error}"));
            each(offset, buffer);
            offset += length;
        }
    }
}
