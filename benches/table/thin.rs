//! lseek over the map of a thin volume of an offline pool.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use crate::Bench;
use crate::common::check::{seek_data, seek_hole};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::floor::Floor;
use crate::measure::{Contender, Table, keep_on, processors, rounds};
use crate::memory::resident;
use crate::metadata::{BLOCK, Layout, Metadata, in_memory};
use crate::shape::Shape;

/// Mappings of the volume.
const MAPPINGS: u64 = 10_000_000;

/// What a walk asks next.
#[derive(Clone, Copy)]
enum Order {
    Ascending,
    Random,
}

/// Asks `calls` times, and answers nanoseconds for each.
fn ask(path: &Path, size: u64, order: Order, calls: u64, seed: u64) -> f64 {
    let file = File::open(path).expect("the file opens");
    // Some maps are read at the first question.
    seek_hole(&file, 0).expect("every file has an end");
    let mut random = Random::new(seed);
    let mut at = random.within(0..size / 2);
    let start = Instant::now();
    for _ in 0..calls / 2 {
        if let Order::Random = order {
            at = random.within(0..size);
        }
        let data = seek_data(&file, at).unwrap_or(0);
        at = seek_hole(&file, data).expect("data has an end");
    }
    start.elapsed().as_nanos() as f64 / calls as f64
}

/// Questions in order and at random offsets.
pub fn lseek(bench: &Bench, table: &mut Table) {
    if !bench.has(table, "thin_restore", "thin volumes") {
        return;
    }
    let mappings = bench.scale(MAPPINGS, 10);
    let metadata = Metadata::new(&in_memory(bench.scratch.directory()), Layout::Random, mappings);
    let mount = |path: &Path| Mount::with_options(&metadata.data, &["-o", &metadata.option(path)]);
    let device = Loop::new(&metadata.image);
    let (of_device, of_image) = (mount(device.path()), mount(&metadata.image));
    let volume = |mount: &Mount| mount.directory().join("1");
    let size = metadata.blocks * BLOCK;
    let floor = Floor::new(Shape { size, pitch: 32 * BLOCK, data: 8 * BLOCK });
    let all = [
        ("metadata on a device", volume(&of_device), of_device.pid()),
        ("metadata in an image", volume(&of_image), of_image.pid()),
        ("the floor", floor.file(), floor.pid()),
    ];
    let calls = bench.scale(200_000, 10);
    keep_on(0, 1);
    for (name, order) in [("in order", Order::Ascending), ("at random offsets", Order::Random)] {
        for ours in 0..2 {
            let contenders = [&all[ours], &all[2]].into_iter().map(|(name, path, pid)| {
                let mut seed = 1;
                Contender::new(*name, move || {
                    keep_on(*pid, 1);
                    seed += 1;
                    ask(path, size, order, calls, seed)
                })
            });
            let measured = rounds(bench.rounds(), contenders.collect());
            let case = format!("lseek, thin, {mappings} mappings, {name}, {}, 1 core", all[ours].0);
            table.add(&case, "ns", &measured, &[Some(1.05)]);
        }
    }
    keep_on(0, processors());
    let file = File::open(volume(&of_device)).expect("the file opens");
    seek_hole(&file, 0).expect("every file has an end");
    table.note(&format!("memory of the daemon, a thin volume of {mappings} mappings open"), resident(of_device.pid()));
}
