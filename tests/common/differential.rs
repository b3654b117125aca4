//! The differential test: a random stack of devices, random changes by several processes, and after each step the file is
//! compared with the device. A failure prints the seed (set `BLKHOLEFS_SEED` to repeat it) and what was done.

use std::any::Any;
use std::ffi::OsStr;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::check::{check, verify};
use super::dm::{Dm, Pool, sectors};
use super::image::{Image, open_for_writing, write_at};
use super::loop_device::Loop;
use super::mount::Mount;
use super::random::Random;
use super::{MIB, run};

/// A kind of device to build stacks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// A loop device with an offset of whole sectors and perhaps a size limit.
    Loop,
    /// A partition that begins at any sector.
    Partition,
    /// Pieces of the device below in another order, with dm-zero in between.
    Linear,
    /// Two or three legs, of which the device below is one.
    Striped,
}

/// What is at the bottom of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// An image file, shown as it is when nothing is built on it.
    File,
    /// A loop device.
    Loop,
    /// A thin volume, of which snapshots are made.
    Thin,
    /// A thin volume with an external origin.
    ThinWithOrigin,
}

/// Builds a random stack of up to `depth` of these levels, and changes it `steps` times.
pub fn run_seed(seed: u64, base: Base, levels: &[Level], depth: u64, steps: u32) {
    let mut rig = Rig::new(seed, base, levels, depth);
    for _ in 0..steps {
        rig.step();
        rig.check();
    }
}

/// A device that processes write to.
#[derive(Clone)]
struct Target {
    path: PathBuf,
    size: u64,
}

/// A device that is shown.
struct Shown {
    device: Target,
    mount: Mount,
    writable: Mount,
}

struct Rig {
    random: Random,
    /// What was built and done, printed when the test fails.
    history: Vec<String>,
    /// What is shown: the device, its mount, and a mount of it that can be written.
    shown: Vec<Shown>,
    /// Devices of every level.
    targets: Vec<Target>,
    /// Descriptors that keep dirty pages in the page cache.
    held: Vec<File>,
    /// Thin volumes that snapshots can be made of.
    volumes: Vec<(u32, Dm)>,
    pool: Option<Pool>,
    /// Everything else that was built, bottom first.
    built: Vec<Box<dyn Any>>,
    /// How many of these were there before the first volume.
    below_volumes: usize,
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.history.join("\n"));
        }
        self.held.clear();
        self.shown.clear();
        // First the devices above the volumes, then the volumes, then the origin below them.
        while self.built.len() > self.below_volumes {
            self.built.pop();
        }
        self.volumes.clear();
        self.pool = None;
        while self.built.pop().is_some() {}
    }
}

impl Rig {
    fn new(seed: u64, base: Base, levels: &[Level], depth: u64) -> Self {
        let mut rig = Self {
            random: Random::new(seed),
            history: vec![format!("seed {seed}, {base:?}, {levels:?}")],
            shown: Vec::new(),
            targets: Vec::new(),
            held: Vec::new(),
            volumes: Vec::new(),
            pool: None,
            built: Vec::new(),
            below_volumes: 0,
        };
        let mut top = rig.base(base);
        let height = rig.random.within(0..depth + 1);
        for _ in 0..height {
            let level = levels[usize::try_from(rig.random.within(0..levels.len() as u64)).expect("an index")];
            top = rig.level(level, &top);
        }
        rig.show(&top);
        rig.check();
        rig
    }

    fn note(&mut self, text: String) {
        self.history.push(text);
    }

    fn show(&mut self, device: &Target) {
        self.note(format!("show {}", device.path.display()));
        let mount = Mount::with_options(&device.path, &["-o", "compact"]);
        let writable = Mount::writable(&device.path);
        self.shown.push(Shown { device: device.clone(), mount, writable });
    }

    /// Keeps what was built until the end, and lets processes write to it.
    fn keep(&mut self, path: &Path, what: impl Any) -> Target {
        self.built.push(Box::new(what));
        self.target(path)
    }

    fn target(&mut self, path: &Path) -> Target {
        let is_file = path.is_file();
        let size = if is_file { path.metadata().expect("stat").len() } else { sectors(path) * 512 };
        let target = Target { path: path.to_owned(), size };
        self.note(format!("{} has {size} bytes", path.display()));
        self.targets.push(target.clone());
        target
    }

    /// An image of a random size with random data.
    fn image(&mut self) -> Target {
        let size = self.random.within(2 * MIB / 512..8 * MIB / 512) * 512;
        let data: Vec<_> = (0..self.random.within(0..8)).map(|_| self.random.range(size, 4096)).collect();
        let image = Image::with_data(size, &data);
        let path = image.path().to_owned();
        self.note(format!("image with {data:?}"));
        self.keep(&path, image)
    }

    fn disk(&mut self) -> Target {
        let image = self.image();
        let device = Loop::new(&image.path);
        let path = device.path().to_owned();
        self.keep(&path, device)
    }

    fn base(&mut self, base: Base) -> Target {
        match base {
            Base::File => self.image(),
            Base::Loop => self.disk(),
            Base::Thin => self.thin(None),
            Base::ThinWithOrigin => {
                let origin = self.disk();
                // An external origin must not change, so no process writes to it.
                self.targets.clear();
                self.thin(Some(origin))
            }
        }
    }

    fn thin(&mut self, origin: Option<Target>) -> Target {
        let block = [64 * 1024, 128 * 1024, 192 * 1024][usize::try_from(self.random.within(0..3)).expect("an index")];
        let size = self.random.within(2 * MIB / 512..8 * MIB / 512) * 512;
        let pool = Pool::new(64 * MIB, block);
        pool.dm().message("create_thin 0");
        let thin = pool.activate(0, size, origin.as_ref().map(|origin| origin.path.as_path()));
        let path = thin.path().to_owned();
        self.note(format!("thin volume in blocks of {block}, origin {:?}", origin.map(|origin| origin.path)));
        self.below_volumes = self.built.len();
        self.pool = Some(pool);
        self.volumes.push((0, thin));
        self.target(&path)
    }

    fn level(&mut self, level: Level, below: &Target) -> Target {
        match level {
            Level::Loop => self.loop_over(below),
            Level::Partition => self.partition(below),
            Level::Linear => self.linear(below),
            Level::Striped => self.striped(below),
        }
    }

    fn loop_over(&mut self, below: &Target) -> Target {
        let offset = self.random.within(0..below.size / 4 / 512) * 512;
        let mut options = vec![format!("--offset={offset}")];
        if self.random.one_in(2) {
            // A device below can be shorter than a MiB.
            let least = MIB.min(below.size / 2);
            let limit = self.random.within(least / 512..below.size / 512) * 512;
            options.push(format!("--sizelimit={limit}"));
        }
        self.direct_io(below, &mut options);
        self.note(format!("loop over {} {options:?}", below.path.display()));
        self.caches(below);
        let device = Loop::with_options(&below.path, &options.iter().map(String::as_str).collect::<Vec<_>>());
        let path = device.path().to_owned();
        self.keep(&path, device)
    }

    /// Without direct I/O a loop device over a block device is all data, so three of four get direct I/O.
    fn direct_io(&mut self, below: &Target, options: &mut Vec<String>) {
        if !below.path.is_file() && !self.random.one_in(4) {
            options.push("--direct-io=on".to_owned());
        }
    }

    /// A loop device over `below` reads through the page cache of `below`. What is changed further down would be hidden by
    /// that cache, from everyone, until it is dropped: there is no right answer to compare with.
    fn caches(&mut self, below: &Target) {
        if !below.path.is_file() {
            self.targets.retain(|target| target.path == below.path);
        }
    }

    fn partition(&mut self, below: &Target) -> Target {
        let disk = below.size / 512;
        let start = self.random.within(1..disk / 4);
        let size = self.random.within(disk / 4..disk - start);
        self.note(format!("partition of {}: {size} sectors at {start}", below.path.display()));
        self.caches(below);
        let mut options = vec!["--partscan".to_owned()];
        self.direct_io(below, &mut options);
        let mut device = Loop::with_options(&below.path, &options.iter().map(String::as_str).collect::<Vec<_>>());
        let path = device.add_partition(1, start, size);
        self.keep(&path, device)
    }

    fn linear(&mut self, below: &Target) -> Target {
        // Each sector once: two places of a device that are one below would not agree through a page cache above.
        let end = below.size / 512;
        let mut cuts: Vec<_> =
            (0..self.random.within(0..4)).map(|_| self.random.within(1..end)).chain([0, end]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let mut pieces: Vec<_> = cuts.windows(2).map(|cut| Some(cut[0]..cut[1])).collect();
        for _ in 0..self.random.within(0..3) {
            pieces.push(None);
        }
        let (mut table, mut at) = (String::new(), 0);
        while !pieces.is_empty() {
            let next = self.random.within(0..pieces.len() as u64);
            let piece = pieces.swap_remove(usize::try_from(next).expect("an index"));
            let length = piece.as_ref().map_or_else(|| self.random.within(1..2000), |piece| piece.end - piece.start);
            table.push_str(&match piece {
                Some(piece) => format!("{at} {length} linear {} {}\n", below.path.display(), piece.start),
                None => format!("{at} {length} zero\n"),
            });
            at += length;
        }
        self.note(table.clone());
        let device = Dm::new(&table);
        let path = device.path().to_owned();
        self.keep(&path, device)
    }

    fn striped(&mut self, below: &Target) -> Target {
        let mut legs = vec![below.clone()];
        for _ in 0..self.random.within(1..3) {
            legs.push(self.disk());
        }
        // At least 4 KiB, and often no power of two.
        let chunk = self.random.within(8..200);
        let starts: Vec<_> = legs.iter().map(|_| self.random.within(0..100)).collect();
        let shortest = legs.iter().map(|leg| leg.size / 512).min().expect("there are legs") - 100;
        let size = shortest / chunk * chunk * legs.len() as u64;
        let mut table = format!("0 {size} striped {} {chunk}", legs.len());
        for (leg, start) in legs.iter().zip(starts) {
            table.push_str(&format!(" {} {start}", leg.path.display()));
        }
        self.note(table.clone());
        let device = Dm::new(&table);
        let path = device.path().to_owned();
        self.keep(&path, device)
    }

    /// Some processes at once write and discard, and this one leaves dirty pages behind; or a snapshot is made.
    fn step(&mut self) {
        if !self.volumes.is_empty() && self.volumes.len() < 4 && self.random.one_in(8) {
            return self.snapshot();
        }
        let mut running: Vec<(String, Child)> = Vec::new();
        for _ in 0..self.random.within(1..4) {
            let command = self.change();
            self.note(format!("{command:?}"));
            running.push(start(command));
        }
        if self.random.one_in(3) {
            let target = self.random_target();
            let range = self.random.range(target.size, 512);
            self.note(format!("dirty pages at {range:?} of {}", target.path.display()));
            let file = open_for_writing(&target.path);
            write_at(&file, range);
            self.held.push(file);
        } else if self.random.one_in(4) {
            self.note("the descriptors with dirty pages are closed".to_owned());
            self.held.clear();
        }
        for (what, child) in running {
            let output = child.wait_with_output().expect("it is our child");
            let error = String::from_utf8_lossy(&output.stderr);
            // Not every stack can discard everywhere; and a direct write that meets a dirty page fails the next fsync,
            // although both are written (`dio_warn_stale_pagecache` of mm/filemap.c).
            // And a discard fails that meets a dirty page while a mount holds the device (`truncate_bdev_range` of block/bdev.c).
            let is_accepted = ["not supported", "fsync failed", "ioctl failed: Device or resource busy"]
                .iter()
                .any(|accepted| error.contains(accepted));
            assert!(output.status.success() || is_accepted, "{what}: {error}");
        }
    }

    fn random_target(&mut self) -> Target {
        // Mostly the exported device, which was built last.
        let last = self.targets.len() as u64 - 1;
        let index = if self.random.one_in(3) { self.random.within(0..last + 1) } else { last };
        self.targets[usize::try_from(index).expect("an index")].clone()
    }

    /// A process that writes or discards a range, of a device or of a file that shows one.
    fn change(&mut self) -> Command {
        if self.random.one_in(3) {
            return self.change_by_mount();
        }
        let target = self.random_target();
        let is_file = target.path.is_file();
        let Range { start, end } = self.random.range(target.size, 512);
        let path = target.path.to_str().expect("temporary paths are text");
        let (offset, length) = (start.to_string(), (end - start).to_string());
        let mut command;
        match self.random.within(0..4) {
            0 if is_file => {
                command = Command::new("fallocate");
                command.args(["--punch-hole", "--offset", &offset, "--length", &length, path]);
            }
            0 => {
                command = Command::new("blkdiscard");
                command.args(["--force", "--offset", &offset, "--length", &length, path]);
            }
            1 if !is_file => {
                command = Command::new("blkdiscard");
                command.args(["--force", "--zeroout", "--offset", &offset, "--length", &length, path]);
            }
            _ => {
                command = Command::new("dd");
                command.args(["if=/dev/urandom", "bs=64k", "iflag=count_bytes,fullblock", "oflag=seek_bytes"]);
                command.args(["conv=notrunc", "status=none"]);
                command.args([format!("of={path}"), format!("count={length}"), format!("seek={offset}")]);
                if !is_file && self.random.one_in(3) {
                    command.arg("oflag=direct");
                }
            }
        }
        command
    }

    /// A process that writes to a file of a mount, or makes zeros of a range that begins and ends at any byte.
    fn change_by_mount(&mut self) -> Command {
        let index = self.random.within(0..self.shown.len() as u64);
        let Shown { device, writable, .. } = &self.shown[usize::try_from(index).expect("an index")];
        let path = writable.file().to_str().expect("temporary paths are text");
        let unit = if self.random.one_in(2) { 512 } else { 1 };
        let Range { start, end } = self.random.range(device.size, unit);
        let (offset, length) = (start.to_string(), (end - start).to_string());
        let mut command;
        match self.random.within(0..12) {
            0 => {
                command = Command::new("truncate");
                command.args(["--size=0", path]);
            }
            kind @ 1..5 => {
                command = Command::new("fallocate");
                command.arg(if kind < 4 { "--punch-hole" } else { "--zero-range" });
                command.args(["--offset", &offset, "--length", &length, path]);
            }
            _ => {
                command = Command::new("dd");
                command.args(["if=/dev/urandom", "bs=64k", "iflag=count_bytes,fullblock", "oflag=seek_bytes"]);
                command.args(["conv=notrunc,fsync", "status=none"]);
                command.args([format!("of={path}"), format!("count={length}"), format!("seek={offset}")]);
            }
        }
        command
    }

    fn snapshot(&mut self) {
        let index = usize::try_from(self.random.within(0..self.volumes.len() as u64)).expect("an index");
        let id = u32::try_from(self.volumes.len()).expect("few volumes");
        let (origin_id, origin) = &self.volumes[index];
        let text = format!("snapshot {id} of {origin_id}");
        let pool = self.pool.as_ref().expect("volumes have a pool");
        let snapshot = pool.snapshot(id, origin, *origin_id);
        let path = snapshot.path().to_owned();
        self.note(text);
        self.volumes.push((id, snapshot));
        let target = self.target(&path);
        // The device that was exported first stays the most likely target.
        self.targets.rotate_right(1);
        self.show(&target);
    }

    fn check(&mut self) {
        for Shown { device: Target { path: device, .. }, mount, writable } in &self.shown {
            check(if self.random.one_in(2) { mount.file() } else { writable.file() }, device);
            // A process that has no map of before. The random numbers stay those of the seed.
            if self.history.len().is_multiple_of(4) {
                verify(device);
            }
            // Reading the whole image takes longer than the extents do.
            if self.random.one_in(4) {
                check_image(mount.file(), device);
            }
        }
    }
}

/// QEMU finds the bytes of the device in its compact image.
fn check_image(file: &Path, device: &Path) {
    let mut image = file.as_os_str().to_owned();
    image.push(".qcow2");
    // Past the page cache of the device, which does not have the writes to those below it.
    let compare = ["compare", "-q", "-T", "none", "-f", "qcow2", "-F", "raw"].map(OsStr::new);
    run("qemu-img", compare.into_iter().chain([&*image, device.as_os_str()]));
}

fn start(mut command: Command) -> (String, Child) {
    let what = format!("{command:?}");
    let child =
        command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
    (what, child)
}
