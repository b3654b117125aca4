//! How long the map of a thin device takes, beside reading and checksumming the same blocks, and beside `thin_dump`.
//!
//! `cargo bench --bench thin_walk [-- MILLIONS...]`: mappings, 1 million unless said. `THIN_BENCH_DIR` is where the images go: a
//! file system on disk shows what `O_DIRECT` costs, `/dev/shm` what the processor costs.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use blkholefs::map::HoleMap;
use blkholefs::source::thin::metadata::Metadata;
use blkholefs::source::thin::reader::MetadataReader;
use blkholefs::source::thin::{METADATA_BLOCK, MetaBlock, RawBlock, ThinId};
use blkholefs::sys::buffer::AlignedBuffer;
use blkholefs::units::Bytes;

const ROUNDS: usize = 9;

fn main() {
    let sizes: Vec<u64> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![1] } else { sizes };
    let dir = std::env::var_os("THIN_BENCH_DIR").map_or_else(std::env::temp_dir, Into::into);
    let dir = tempfile::tempdir_in(dir).expect("a directory for images");
    println!(
        "times in ms, medians of {ROUNDS}; ratios to the floor (read and CRC of the same blocks) and to thin_dump"
    );
    println!(
        "| mappings | read | floor | map, 1 thread | / floor | 2 threads | / 1 | thin_dump | map / it | memory KiB |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for millions in sizes {
        for shape in ["contiguous", "alternating", "random"] {
            let image = dir.path().join("image");
            let last = restore(shape, millions * 1_000_000, &image);
            measure(&format!("{millions}M {shape}"), millions * 1_000_000, last, &image);
        }
    }
}

/// Writes an image with `count` mappings; the end of the last one.
fn restore(shape: &str, count: u64, image: &Path) -> u64 {
    let xml = image.with_extension("xml");
    let mut out = BufWriter::new(File::create(&xml).expect("room for the XML"));
    let mut put = |text: String| out.write_all(text.as_bytes()).expect("room for the XML");
    put(format!(
        "<superblock uuid=\"\" time=\"1\" transaction=\"1\" version=\"2\" data_block_size=\"128\" nr_data_blocks=\"{count}\">\
         <device dev_id=\"1\" mapped_blocks=\"{count}\" transaction=\"0\" creation_time=\"0\" snap_time=\"1\">\n"
    ));
    let (mut state, mut data, mut origin) = (1_u64, 0, 0);
    while data < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Random: a third is mapped, in runs of 8 on average.
        let (gap, run) = match shape {
            "contiguous" => (0, 4096),
            "alternating" => (1, 1),
            _ => (1 + state % 37, 1 + (state >> 32) % 15),
        };
        let run = run.min(count - data);
        origin += gap;
        put(format!("<range_mapping origin_begin=\"{origin}\" data_begin=\"{data}\" length=\"{run}\" time=\"0\"/>\n"));
        (origin, data) = (origin + run, data + run);
    }
    put("</device></superblock>\n".to_owned());
    drop(out);
    let blocks = count / 60 + 2000;
    File::create(image).and_then(|file| file.set_len(blocks * METADATA_BLOCK as u64)).expect("an image");
    let restored = Command::new("thin_restore").arg("-i").arg(&xml).arg("-o").arg(image).stdout(Stdio::null()).status();
    assert!(restored.expect("thin_restore is installed").success());
    std::fs::remove_file(xml).expect("our own file");
    origin
}

fn measure(name: &str, count: u64, last: u64, image: &Path) {
    let len = Bytes::new(last * 65_536);
    let nodes = nodes(image);
    let mut times = [const { Vec::new() }; 4];
    let mut memory = Bytes::ZERO;
    let mut timed = |which: usize, work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        times[which].push(start.elapsed());
    };
    for _ in 0..ROUNDS {
        timed(0, &mut || read(image, nodes, false));
        timed(1, &mut || read(image, nodes, true));
        for threads in [1, 2] {
            timed(1 + threads, &mut || {
                let reader = MetadataReader::open(image).expect("our own file");
                let metadata = Metadata::open(reader, MetaBlock::SUPERBLOCK).expect("a whole superblock");
                let map = metadata.map(ThinId::new(1).expect("small"), len, threads).expect("a whole tree");
                assert_eq!(map.mapped_blocks(), count);
                memory = map.memory();
            });
        }
    }
    let [read, floor, one, two] = times.map(median);
    let start = Instant::now();
    let dumped = Command::new("thin_dump").arg(image).stdout(Stdio::null()).status().expect("thin_dump is installed");
    assert!(dumped.success());
    let dump = start.elapsed();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let ratio = |a: Duration, b: Duration| a.as_secs_f64() / b.as_secs_f64();
    println!(
        "| {name} | {:.1} | {:.1} | {:.1} | {:.2} | {:.1} | {:.2} | {:.0} | {:.4} | {} |",
        ms(read),
        ms(floor),
        ms(one),
        ratio(one, floor),
        ms(two),
        ratio(two, one),
        ms(dump),
        ratio(one, dump),
        memory.get() >> 10
    );
}

/// The number of nodes of the device's tree; of the internal ones as if they were as full as the leaves.
fn nodes(image: &Path) -> u64 {
    let reader = MetadataReader::open(image).expect("our own file");
    let metadata = Metadata::open(reader, MetaBlock::SUPERBLOCK).expect("a whole superblock");
    let tree = metadata.mapping_tree(ThinId::new(1).expect("small")).expect("a whole tree");
    let (leaves, entries) = (AtomicU64::new(0), AtomicU64::new(0));
    tree.walk(metadata.reader(), 1, || {
        |node| {
            leaves.fetch_add(1, Relaxed);
            entries.fetch_add(node.len() as u64, Relaxed);
        }
    })
    .expect("a whole tree");
    let leaves = leaves.into_inner();
    leaves + leaves * leaves / entries.into_inner() + 1
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Reads as many blocks as the tree has nodes, in the walk's requests.
fn read(image: &Path, nodes: u64, crc: bool) {
    let reader = MetadataReader::open(image).expect("our own file");
    let mut buffer = AlignedBuffer::new();
    let (mut at, mut sum) = (0, 0);
    while at < nodes {
        let count = (nodes - at).min(256);
        let blocks: &[RawBlock] =
            reader.read(MetaBlock::new(at), usize::try_from(count).expect("small"), &mut buffer).expect("blocks");
        if crc {
            sum ^= blocks.iter().fold(0, |sum, block| sum ^ crc32c::crc32c(&block[4..]));
        }
        at += count;
    }
    std::hint::black_box(sum);
}
