//! Compact images: how long it takes to open one, and to read it from the first byte to the last.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::Bench;
use crate::common::check::{seek_data, seek_hole};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::run;
use crate::latency::{PIECE, read_extents};
use crate::measure::{Contender, Table, rounds, seconds};
use crate::metadata::{Layout, Metadata, in_memory};
use crate::shape::{Shape, forget};

/// The option that adds the images.
const COMPACT: [&str; 2] = ["-o", "compact"];

/// Bytes of an extent of a device whose data is scattered.
const EXTENT: u64 = 64 << 10;

/// The thin volumes that are opened: mappings in millions, and their layout.
const VOLUMES: [(u64, Layout); 3] = [(1, Layout::Random), (10, Layout::Random), (10, Layout::Alternating)];

/// Opening and reading.
pub fn all(bench: &Bench, table: &mut Table) {
    open_thin(bench, table);
    open_loop(bench, table);
    read(bench, table);
}

/// The compact image of a file.
fn image_of(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".qcow2");
    name.into()
}

/// Opens an image, which finds out its layout, and answers milliseconds.
fn open(image: &Path) -> f64 {
    seconds(|| {
        let file = File::open(image).expect("the image opens");
        assert!(file.metadata().expect("its attributes can be read").len() > 0);
    }) * 1e3
}

/// As [`open`], by a program that asks for the attributes before it opens the file, as cp(1) does.
fn stat_and_open(image: &Path) -> f64 {
    seconds(|| {
        assert!(std::fs::metadata(image).expect("its attributes can be read").len() > 0);
        open(image);
    }) * 1e3
}

/// Opens an exact file, and asks the first question, for which the map is loaded.
fn load(file: &Path) -> f64 {
    seconds(|| {
        let file = File::open(file).expect("the file opens");
        assert!(seek_data(&file, 0).is_some(), "there is data");
    }) * 1e3
}

/// Asks for all extents of a file.
fn walk(file: &Path) -> f64 {
    seconds(|| {
        let file = File::open(file).expect("the file opens");
        let mut at = 0;
        while let Some(data) = seek_data(&file, at) {
            at = seek_hole(&file, data).expect("data has an end");
        }
    }) * 1e3
}

/// Volumes of an offline pool: the image beside the first question to the exact file, each in a new mount.
fn open_thin(bench: &Bench, table: &mut Table) {
    if !bench.has(table, "thin_restore", "images of thin volumes") {
        return;
    }
    for (millions, layout) in VOLUMES {
        let mappings = bench.scale(millions * 1_000_000, 10);
        let metadata = Metadata::new(&in_memory(bench.scratch.directory()), layout, mappings);
        let option = metadata.option(&metadata.image);
        let with = |name: &str, ask: fn(&Path) -> f64| {
            let mount = Mount::with_options(&metadata.data, &["-o", &option, "-o", "compact"]);
            ask(&mount.directory().join(name))
        };
        for (what, ask) in [("open", open as fn(&Path) -> f64), ("stat and open", stat_and_open)] {
            let ours = Contender::new("ours", || with("1.qcow2", ask));
            let theirs = Contender::new("the first lseek of the exact file", || with("1", load));
            let measured = rounds(bench.rounds(), vec![ours, theirs]);
            let case = format!("{what} a compact image, thin, {mappings} mappings, {layout}, hot");
            table.add(&case, "ms", &measured, &[Some(1.25)]);
        }
    }
}

/// A loop device, whose extents are asked one by one.
fn open_loop(bench: &Bench, table: &mut Table) {
    let shape = Shape::new(10 << 30, bench.scale(100_000, 10), 4096);
    let image = bench.scratch.image("open.img", shape);
    let device = Loop::new(&image);
    let mount = || Mount::with_options(device.path(), &COMPACT);
    for (what, ask) in [("open", open as fn(&Path) -> f64), ("stat and open", stat_and_open)] {
        let measured = rounds(
            bench.rounds(),
            vec![
                Contender::new("ours", || ask(&image_of(mount().file()))),
                Contender::new("all lseeks of the exact file", || walk(mount().file())),
                Contender::new("all lseeks of the backing file", || walk(&image)),
            ],
        );
        let case = format!("{what} a compact image, loop, {} extents", shape.extents());
        table.add(&case, "ms", &measured, &[Some(1.0), None]);
    }
}

/// Reads the data of a device whose shape is known.
fn read_shape(path: &Path, shape: Shape) {
    let file = File::open(path).expect("the device opens");
    let mut buffer = vec![0; usize::try_from(PIECE).expect("small")];
    for start in (0..shape.extents()).map(|extent| extent * shape.pitch) {
        for at in (0..shape.data).step_by(buffer.len()) {
            let count = usize::try_from(shape.data - at).unwrap_or(usize::MAX).min(buffer.len());
            file.read_exact_at(&mut buffer[..count], start + at).expect("the device can be read");
        }
    }
}

/// Reads of images of a loop device, each in a new mount, beside reads of the data alone.
fn read(bench: &Bench, table: &mut Table) {
    let size = bench.scale(1 << 30, 8);
    let scattered = Shape::new(4 * size, size / EXTENT, EXTENT);
    for (name, shape) in [("dense", Shape::dense(size)), ("extents of 64 KiB", scattered)] {
        let image = bench.scratch.image(&format!("{name}.img"), shape);
        let device = Loop::new(&image);
        let to = in_memory(bench.scratch.directory()).join(format!("blkholefs-copy-{}", std::process::id()));
        for (state, cold) in [("hot", false), ("cold", true)] {
            let mount = || {
                if cold {
                    forget(device.path());
                    forget(&image);
                }
                Mount::with_options(device.path(), &COMPACT)
            };
            let per_gib = |taken: f64| taken * (1_u64 << 30) as f64 / (shape.extents() * shape.data) as f64;
            let extents = |path: &Path| per_gib(seconds(|| read_extents(path)));
            let measured = rounds(
                bench.rounds().min(5),
                vec![
                    Contender::new("ours", || extents(&image_of(mount().file()))),
                    Contender::new("the data of the exact file", || extents(mount().file())),
                    Contender::new("the data of the loop device", || {
                        let _mount = mount();
                        per_gib(seconds(|| read_shape(device.path(), shape)))
                    }),
                ],
            );
            let case = format!("read a compact image, loop, {name}, {state}");
            table.add(&case, "s/GiB", &measured, &[Some(1.1), Some(1.25)]);
            let copy = |from: &Path| {
                let taken = seconds(|| drop(run("cp", ["--sparse=auto".as_ref(), from.as_os_str(), to.as_os_str()])));
                std::fs::remove_file(&to).expect("the copy was made");
                per_gib(taken)
            };
            let measured = rounds(
                bench.rounds().min(5),
                vec![
                    Contender::new("ours", || copy(&image_of(mount().file()))),
                    Contender::new("cp of the exact file", || copy(mount().file())),
                    Contender::new("cp of the backing file", || {
                        let _mount = mount();
                        copy(&image)
                    }),
                ],
            );
            let case = format!("cp of a compact image, loop, {name}, {state}");
            table.add(&case, "s/GiB", &measured, &[Some(1.1), None]);
        }
    }
}
