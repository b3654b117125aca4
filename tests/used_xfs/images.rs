//! Images with XFS file systems, made by `mkfs.xfs` and filled by the kernel, and what xfs_db says of them.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use blkholefs::testing::filesystem::xfs;
use blkholefs::testing::map::{ExtentKind, FillMap, HoleMap as _};
use blkholefs::testing::units::Bytes;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::common::image::Image;
use crate::common::loop_device::Loop;
use crate::common::random::Random;
use crate::common::{KIB, run, try_run, wait_until};
use crate::used_space::ImageDevice;

/// The map of the used space of an image, or the text of the reason why there is none.
pub fn used(image: &Path) -> Result<FillMap, String> {
    xfs::used(&ImageDevice::open(image)).map_err(|reason| reason.to_string())
}

/// The ranges of one kind, in bytes.
pub fn ranges(map: &FillMap, kind: ExtentKind) -> Vec<Range<u64>> {
    let (mut at, mut ranges) = (0, Vec::new());
    while at < map.len().get() {
        let extent = map.extent_at(Bytes::new(at));
        if extent.kind == kind {
            ranges.push(at..extent.end.get());
        }
        at = extent.end.get();
    }
    ranges
}

/// Makes a file system of these options in an image.
pub fn make(size: u64, options: &[&str]) -> Image {
    let image = Image::new(size);
    let path = image.path().to_str().unwrap();
    // With these variables mkfs.xfs makes logs that are smaller than 64 MiB, for the tests of XFS itself.
    let program = ["TEST_DIR=x", "TEST_DEV=x", "QA_CHECK_FS=x", "mkfs.xfs", "-f", "-q"];
    run("env", program.iter().chain(options).chain([&path]));
    image
}

/// As [`make`], with files that mkfs.xfs copies into it.
pub fn populated(size: u64, options: &[&str]) -> Image {
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new(size);
    let mut description = String::from("/\n0 0\nd--755 0 0\n");
    for number in 0..100 {
        let path = directory.path().join(number.to_string());
        std::fs::write(&path, random.bytes(random_length(&mut Random::new(number)))).unwrap();
        description += &format!("file{number} ---644 0 0 {}\n", path.display());
    }
    let prototype = directory.path().join("prototype");
    std::fs::write(&prototype, description + "$\n").unwrap();
    let prototype = prototype.to_str().unwrap();
    make(size, &[options, &["-p", prototype]].concat())
}

fn random_length(random: &mut Random) -> u64 {
    random.within(0..100 * KIB)
}

/// Whether this kernel can mount the image.
pub fn kernel_mounts(image: &Image) -> bool {
    Mounted::try_new(image, "ro,nouuid,norecovery").is_ok()
}

/// Whether this kernel has XFS, which may be a module that is loaded at the first mount.
pub fn kernel_has_xfs() -> bool {
    let _ = try_run("modprobe", ["xfs"], "");
    std::fs::read_to_string("/proc/filesystems").unwrap().lines().any(|line| line.trim() == "xfs")
}

/// The first line of each test.
macro_rules! needs_xfs {
    () => {
        needs!(root, programs["mkfs.xfs", "xfs_admin", "xfs_db", "xfs_freeze", "xfs_growfs", "xfs_logprint", "xfs_repair"]);
        if !$crate::images::kernel_has_xfs() {
            assert!(std::env::var_os("CI").is_none_or(|value| value.is_empty()), "this test needs a kernel with XFS");
            eprintln!("skipped: this test needs a kernel with XFS");
            return;
        }
    };
}
pub(crate) use needs_xfs;

/// A mounted image. Dropping this value unmounts it.
pub struct Mounted {
    directory: tempfile::TempDir,
    device: Option<Loop>,
}

impl Mounted {
    pub fn new(image: &Image, options: &str) -> Self {
        Self::try_new(image, options).unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn try_new(image: &Image, options: &str) -> Result<Self, String> {
        let directory = tempfile::tempdir().unwrap();
        let device = Loop::new(image.path());
        let words = ["-t", "xfs", "-o", options].map(AsRef::as_ref).into_iter();
        try_run("mount", words.chain([device.path().as_os_str(), directory.path().as_os_str()]), "")?;
        Ok(Self { directory, device: Some(device) })
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The checksum of each file.
    pub fn files(&self) -> BTreeMap<PathBuf, u32> {
        let (mut files, mut directories) = (BTreeMap::new(), vec![self.path().to_owned()]);
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => directories.push(path),
                    false => {
                        let checksum = crc32c::crc32c(&std::fs::read(&path).unwrap());
                        files.insert(path.strip_prefix(self.path()).unwrap().to_owned(), checksum);
                    }
                }
            }
        }
        files
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A process that another test starts holds this test's open files until it executes its program.
        let mut unmounted = Ok(String::new());
        let _ = wait_until(|| {
            unmounted = try_run("umount", [self.path()], "");
            !unmounted.as_ref().is_err_and(|error| error.contains("busy"))
        });
        if !std::thread::panicking() {
            unmounted.unwrap();
        }
        drop(self.device.take());
    }
}

/// Makes files and directories of random sizes, removes some of them, and makes `holes` holes in a file of single blocks of
/// `block` bytes, so that the free space is in as many extents.
pub fn fill(directory: &Path, block: u64, holes: u64, random: &mut Random) {
    for number in 0..300 {
        let parent = directory.join(format!("directory {}", number % 7));
        std::fs::create_dir_all(&parent).unwrap();
        let length = if random.one_in(10) { random.within(0..400 * KIB) } else { random.within(0..30 * KIB) };
        std::fs::write(parent.join(number.to_string()), random.bytes(length)).unwrap();
    }
    let file = File::create(directory.join("holes")).unwrap();
    let content = random.bytes(KIB * KIB);
    for offset in (0..2 * holes * block).step_by(content.len()) {
        file.write_all_at(&content, offset).unwrap();
    }
    file.sync_all().unwrap();
    for hole in 0..holes {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, flags, (2 * hole * block) as i64, block as i64).unwrap();
    }
    for number in (0..300).step_by(3) {
        std::fs::remove_file(directory.join(format!("directory {}", number % 7)).join(number.to_string())).unwrap();
    }
}

/// The free ranges that xfs_db finds in the free space trees, in bytes, without the blocks of the free lists.
pub fn free_by_xfs_db(image: &Path) -> Vec<Range<u64>> {
    let block: u64 = field(image, "sb 0", "blocksize");
    let (groups, length): (u64, u64) = (field(image, "sb 0", "agcount"), field(image, "sb 0", "agblocks"));
    let mut blocks = vec![];
    for line in xfs_db(image, &["freesp -d"]).lines() {
        // The lines of the summary, which follow, have more words.
        let words: Vec<_> = line.split_whitespace().map(|word| word.parse::<u64>()).collect();
        if let [Ok(group), Ok(start), Ok(count)] = words[..] {
            blocks.push(group * length + start..group * length + start + count);
        }
    }
    for group in 0..groups {
        for listed in free_list(image, group) {
            let listed = group * length + listed;
            let at = blocks.iter().position(|range| *range == (listed..listed + 1));
            blocks.swap_remove(at.expect("xfs_db counts the free list as free"));
        }
    }
    blocks.sort_by_key(|range| range.start);
    blocks.into_iter().map(|range| range.start * block..range.end * block).collect()
}

/// The blocks of a group's free list.
pub fn free_list(image: &Path, group: u64) -> Vec<u64> {
    let agf = format!("agf {group}");
    let (first, count): (u64, u64) = (field(image, &agf, "flfirst"), field(image, &agf, "flcount"));
    // The output has parts such as `bno[0-117] = 0:4 1:5 2:null`.
    let text = xfs_db(image, &[&format!("agfl {group}"), "p bno"]);
    let entries: Vec<_> = text.split_whitespace().filter_map(|word| word.split_once(':')).collect();
    (0..count)
        .map(|at| entries[((first + at) % entries.len() as u64) as usize].1.parse().expect("a block of the free list"))
        .collect()
}

/// The value of a field of a structure, as xfs_db prints it.
pub fn field<T: std::str::FromStr>(image: &Path, structure: &str, name: &str) -> T {
    let text = xfs_db(image, &[structure, &format!("p {name}")]);
    let value = text.trim().rsplit(' ').next().unwrap();
    value.parse().unwrap_or_else(|_| panic!("{structure}: {text}"))
}

pub fn xfs_db(image: &Path, commands: &[&str]) -> String {
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    run("xfs_db", ["-r"].into_iter().chain(commands).map(AsRef::as_ref).chain([image.as_os_str()]))
}

/// The head of the log, in blocks of 512 bytes, if xfs_logprint finds nothing to replay.
pub fn log_head(image: &Path) -> Option<u64> {
    let text = run("xfs_logprint", ["-t".as_ref(), image.as_os_str()]);
    // A line such as `log tail: 2 head: 2 state: <CLEAN>`.
    let words: Vec<_> = text.split_whitespace().skip_while(|word| *word != "tail:").collect();
    match words[..] {
        ["tail:", tail, "head:", head, "state:", state, ..] => {
            assert_eq!(state == "<CLEAN>", tail == head, "{text}");
            (state == "<CLEAN>").then(|| head.parse().expect("a number"))
        }
        _ => panic!("{text}"),
    }
}

/// A copy of an image with zeros in all that is free in the map.
pub fn copy_of_used(image: &Image, map: &FillMap) -> Image {
    let (source, copy) = (File::open(image.path()).unwrap(), Image::new(map.len().get()));
    let target = crate::common::image::open_for_writing(copy.path());
    for range in ranges(map, ExtentKind::Data) {
        for start in range.clone().step_by(1 << 20) {
            let mut bytes = vec![0; (range.end - start).min(1 << 20) as usize];
            source.read_exact_at(&mut bytes, start).unwrap();
            if bytes.iter().any(|byte| *byte != 0) {
                target.write_all_at(&bytes, start).unwrap();
            }
        }
    }
    copy
}

/// A plain copy of an image, as it is on its device now.
pub fn copy(image: &Image) -> Image {
    let copy = Image::new(0);
    run("cp", ["--sparse=always".as_ref(), image.path().as_os_str(), copy.path().as_os_str()]);
    copy
}
