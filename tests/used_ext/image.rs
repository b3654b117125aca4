//! File systems in image files, and the proof that a map of their used space is right.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use blkholefs::testing::filesystem::{ReadBytes, ext};
use blkholefs::testing::map::{FillMap, HoleMap as _};
use blkholefs::testing::reason::DenseReason;
use blkholefs::testing::units::Bytes;

use nix::fcntl::{FallocateFlags, fallocate};

use super::common::image::open_for_writing;
use super::common::loop_device::Loop;
use super::common::random::Random;
use super::common::{run, run_with_input, try_run};

/// An image file as a device, which counts what is read.
pub struct Device {
    file: File,
    reads: AtomicU64,
    bytes: AtomicU64,
}

impl Device {
    pub fn reads(&self) -> u64 {
        self.reads.load(Relaxed)
    }

    pub fn bytes_read(&self) -> u64 {
        self.bytes.load(Relaxed)
    }
}

impl ReadBytes for Device {
    fn len(&self) -> Bytes {
        Bytes::new(self.file.metadata().unwrap().len())
    }

    fn read_exact(&self, offset: Bytes, buffer: &mut [u8]) -> io::Result<()> {
        assert!(buffer.len() <= 1 << 20, "a read of {} bytes", buffer.len());
        self.reads.fetch_add(1, Relaxed);
        self.bytes.fetch_add(buffer.len() as u64, Relaxed);
        self.file.read_exact_at(buffer, offset.get())
    }
}

/// Fills a range with zeros, and does not allocate space where there is a hole.
fn zero(file: &File, range: Range<u64>) {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let length = i64::try_from(range.end - range.start).unwrap();
    fallocate(file, mode, i64::try_from(range.start).unwrap(), length).unwrap();
}

/// A file system in an image file, in a temporary folder.
pub struct Ext {
    image: PathBuf,
    folder: tempfile::TempDir,
}

/// Fills a folder with files of many lengths.
pub fn files(folder: &Path, seed: u64) {
    let mut random = Random::new(seed);
    fs::create_dir_all(folder.join("sub")).unwrap();
    for at in 0..20 {
        let length = if at % 5 == 0 { random.within(0..300_000) } else { random.within(0..6000) };
        fs::write(folder.join(format!("sub/{at}")), random.bytes(length)).unwrap();
    }
}

impl Ext {
    /// An empty file system.
    pub fn new(size: u64, options: &str) -> Self {
        Self::made(size, options, None)
    }

    /// A file system with files.
    pub fn filled(size: u64, options: &str) -> Self {
        let source = tempfile::tempdir().unwrap();
        files(source.path(), size);
        Self::made(size, options, (!options.contains("-r 0")).then_some(source.path()))
    }

    fn made(size: u64, options: &str, source: Option<&Path>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(size).unwrap();
        let mut words: Vec<_> = options.split(' ').collect();
        // mke2fs chooses blocks of 1 KiB for a small file system.
        if !words.contains(&"-b") {
            words.extend(["-b", "4096"]);
        }
        if let Some(source) = source {
            words.extend(["-d", source.to_str().unwrap()]);
        }
        run("mke2fs", ["-q", "-F"].into_iter().chain(words).chain([image.to_str().unwrap()]));
        Self { image, folder }
    }

    /// The same with another image file.
    pub fn with_image(self, image: PathBuf) -> Self {
        Self { image, ..self }
    }

    pub fn path(&self) -> &Path {
        &self.image
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A file of one MiB, outside of the file system.
    pub fn large_file(&self) -> String {
        let path = self.folder().join("large");
        if !path.exists() {
            fs::write(&path, Random::new(1).bytes(1 << 20)).unwrap();
        }
        path.to_str().unwrap().to_owned()
    }

    pub fn device(&self) -> Device {
        Device { file: File::open(&self.image).unwrap(), reads: AtomicU64::new(0), bytes: AtomicU64::new(0) }
    }

    pub fn used(&self) -> Result<FillMap, DenseReason> {
        ext::used(&self.device())
    }

    /// Runs commands of debugfs that write.
    pub fn debugfs(&self, commands: &str) {
        run_with_input("debugfs", ["-w", "-f", "-", self.image.to_str().unwrap()], commands);
    }

    /// Runs `work` with the file system mounted.
    pub fn mounted(&self, work: impl FnOnce(&Path)) {
        let device = Loop::new(&self.image);
        let mount = self.folder().join("mount");
        fs::create_dir_all(&mount).unwrap();
        run("mount", [device.path(), &mount]);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&mount)));
        run("umount", [&mount]);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    }

    /// The free ranges in bytes.
    pub fn free(&self) -> Vec<Range<u64>> {
        let map = self.used().unwrap_or_else(|reason| panic!("{reason}"));
        assert_eq!(map.len(), self.device().len());
        let mut free = Vec::new();
        let mut at = Bytes::ZERO;
        while let Some(hole) = map.next_hole(at) {
            free.push(hole.start.get()..hole.end.get());
            at = hole.end;
        }
        free
    }

    /// The free ranges are those of dumpe2fs.
    pub fn check_free_ranges(&self) {
        let text = run("dumpe2fs", [&self.image]);
        let number = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.map(|value| value.trim().parse::<u64>().unwrap())
        };
        let (block, blocks) = (number("Block size:").unwrap(), number("Block count:").unwrap());
        let cluster = number("Cluster size:").map_or(1, |size| size / block);
        let mut expected: Vec<Range<u64>> = Vec::new();
        for part in text.lines().filter_map(|line| line.strip_prefix("  Free blocks: ")).flat_map(|l| l.split(", ")) {
            let Some((first, last)) = part.split_once('-').or(Some((part, part))).filter(|_| !part.is_empty()) else {
                continue;
            };
            let (first, last): (u64, u64) = (first.trim().parse().unwrap(), last.trim().parse().unwrap());
            // With clusters, dumpe2fs prints the first block of the last cluster, or its last block.
            let end = ((last / cluster + 1) * cluster).min(blocks);
            match expected.last_mut() {
                Some(before) if before.end == first * block => before.end = end * block,
                _ => expected.push(first * block..end * block),
            }
        }
        assert_eq!(self.free(), expected);
    }

    /// The proof: the free ranges are those of dumpe2fs; and with zeros in all of them the file system is without errors,
    /// and its files are the same.
    pub fn check(&self) {
        self.check_free_ranges();
        let zeroed = self.folder().join("zeroed");
        fs::copy(&self.image, &zeroed).unwrap();
        let file = open_for_writing(&zeroed);
        for range in self.free() {
            zero(&file, range);
        }
        if let Err(error) = try_run("e2fsck", ["-fn", zeroed.to_str().unwrap()], "") {
            panic!("{error}");
        }
        assert_eq!(self.contents(&zeroed), self.contents(&self.image));
    }

    /// All files of an image by their paths.
    fn contents(&self, image: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let folder = tempfile::tempdir().unwrap();
        let commands = format!("rdump / {}\n", folder.path().display());
        run_with_input("debugfs", ["-f", "-", image.to_str().unwrap()], &commands);
        let mut contents = BTreeMap::new();
        let mut folders = vec![folder.path().to_owned()];
        while let Some(next) = folders.pop() {
            for entry in fs::read_dir(next).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => {
                        let name = path.strip_prefix(folder.path()).unwrap().to_owned();
                        contents.insert(name, fs::read(&path).unwrap());
                    }
                }
            }
        }
        contents
    }
}
