//! Volumes of an offline thin pool whose maps do not stay: two that are asked in turn, and a listing of a hundred.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use super::directory;
use crate::Bench;
use crate::common::check::{seek_data, seek_hole};
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::measure::{Contender, Table, rounds, seconds};
use crate::metadata::{BLOCK, Layout, Metadata};
use crate::walk;

/// Mappings of a volume.
const MAPPINGS: u64 = 10_000_000;

/// Volumes of the listing.
const VOLUMES: u64 = 100;

/// Questions of each round where an answer may take as long as the map of a volume.
const FEW: usize = 20;

/// Questions of each round where the maps are there.
const MANY: usize = 10_000;

/// Both, of the same pool.
pub fn all(bench: &Bench, table: &mut Table) {
    if !bench.has(table, "thin_restore", "volumes of a pool") {
        return;
    }
    let directory = directory(bench);
    let mappings = bench.scale(MAPPINGS, 10);
    let metadata = Metadata::new(directory.path(), Layout::Random, mappings);
    let image = metadata.snapshots(directory.path(), VOLUMES);
    in_turn(bench, table, &metadata, &image);
    listing(bench, table, &metadata, &image);
}

/// Asks files for data and holes at random places, one after another, and answers nanoseconds for each question. All of
/// them have answered before.
fn ask(files: &[&File], questions: usize, size: u64, seed: u64) -> f64 {
    for file in files {
        seek_hole(file, 0).expect("every file has an end");
    }
    let mut random = Random::new(seed);
    let taken = seconds(|| {
        for file in files.iter().cycle().take(questions) {
            let _ = seek_data(file, random.within(0..size));
        }
    });
    taken * 1e9 / questions as f64
}

/// Two volumes that are asked in turn where there is memory for the map of one.
fn in_turn(bench: &Bench, table: &mut Table, metadata: &Metadata, image: &Path) {
    let size = metadata.blocks * BLOCK;
    // A bit for each block, which two maps take twice.
    let room = format!("map_cache={}", metadata.blocks / 8 * 3 / 2);
    let option = metadata.option(image);
    let small = Mount::with_options(&metadata.data, &["-o", &option, "-o", &room]);
    let large = Mount::with_options(&metadata.data, &["-o", &option]);
    let open = |mount: &Mount, volume: &str| File::open(mount.directory().join(volume)).expect("the file opens");
    let (one, two) = (&open(&small, "1"), &open(&small, "2"));
    let (large_one, large_two) = (&open(&large, "1"), &open(&large, "2"));
    let mut seeds = 1..;
    let seeds = std::cell::RefCell::new(&mut seeds);
    let cost = |files: &[&File], questions| {
        let seed = seeds.borrow_mut().next().unwrap_or_default();
        ask(files, questions, size, seed)
    };
    let contenders = vec![
        Contender::new("ours", || cost(&[one, two], FEW)),
        Contender::new("one volume alone", || cost(&[one], MANY)),
        Contender::new("both in turn, with memory for both maps", || cost(&[large_one, large_two], MANY)),
    ];
    let case = format!("lseek, thin, 2 volumes of {} mappings in turn, map_cache for one", metadata.mappings);
    table.add(&case, "ns", &rounds(bench.rounds(), contenders), &[None, None]);
}

/// The first `ls -l` of a mount of many volumes, which share all of their mappings.
fn listing(bench: &Bench, table: &mut Table, metadata: &Metadata, image: &Path) {
    let nodes = walk::nodes(image);
    let list = || {
        let mount = Mount::with_options(&metadata.data, &["-o", &metadata.option(image)]);
        let mut command = Command::new("ls");
        command.arg("-l").arg(mount.directory()).stdin(Stdio::null()).stdout(Stdio::null());
        seconds(|| assert!(command.status().expect("ls").success(), "{command:?}")) * 1e3
    };
    let contenders = vec![
        Contender::new("ours", list),
        Contender::new("reading and checksumming its nodes once", || seconds(|| walk::floor(image, nodes)) * 1e3),
    ];
    let case = format!("ls -l, {VOLUMES} thin volumes of the same {} mappings, the first one", metadata.mappings);
    table.add(&case, "ms", &rounds(bench.rounds(), contenders), &[None]);
}
