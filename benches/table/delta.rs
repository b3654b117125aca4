//! What changed between two thin volumes that share most of their mappings, beside `thin_delta`.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use blkholefs::testing::map::{ExtentKind, HoleMap as _};
use blkholefs::testing::source::thin::changes::Compared;
use blkholefs::testing::source::thin::metadata::Metadata as Trees;
use blkholefs::testing::source::thin::reader::MetadataReader;
use blkholefs::testing::source::thin::{MetaBlock, ThinId};
use blkholefs::testing::units::Bytes;

use crate::Bench;
use crate::common::random::Random;
use crate::measure::{Contender, Pair, Table, rounds, seconds};
use crate::metadata::{BLOCK, Layout, Metadata, in_memory};
use crate::thin_image;

/// Mappings of each volume.
const MAPPINGS: u64 = 10_000_000;
/// Mappings that differ.
const CHANGES: u64 = 1000;

/// Two volumes with random changes between them, in memory and on a disk.
pub fn all(bench: &Bench, table: &mut Table) {
    if !bench.has(table, "thin_restore", "changes") || !bench.has(table, "thin_delta", "changes") {
        return;
    }
    let metadata = Metadata::new(&in_memory(bench.scratch.directory()), Layout::Contiguous, bench.scale(MAPPINGS, 10));
    let changed = add_volume(&metadata);
    let on_disk = metadata.copied_to(bench.scratch.directory());
    for (place, image) in [("hot", &*metadata.image), ("O_DIRECT from disk", &*on_disk)] {
        let ours = || seconds(|| assert_eq!(changes(image, metadata.blocks), changed)) * 1e3;
        let process = || seconds(|| silent(&mut map_since(image, &metadata.data))) * 1e3;
        let theirs = || seconds(|| silent(&mut thin_delta(image))) * 1e3;
        let case = format!("changes, {} mappings, {changed} of them changed, {place}", metadata.mappings);
        let measured = rounds(
            bench.rounds(),
            vec![
                Contender::new("ours", ours),
                Contender::new("map --since", process),
                Contender::new("thin_delta", theirs),
            ],
        );
        table.pair(&case, "ms", &measured, Pair { ours: 0, other: 2, target: Some(0.01) });
        table.pair(&format!("{case}, whole process"), "ms", &measured, Pair { ours: 1, other: 2, target: Some(0.01) });
    }
}

/// Adds a volume 2 to an image, which is volume 1 with random mappings to other data blocks. Returns how many there are.
fn add_volume(metadata: &Metadata) -> u64 {
    let file = File::options().read(true).write(true).open(&metadata.image).expect("our own file");
    let mut image = vec![0; used(&file)];
    file.read_exact_at(&mut image, 0).expect("our own file");
    let old = image.len();
    let trees = Trees::open(MetadataReader::open(&metadata.image).expect("our own file"), MetaBlock::SUPERBLOCK);
    let root = trees.and_then(|trees| trees.mapping_tree(id(1))).expect("a whole tree").root.get();
    let mut random = Random::new(1);
    let mut changes: Vec<_> = (0..CHANGES)
        .map(|_| random.within(0..metadata.mappings))
        .map(|key| (key, Some((metadata.mappings - 1 - key) << 24 | 1)))
        .filter(|(key, _)| *key != metadata.mappings - 1 - key)
        .collect();
    changes.sort_unstable();
    changes.dedup_by_key(|(key, _)| *key);
    let newer = thin_image::changed_tree(&mut image, root, &changes, 252);
    let mapped = metadata.mappings;
    thin_image::set_devices(&mut image, &[(1, root, mapped), (2, newer, mapped)], 100);
    file.write_all_at(&image[old..], old as u64).expect("room in the image");
    file.write_all_at(&image[..thin_image::BLOCK], 0).expect("our own file");
    changes.len() as u64
}

/// The end of the last block of an image that is in use.
fn used(mut file: &File) -> usize {
    let len = file.seek(SeekFrom::End(0)).expect("a length");
    let (mut end, mut block) = (len, [0; 4096]);
    while end > 0 {
        file.read_exact_at(&mut block, end - 4096).expect("our own file");
        if block != [0; 4096] {
            break;
        }
        end -= 4096;
    }
    usize::try_from(end).expect("an image in memory")
}

fn id(id: u32) -> ThinId {
    ThinId::new(id).expect("small")
}

/// The number of blocks that changed.
fn changes(image: &Path, blocks: u64) -> u64 {
    let trees = Trees::open(MetadataReader::open(image).expect("our own file"), MetaBlock::SUPERBLOCK);
    let trees = trees.expect("a whole superblock");
    let len = Bytes::new(blocks * BLOCK);
    let [older, newer] = [1, 2].map(|number| Compared { id: id(number), len });
    let map = trees.changes(older, newer, false).expect("whole trees");
    let (mut at, mut changed) = (Bytes::ZERO, 0);
    while at < len {
        let extent = map.extent_at(at);
        if extent.kind == ExtentKind::Data {
            changed += (extent.end.get() - at.get()) / BLOCK;
        }
        at = extent.end;
    }
    changed
}

fn map_since(image: &Path, data: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blkholefs"));
    command.args(["map", "--since", "1", "--volume", "2", "--json", "-o"]);
    command.arg(format!("thin_metadata={}", image.display())).arg(data);
    command
}

fn thin_delta(image: &Path) -> Command {
    let mut command = Command::new("thin_delta");
    command.args(["--thin1", "1", "--thin2", "2"]).arg(image);
    command
}

/// Runs a command without input and output.
fn silent(command: &mut Command) {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().expect("it is installed");
    assert!(status.success(), "{command:?}");
}
