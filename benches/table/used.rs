//! The used space of a file system, beside `partclone.extfs`.

use std::fmt;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::Bench;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::{run, run_with_input};
use crate::latency::read_extents;
use crate::measure::{Contender, Table, rounds, seconds};

/// Bytes of the files of the file system. `mkfs.ext4` makes groups of 128 MiB, and a file takes most of one.
const FILE: u64 = 64 << 20;

/// ext4 of 1 TiB, of which a tenth is in use, on a loop device. A smaller one is copied.
pub fn all(bench: &Bench, table: &mut Table) {
    if !bench.has(table, "mkfs.xfs", "used space") || !bench.has(table, "partclone.extfs", "used space") {
        return;
    }
    let size = bench.scale(1 << 40, 16);
    first_byte(bench, table, &Disk::new(bench, size));
    copy(table, &Disk::new(bench, size / 8));
}

fn first_byte(bench: &Bench, table: &mut Table, disk: &Disk) {
    let partclone = || {
        let mut child = partclone(disk.device(), "-").stdout(Stdio::piped()).spawn().expect("it is installed");
        let mut output = child.stdout.take().expect("the output is piped");
        output.read_exact(&mut [0]).expect("a first byte");
        child
    };
    let theirs = || {
        let started = Instant::now();
        let mut child = partclone();
        let taken = started.elapsed().as_secs_f64() * 1e3;
        child.kill().expect("our own child");
        child.wait().expect("our own child");
        taken
    };
    let ours = || {
        disk.view(|view| {
            seconds(|| {
                let file = File::open(view).expect("the view opens");
                file.read_exact_at(&mut [0], 0).expect("the view can be read");
            }) * 1e3
        })
    };
    let measured =
        rounds(bench.rounds(), vec![Contender::new("ours", ours), Contender::new("partclone.extfs", theirs)]);
    table.add(&format!("open and the first byte of {disk}"), "ms", &measured, &[Some(1.0)]);
}

fn copy(table: &mut Table, disk: &Disk) {
    let ours = || disk.view(|view| seconds(|| read_extents(view)));
    let theirs =
        || seconds(|| assert!(partclone(disk.device(), "/dev/null").status().expect("it is installed").success()));
    let measured = rounds(1, vec![Contender::new("ours", ours), Contender::new("partclone.extfs", theirs)]);
    table.add(&format!("all data of {disk}, to null"), "s", &measured, &[Some(1.0)]);
}

/// A copy by partclone.
fn partclone(device: &Path, output: &str) -> Command {
    let mut command = Command::new("partclone.extfs");
    command.args(["-c", "-F", "-L", "/dev/null", "-o", output, "-s"]).arg(device);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// An image of an ext4 file system whose used space has data everywhere, and takes next to no space: it is on an XFS file
/// system, where all of its data is the same extent.
struct Disk {
    /// Dropped first, since its image is on the file system of the others.
    device: Option<Loop>,
    mount: Mounted,
    _below: Loop,
    size: u64,
}

/// A mounted file system; unmounted with this value.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(device: &Path, options: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
        run("mount", ["-o".as_ref(), options.as_ref(), device.as_os_str(), directory.path().as_os_str()]);
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).stdin(Stdio::null()).status();
    }
}

impl Disk {
    fn new(bench: &Bench, size: u64) -> Self {
        let below = bench.scratch.path(&format!("used-{size}.xfs"));
        File::create_new(&below).and_then(|file| file.set_len(16 << 30)).expect("a sparse file");
        run("mkfs.xfs", ["-q", "-m", "reflink=1", below.to_str().expect("temporary paths are text")]);
        let below = Loop::new(&below);
        let mut disk = Self { device: None, mount: Mounted::new(below.path(), "rw"), _below: below, size };
        File::create_new(disk.image()).and_then(|file| file.set_len(size)).expect("a sparse file");
        run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), disk.image().as_os_str()]);
        let used = disk.fill();
        disk.write(&used);
        disk.device = Some(Loop::new(&disk.image()));
        disk
    }

    /// The loop device.
    fn device(&self) -> &Path {
        self.device.as_ref().expect("it is made at the end").path()
    }

    /// Uses the view of the used space in a new mount.
    fn view(&self, use_it: impl FnOnce(&Path) -> f64) -> f64 {
        let mount = Mount::with_options(self.device(), &["-o", "used"]);
        let mut name = mount.file().as_os_str().to_owned();
        name.push(".used");
        use_it(Path::new(&name))
    }

    fn image(&self) -> PathBuf {
        self.mount.path("disk.img")
    }

    /// Makes files until the whole file system is full, and removes nine of ten. Answers where the others are: the start
    /// and the length in bytes.
    fn fill(&self) -> Vec<(u64, u64)> {
        let device = Loop::new(&self.image());
        let mount = Mounted::new(device.path(), "noinit_itable,nodiscard");
        let path = |number: u64| mount.path(&number.to_string());
        let allocated = |number: &u64| {
            let file = File::create_new(path(*number)).expect("a new file");
            let all = libc::off_t::try_from(FILE).expect("small");
            nix::fcntl::posix_fallocate(&file, 0, all).is_ok()
        };
        let count = (0..self.size / FILE).take_while(allocated).count() as u64;
        let kept = |number: &u64| number.is_multiple_of(10) && *number < count;
        (0..=count).filter(|number| !kept(number)).for_each(|number| drop(fs::remove_file(path(number))));
        run("sync", ["--file-system".as_ref(), mount.0.path().as_os_str()]);
        (0..count).filter(kept).flat_map(|number| extents(&path(number))).collect()
    }

    /// Gives all these ranges of the image the same data.
    fn write(&self, ranges: &[(u64, u64)]) {
        let source = self.mount.path("data");
        let file = File::create_new(&source).expect("a new file");
        let bytes: Vec<u8> = (0..1 << 20).map(|at: u32| (at % 251) as u8).collect();
        (0..FILE >> 20).for_each(|at| file.write_all_at(&bytes, at << 20).expect("room for the data"));
        file.sync_all().expect("the data reaches the disk");
        let clones: String =
            ranges.iter().map(|(start, length)| format!("reflink {} 0 {start} {length}\n", source.display())).collect();
        run_with_input("xfs_io", [self.image()], &clones);
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the used space of ext4, {} GiB, 10 % used, loop", self.size >> 30)
    }
}

/// The extents of a file, as `filefrag` prints them: the start and the length in bytes.
fn extents(path: &Path) -> Vec<(u64, u64)> {
    let text = run("filefrag", ["-b4096".as_ref(), "-v".as_ref(), path.as_os_str()]);
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let line = |line: &str| {
        let columns: Vec<&str> = line.split(':').collect();
        let (start, _) = columns.get(2)?.split_once("..")?;
        Some((number(start)? * 4096, number(columns.get(3)?)? * 4096))
    };
    text.lines().filter_map(line).collect()
}
