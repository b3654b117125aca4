//! Copies by ordinary programs: from us, from the sparse image itself, and from the raw device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Bench;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::run;
use crate::floor::Floor;
use crate::measure::{Contender, Table, rounds, seconds};
use crate::shape::{Scratch, Shape};

/// Bytes of an extent; one in a hundred of the device is data.
const EXTENT: u64 = 64 << 10;

/// How much smaller the raw device is: it is read to its end, and its time multiplied.
const RAW_SHARE: u64 = 16;

/// A program that copies a file, and what it is called in the table.
struct Copier {
    program: &'static str,
    /// The ratio to the floor to reach, if there is one.
    target: Option<f64>,
    arguments: fn(&str, &str) -> Vec<String>,
    /// Whether it reads a block device as it reads a file.
    reads_devices: bool,
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

const COPIERS: [Copier; 4] = [
    Copier {
        program: "cp",
        target: Some(1.2),
        arguments: |from, to| words(&["--sparse=always", from, to]),
        reads_devices: true,
    },
    Copier {
        program: "qemu-img",
        target: None,
        arguments: |from, to| words(&["convert", "-f", "raw", "-O", "raw", from, to]),
        reads_devices: true,
    },
    Copier { program: "nbdcopy", target: None, arguments: |from, to| words(&[from, to]), reads_devices: true },
    Copier {
        program: "tar",
        target: None,
        arguments: |from, to| words(&["--create", "--sparse", "--absolute-names", "--file", to, from]),
        reads_devices: false,
    },
];

impl Copier {
    /// Copies, and answers seconds.
    fn copy(&self, from: &Path, to: &Path) -> f64 {
        let text = |path: &Path| path.to_str().expect("temporary paths are text").to_owned();
        let taken = seconds(|| {
            run(self.program, (self.arguments)(&text(from), &text(to)));
        });
        fs::remove_file(to).expect("the copy was made");
        taken
    }
}

/// A device of `size` bytes with one in a hundred of data.
fn one_percent(size: u64) -> Shape {
    Shape::new(size, size / 100 / EXTENT, EXTENT)
}

/// Copies of a large sparse device.
pub fn all(bench: &Bench, table: &mut Table) {
    let size = bench.scale(64 << 30, 8);
    let image = bench.scratch.image("copy.img", one_percent(size));
    let device = Loop::new(&image);
    let ours = Mount::new(device.path());
    let floor = Floor::new(one_percent(size));
    let raw_image = bench.scratch.image("raw.img", one_percent(size / RAW_SHARE));
    let raw = Loop::new(&raw_image);
    let to = bench.scratch.path("copy");
    for copier in &COPIERS {
        if !bench.has(table, copier.program, "copies") {
            continue;
        }
        let mut contenders = vec![
            Contender::new("ours", || copier.copy(ours.file(), &to)),
            Contender::new("the sparse image itself", || copier.copy(&image, &to)),
            Contender::new("the floor, bytes from memory", || copier.copy(&floor.file(), &to)),
        ];
        let mut targets = vec![Some(1.5), copier.target];
        if copier.reads_devices {
            let name = format!("the raw device ({} GiB, times {RAW_SHARE})", (size / RAW_SHARE) >> 30);
            contenders.push(Contender::new(name, || copier.copy(raw.path(), &to) * RAW_SHARE as f64));
            targets.push(None);
        }
        let case = format!("{}, {} GiB with 1 % data", copier.program, size >> 30);
        table.add(&case, "s", &rounds(bench.rounds().min(5), contenders), &targets);
    }
}

/// An XFS file system in an image, for files larger than others hold; unmounted with this value.
struct Xfs {
    directory: tempfile::TempDir,
    _device: Loop,
}

impl Xfs {
    fn new(scratch: &Scratch) -> Self {
        let image = scratch.path("xfs.img");
        fs::File::create_new(&image).and_then(|file| file.set_len(8 << 30)).expect("a sparse file");
        run("mkfs.xfs", ["-q".as_ref(), image.as_os_str()]);
        let device = Loop::new(&image);
        let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
        run("mount", [device.path(), directory.path()]);
        Self { directory, _device: device }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.directory.path()).stdin(Stdio::null()).status();
    }
}

/// The same data on devices of ever larger virtual sizes.
pub fn sizes(bench: &Bench, table: &mut Table) {
    if !bench.has(table, "mkfs.xfs", "virtual sizes") {
        return;
    }
    let xfs = Xfs::new(&bench.scratch);
    let to = xfs.path("copy");
    let terabytes = [10, 1, 100];
    let mounts: Vec<(Loop, Mount)> = terabytes
        .iter()
        .map(|size| {
            let image = xfs.path(&format!("{size}.img"));
            Shape::new(size << 40, bench.scale(2000, 4), EXTENT).write(&image);
            let device = Loop::new(&image);
            let mount = Mount::new(device.path());
            (device, mount)
        })
        .collect();
    let copier = &COPIERS[0];
    for (index, size) in [(0, 10), (2, 100)] {
        let contenders = vec![
            Contender::new(format!("{size} TiB"), || copier.copy(mounts[index].1.file(), &to)),
            Contender::new("1 TiB with the same data", || copier.copy(mounts[1].1.file(), &to)),
        ];
        table.add(&format!("cp, {size} TiB virtual"), "s", &rounds(bench.rounds(), contenders), &[Some(1.10)]);
    }
}
