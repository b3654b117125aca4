//! The map of a thin volume: time and memory, beside the floor (the same blocks read and checksummed) and other tools.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use blkholefs::testing::map::HoleMap as _;
use blkholefs::testing::source::thin::metadata::Metadata as Trees;
use blkholefs::testing::source::thin::reader::MetadataReader;
use blkholefs::testing::source::thin::{MetaBlock, RawBlock, ThinId};
use blkholefs::testing::sys::buffer::AlignedBuffer;
use blkholefs::testing::units::Bytes;

use crate::Bench;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::run;
use crate::measure::{Contender, Table, peak, rounds, seconds};
use crate::metadata::{BLOCK, Layout, Metadata, in_memory};

/// Blocks of one request: 1 MiB.
const REQUEST: u64 = 256;

/// The sizes in millions, and the layouts with their targets: to `thin_dump` 0.9.
const SIZES: [u64; 2] = [1, 10];
const LAYOUTS: [(Layout, f64); 3] = [(Layout::Contiguous, 0.15), (Layout::Alternating, 0.02), (Layout::Random, 0.05)];

/// What a process may need besides the bitmap.
const MEMORY: f64 = 20.0;

/// Volumes of all sizes and layouts.
pub fn all(bench: &Bench, table: &mut Table) {
    if !bench.has(table, "thin_restore", "thin maps") {
        return;
    }
    for millions in SIZES {
        for (layout, target) in LAYOUTS {
            let mappings = bench.scale(millions * 1_000_000, 10);
            let metadata = Metadata::new(&in_memory(bench.scratch.directory()), layout, mappings);
            let case = format!("{} mappings, {layout}", in_words(mappings));
            let nodes = nodes(&metadata.image);
            in_this_process(bench, table, &case, &metadata, nodes);
            first_question(bench, table, &case, &metadata, nodes);
            other_tools(bench, table, &case, &metadata, target);
            direct(bench, table, &case, &metadata, nodes);
        }
    }
}

fn in_words(mappings: u64) -> String {
    if mappings.is_multiple_of(1_000_000) { format!("{}M", mappings / 1_000_000) } else { mappings.to_string() }
}

fn open(image: &Path) -> Trees {
    let reader = MetadataReader::open(image).expect("our own file");
    Trees::open(reader, MetaBlock::SUPERBLOCK).expect("a whole superblock")
}

fn volume() -> ThinId {
    ThinId::new(1).expect("small")
}

fn map(image: &Path, metadata: &Metadata, threads: usize) {
    let len = Bytes::new(metadata.blocks * BLOCK);
    let map = open(image).map(volume(), len, threads).expect("a whole tree");
    assert_eq!(map.allocated(), Some(Bytes::new(metadata.mappings * BLOCK)));
}

/// The number of nodes of the volume's tree; of the internal ones as if they were as full as the leaves.
pub fn nodes(image: &Path) -> u64 {
    let trees = open(image);
    let tree = trees.mapping_tree(volume()).expect("a whole tree");
    let (leaves, entries) = (AtomicU64::new(0), AtomicU64::new(0));
    let count = || {
        |node: &blkholefs::testing::source::thin::node::TreeNode<'_>| {
            leaves.fetch_add(1, Relaxed);
            entries.fetch_add(node.len() as u64, Relaxed);
        }
    };
    tree.walk(trees.reader(), 1, count).expect("a whole tree");
    let leaves = leaves.into_inner();
    leaves + leaves * leaves / entries.into_inner() + 1
}

/// Reads as many blocks as the tree has nodes, in the walk's requests, and checksums them.
pub fn floor(image: &Path, nodes: u64) {
    let reader = MetadataReader::open(image).expect("our own file");
    let mut buffer = AlignedBuffer::new();
    let (mut at, mut sum) = (0, 0);
    while at < nodes {
        let count = usize::try_from((nodes - at).min(REQUEST)).expect("small");
        let blocks: &[RawBlock] = reader.read(MetaBlock::new(at), count, &mut buffer).expect("blocks");
        sum ^= blocks.iter().fold(0, |sum, block| sum ^ crc32c::crc32c(&block[4..]));
        at += count as u64;
    }
    std::hint::black_box(sum);
}

fn milliseconds(work: impl FnOnce()) -> f64 {
    seconds(work) * 1e3
}

/// The walk itself, hot.
fn in_this_process(bench: &Bench, table: &mut Table, case: &str, metadata: &Metadata, nodes: u64) {
    let image = &*metadata.image;
    let measured = rounds(
        3 * bench.rounds(),
        vec![
            Contender::new("1 thread", || milliseconds(|| map(image, metadata, 1))),
            Contender::new("reading and checksumming its nodes", || milliseconds(|| floor(image, nodes))),
        ],
    );
    table.add(&format!("thin map, {case}, hot, 1 thread"), "ms", &measured, &[Some(1.5)]);
    let measured = rounds(
        3 * bench.rounds(),
        vec![
            Contender::new("2 threads", || milliseconds(|| map(image, metadata, 2))),
            Contender::new("1 thread", || milliseconds(|| map(image, metadata, 1))),
        ],
    );
    table.add(&format!("thin map, {case}, hot, 2 threads"), "ms", &measured, &[Some(0.67)]);
}

/// The first lseek after a mount: the map is made for it.
fn first_question(bench: &Bench, table: &mut Table, case: &str, metadata: &Metadata, nodes: u64) {
    let image = &*metadata.image;
    let ask = || {
        let mount = Mount::with_options(&metadata.data, &["-o", &metadata.option(image)]);
        let file = std::fs::File::open(mount.directory().join("1")).expect("the file opens");
        milliseconds(|| assert!(crate::common::check::seek_data(&file, 0).is_some()))
    };
    let measured = rounds(
        bench.rounds(),
        vec![
            Contender::new("ours", ask),
            Contender::new("reading and checksumming its nodes", || milliseconds(|| floor(image, nodes))),
        ],
    );
    table.add(&format!("thin, {case}, hot, first lseek after open"), "ms", &measured, &[Some(1.5)]);
}

/// Whole processes: what a user of each tool waits for, and the memory that it takes at most.
fn other_tools(bench: &Bench, table: &mut Table, case: &str, metadata: &Metadata, target: f64) {
    let ours = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blkholefs"));
        command.args(["map", "--totals", "--volume", "1", "-o", &metadata.option(&metadata.image)]);
        command.arg(&*metadata.data);
        command
    };
    let dump = || {
        let mut command = Command::new("thin_dump");
        command.arg(&*metadata.image);
        command
    };
    let list = || {
        let mut command = Command::new("thin_ls");
        command.args(["--format", "DEV,MAPPED_BLOCKS,EXCLUSIVE_BLOCKS,SHARED_BLOCKS"]).arg(&*metadata.image);
        command
    };
    let time = |mut command: Command| {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        milliseconds(|| assert!(command.status().expect("it is installed").success(), "{command:?}"))
    };
    let measured = rounds(
        bench.rounds().min(5),
        vec![
            Contender::new("map --totals", || time(ours())),
            Contender::new("thin_dump", || time(dump())),
            Contender::new("thin_ls with shared and exclusive blocks", || time(list())),
        ],
    );
    table.add(&format!("thin map, {case}, whole process"), "ms", &measured, &[Some(target), None]);
    let bitmap = metadata.blocks as f64 / 8.0 / f64::from(1 << 20);
    let memory = [peak(&ours()), peak(&dump()), peak(&list())];
    let case = format!("thin map, {case}, peak memory");
    table.row(
        &case,
        "MiB",
        memory[0],
        (&format!("20 MiB and a bit for each of {} blocks", metadata.blocks), MEMORY + bitmap),
        Some(1.0),
    );
    table.row(&case, "MiB", memory[0], ("thin_dump", memory[1]), None);
    table.row(&case, "MiB", memory[0], ("thin_ls with shared and exclusive blocks", memory[2]), None);
}

/// The walk with `O_DIRECT`, from a disk, where nothing is hot, and from a loop device over memory, as a faster disk.
fn direct(bench: &Bench, table: &mut Table, case: &str, metadata: &Metadata, nodes: u64) {
    let copy = metadata.copied_to(bench.scratch.directory());
    let device = Loop::new(&metadata.image);
    for (from, image, threads, target) in
        [("disk", &*copy, 1, 1.25), ("disk", &*copy, 2, 1.1), ("a loop device over memory", device.path(), 2, 1.1)]
    {
        let (input, count) = (format!("if={}", image.display()), format!("count={}", nodes * 4096));
        let dd = [&*input, &*count, "of=/dev/null", "bs=1M", "iflag=direct,count_bytes"];
        let measured = rounds(
            3 * bench.rounds(),
            vec![
                Contender::new("ours", || milliseconds(|| map(image, metadata, threads))),
                Contender::new("dd iflag=direct bs=1M", || milliseconds(|| drop(run("dd", dd)))),
            ],
        );
        // A volume of a million blocks is an ordinary one.
        let target = if metadata.mappings > 1_000_000 { 1.25 } else { target };
        let plural = if threads == 1 { "" } else { "s" };
        let case = format!("thin map, {case}, O_DIRECT from {from}, {threads} thread{plural}");
        table.add(&case, "ms", &measured, &[Some(target)]);
    }
}
