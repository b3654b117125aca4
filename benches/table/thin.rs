//! lseek over the map of a thin volume of an offline pool.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::Bench;
use crate::common::check::{seek_data, seek_hole};
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::common::run;
use crate::floor::Floor;
use crate::measure::{Contender, Table, keep_on, processors, rounds};
use crate::memory::resident;
use crate::shape::Shape;

/// Bytes of a thin block.
const BLOCK: u64 = 64 << 10;

/// Mappings of the volume.
const MAPPINGS: u64 = 10_000_000;

/// Writes the metadata of a pool with one volume, of which a third is mapped, in runs of 8 blocks on average. Answers
/// how many blocks the volume has.
fn metadata(path: &Path, mappings: u64) -> u64 {
    let text = path.with_extension("xml");
    let mut out = BufWriter::new(File::create_new(&text).expect("a new file"));
    let mut random = Random::new(1);
    let (mut origin, mut data) = (0, 0);
    let mut ranges = String::new();
    while data < mappings {
        origin += random.within(1..32);
        let length = random.within(1..16).min(mappings - data);
        ranges.push_str(&format!(
            "<range_mapping origin_begin=\"{origin}\" data_begin=\"{data}\" length=\"{length}\" time=\"0\"/>\n"
        ));
        (origin, data) = (origin + length, data + length);
    }
    let pool = format!("transaction=\"1\" flags=\"0\" version=\"2\" data_block_size=\"{}\"", BLOCK / 512);
    let device = format!("mapped_blocks=\"{mappings}\" transaction=\"0\" creation_time=\"0\" snap_time=\"0\"");
    let written = write!(
        out,
        "<superblock uuid=\"\" time=\"0\" {pool} nr_data_blocks=\"{mappings}\">\n\
         <device dev_id=\"1\" {device}>\n{ranges}</device>\n</superblock>\n"
    );
    written.and_then(|()| out.flush()).expect("room for the text");
    File::create_new(path).and_then(|image| image.set_len(mappings * 24 + (16 << 20))).expect("a sparse file");
    run("thin_restore", ["--input".as_ref(), text.as_os_str(), "--output".as_ref(), path.as_os_str()]);
    std::fs::remove_file(text).expect("it was written");
    origin
}

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
    let pool = bench.scratch.path("thin.meta");
    let blocks = metadata(&pool, mappings);
    let data = bench.scratch.path("thin.data");
    File::create_new(&data).and_then(|image| image.set_len(mappings * BLOCK)).expect("a sparse file");
    let option = format!("thin_metadata={}", pool.display());
    let ours = Mount::with_options(&data, &["-o", &option]);
    let volume = ours.directory().join("1");
    let size = blocks * BLOCK;
    let floor = Floor::new(Shape { size: size / BLOCK * BLOCK, pitch: 32 * BLOCK, data: 8 * BLOCK });
    let all: [(&str, PathBuf, u32); 2] =
        [("ours", volume.clone(), ours.pid()), ("the floor", floor.file(), floor.pid())];
    let calls = bench.scale(200_000, 10);
    keep_on(0, 1);
    for (name, order) in [("in order", Order::Ascending), ("at random offsets", Order::Random)] {
        let contenders = all.iter().map(|(name, path, pid)| {
            let mut seed = 1;
            Contender::new(*name, move || {
                keep_on(*pid, 1);
                seed += 1;
                ask(path, size, order, calls, seed)
            })
        });
        let measured = rounds(bench.rounds(), contenders.collect());
        table.add(&format!("lseek, thin, {mappings} mappings, {name}, 1 core"), "ns", &measured, &[Some(1.05)]);
    }
    keep_on(0, processors());
    let file = File::open(&volume).expect("the file opens");
    seek_hole(&file, 0).expect("every file has an end");
    table.note(&format!("memory of the daemon, a thin volume of {mappings} mappings open"), resident(ours.pid()));
}
