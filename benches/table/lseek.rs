//! lseek: walks over the extents of a file.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::Bench;
use crate::common::check::{seek_data, seek_hole};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::floor::Floor;
use crate::measure::{Contender, Table, keep_on, processors, rounds};
use crate::peer::Qemu;
use crate::shape::Shape;

/// Extents of the walked image.
const EXTENTS: u64 = 100_000;

/// Clients of the walk in parallel, each on a file of its own.
const CLIENTS: usize = 4;

/// Walks `extents` extents from the one numbered `first`, and answers nanoseconds for each lseek.
fn walk(path: &Path, shape: Shape, first: u64, extents: u64) -> f64 {
    let file = File::open(path).expect("the file opens");
    let mut at = first * shape.pitch;
    let start = Instant::now();
    for extent in first..first + extents {
        let data = seek_data(&file, at).expect("there is data");
        assert_eq!(data, extent * shape.pitch, "the walk is of the whole shape");
        at = seek_hole(&file, data).expect("every extent has an end");
        assert_eq!(at, data + shape.data, "the walk is of the whole shape");
    }
    nanoseconds(start, 2 * extents)
}

fn nanoseconds(start: Instant, calls: u64) -> f64 {
    start.elapsed().as_nanos() as f64 / calls as f64
}

/// A walk by one client: everything on one core, then free on all.
pub fn one_client(bench: &Bench, table: &mut Table) {
    let shape = Shape::new(16 << 30, EXTENTS, 4096);
    let image = bench.scratch.image("walk.img", shape);
    let device = Loop::new(&image);
    let ours = Mount::new(device.path());
    let floor = Floor::new(shape);
    let qemu = bench.has(table, Qemu::PROGRAM, "lseek").then(|| Qemu::new(&image));
    let mut all: Vec<(&str, PathBuf, u32)> =
        vec![("ours", ours.file().to_owned(), ours.pid()), ("the floor", floor.file(), floor.pid())];
    if let Some(qemu) = &qemu {
        all.push(("qemu-storage-daemon, image", qemu.file(), qemu.pid()));
    }
    for cores in 1..=processors().min(2) {
        // Waking another core makes a call many times as dear: fewer of them take the same time.
        let extents = if cores == 1 { bench.scale(EXTENTS, 10) } else { bench.scale(EXTENTS / 5, 10) };
        let mut starts = (0..).map(|round| round * 7919 % (EXTENTS - extents + 1));
        let starts = std::cell::RefCell::new(&mut starts);
        keep_on(0, cores);
        let contenders = all.iter().map(|(name, path, pid)| {
            let starts = &starts;
            Contender::new(*name, move || {
                keep_on(*pid, cores);
                let first = starts.borrow_mut().next().unwrap_or_default();
                walk(path, shape, first, extents)
            })
        });
        let contenders = contenders.chain([Contender::new("the image itself", || walk(&image, shape, 0, extents))]);
        let measured = rounds(bench.rounds(), contenders.collect());
        let mut targets = vec![Some(if cores == 1 { 1.25 } else { 1.15 }), Some(0.70), None];
        if qemu.is_none() {
            targets.remove(1);
        }
        let cores = if cores == 1 { "1 core" } else { "2 cores" };
        table.add(&format!("lseek walk, 100 000 extents, loop, {cores}"), "ns", &measured, &targets);
    }
    keep_on(0, processors());
}

/// Walks by several clients at a time, each on a file of its own, against one client.
pub fn many_clients(bench: &Bench, table: &mut Table) {
    let shape = Shape::new(1 << 30, EXTENTS / 10, 4096);
    let directory = bench.scratch.path("devices");
    std::fs::create_dir(&directory).expect("a new directory");
    let image = bench.scratch.image("clients.img", shape);
    let devices: Vec<Loop> = (0..CLIENTS).map(|_| Loop::new(&image)).collect();
    let names: Vec<String> = (0..CLIENTS).map(|client| format!("device{client}")).collect();
    for (device, name) in devices.iter().zip(&names) {
        std::os::unix::fs::symlink(device.path(), directory.join(name)).expect("a new name");
    }
    let ours = Mount::new(&directory);
    let extents = bench.scale(EXTENTS / 20, 5);
    let files: Vec<PathBuf> = names.iter().map(|name| ours.directory().join(name)).collect();
    let floor = Floor::new(shape);
    let floor_files: Vec<PathBuf> = (0..CLIENTS).map(|client| floor.numbered(client)).collect();
    let measured = rounds(
        bench.rounds(),
        vec![
            Contender::new("4 clients", || together(&files, shape, extents)),
            Contender::new("1 client", || together(&files[..1], shape, extents)),
            Contender::new("4 clients on 4 files of the floor", || together(&floor_files, shape, extents)),
        ],
    );
    let cores = processors().min(CLIENTS) as f64;
    table.add("lseek walk, 4 clients on 4 files, per call", "ns", &measured, &[Some(1.0 / cores), None]);
}

/// Walks all files at the same time, and answers nanoseconds for each lseek of all together.
fn together(files: &[PathBuf], shape: Shape, extents: u64) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for file in files {
            scope.spawn(|| walk(file, shape, 0, extents));
        }
    });
    nanoseconds(start, 2 * extents * files.len() as u64)
}
