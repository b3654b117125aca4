//! A device that is written through a mount, with a model of its bytes.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

use super::check::{check, check_same_bytes};
use super::image::open_rw;
use super::mount::Mount;
use super::random::Random;

/// A device, its writable mount, and the bytes that it must have.
pub struct Written {
    /// Closed before the mount ends.
    file: Option<File>,
    mount: Mount,
    device: PathBuf,
    model: Vec<u8>,
    random: Random,
}

impl Written {
    /// Mounts a device. The model begins with the bytes that it has.
    pub fn new(device: &Path) -> Self {
        let mount = Mount::writable(device);
        let model = std::fs::read(mount.file()).expect("the file can be read");
        let file = open_rw(mount.file());
        let random = Random::new(Random::seed_or(1));
        Self { file: Some(file), mount, device: device.to_owned(), model, random }
    }

    /// The mount.
    pub fn mount(&self) -> &Mount {
        &self.mount
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        self.file.as_ref().expect("it is open until the end")
    }

    /// Fills a range with bytes that are not zero.
    pub fn write(&mut self, range: Range<u64>) {
        let bytes = self.random.bytes(range.end - range.start);
        self.file().write_all_at(&bytes, range.start).unwrap_or_else(|error| panic!("write {range:?}: {error}"));
        self.model[place(&range)].copy_from_slice(&bytes);
    }

    /// Makes a range zero.
    pub fn zero(&mut self, range: Range<u64>) {
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let offset = |at: u64| i64::try_from(at).expect("an offset");
        fallocate(self.file(), punch, offset(range.start), offset(range.end - range.start))
            .unwrap_or_else(|error| panic!("zero {range:?}: {error}"));
        self.model[place(&range)].fill(0);
    }

    /// Makes all of it zero.
    pub fn truncate(&mut self) {
        self.file().set_len(0).expect("it can be truncated");
        self.model.fill(0);
    }

    /// The device has the bytes of the model.
    pub fn check_bytes(&self) {
        let shown = std::fs::read(self.mount.file()).expect("the file can be read");
        assert_eq!(shown.len(), self.model.len());
        // The comparison of slices is fast without optimization too.
        if shown != self.model {
            let wrong = shown.iter().zip(&self.model).position(|(shown, model)| shown != model).expect("they differ");
            panic!("wrong byte at {wrong}: {} for {}", shown[wrong], self.model[wrong]);
        }
        check_same_bytes(self.mount.file(), &self.device);
    }

    /// The device has the bytes of the model, and the map agrees.
    pub fn check(&self) {
        self.check_bytes();
        check(self.mount.file(), &self.device);
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        drop(self.file.take());
    }
}

fn place(range: &Range<u64>) -> Range<usize> {
    let index = |at: u64| usize::try_from(at).expect("a device that fits in memory");
    index(range.start)..index(range.end)
}
