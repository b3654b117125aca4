//! What changed between two thin devices, from their metadata alone.
// Some devices are lists of one range.
#![allow(clippy::single_range_in_vec_init)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use blkholefs::testing::map::{ChangeMap, ExtentKind, HoleMap};
use blkholefs::testing::source::thin::changes::Compared;
use blkholefs::testing::source::thin::error::ThinResult;
use blkholefs::testing::source::thin::metadata::Metadata;
use blkholefs::testing::source::thin::reader::MetadataReader;
use blkholefs::testing::source::thin::{MetaBlock, ThinId};
use blkholefs::testing::units::Bytes;

#[allow(dead_code, reason = "what makes devices and images random is not used here")]
#[path = "common/random.rs"]
mod random;
#[path = "support/thin_image.rs"]
#[allow(dead_code)]
mod thin_image;
use random::Random;
use thin_image::BLOCK;

const BLOCK_SIZE: u64 = thin_image::DATA_BLOCK_SECTORS as u64 * 512;
/// More than any key of these tests.
const LEN: u64 = 4000 * BLOCK_SIZE;

type Mappings = BTreeMap<u64, u64>;

fn id(id: u32) -> ThinId {
    ThinId::new(id).unwrap()
}

fn of_bytes(bytes: &[u8]) -> Metadata {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    Metadata::open(MetadataReader::new(file).unwrap(), MetaBlock::SUPERBLOCK).unwrap()
}

fn changes(metadata: &Metadata, lens: (u64, u64), over_origin: bool) -> ThinResult<ChangeMap> {
    let [older, newer] =
        [(1, lens.0), (2, lens.1)].map(|(number, len)| Compared { id: id(number), len: Bytes::new(len) });
    metadata.changes(older, newer, over_origin)
}

fn extents(map: &ChangeMap) -> Vec<(Range<u64>, ExtentKind)> {
    let mut found: Vec<(Range<u64>, ExtentKind)> = Vec::new();
    let mut at = 0;
    while at < map.len().get() {
        let extent = map.extent_at(Bytes::new(at));
        match found.last_mut() {
            Some((range, kind)) if *kind == extent.kind => range.end = extent.end.get(),
            _ => found.push((at..extent.end.get(), extent.kind)),
        }
        at = extent.end.get();
    }
    found
}

/// What the changes must be, block by block.
fn expected(older: &Mappings, newer: &Mappings, lens: (u64, u64), over_origin: bool) -> Vec<(Range<u64>, ExtentKind)> {
    let mut found: Vec<(Range<u64>, ExtentKind)> = Vec::new();
    for block in 0..lens.1.div_ceil(BLOCK_SIZE) {
        let range = block * BLOCK_SIZE..((block + 1) * BLOCK_SIZE).min(lens.1);
        // The block in which the older one ends, and those after it, are in this range or behind it.
        let is_inside = lens.0 == lens.1 || (block + 1) * BLOCK_SIZE <= lens.0;
        let is_end = !is_inside && block * BLOCK_SIZE < lens.0;
        let kind = match (older.get(&block), newer.get(&block)) {
            _ if is_end => ExtentKind::Data,
            (Some(older), Some(newer)) if is_inside && older == newer => ExtentKind::Unchanged,
            (_, Some(_)) => ExtentKind::Data,
            _ if over_origin => ExtentKind::Data,
            (None, None) if is_inside => ExtentKind::Unchanged,
            _ => ExtentKind::Hole,
        };
        match found.last_mut() {
            Some((last, of_last)) if *of_last == kind => last.end = range.end,
            _ => found.push((range, kind)),
        }
    }
    found
}

/// A random change of mappings: new ones, moved ones, the same block with another time, and removed ones, in runs.
fn random_changes(random: &mut Random, count: u64, keys: Range<u64>) -> Vec<(u64, Option<u64>)> {
    let mut changes = BTreeMap::new();
    for _ in 0..count {
        let start = random.within(keys.clone());
        let (run, value) = (random.within(1..20), random.within(0..1 << 20));
        let is_removed = random.one_in(2);
        for at in 0..run {
            changes.insert(start + at, (!is_removed).then_some((value + at) << 24 | random.within(0..4)));
        }
    }
    changes.into_iter().collect()
}

fn apply(mappings: &mut Mappings, changes: &[(u64, Option<u64>)]) {
    for (key, value) in changes {
        match value {
            Some(value) => mappings.insert(*key, value >> 24),
            None => mappings.remove(key),
        };
    }
}

/// A pair of trees that share nodes: an older one, and one that was made of it in several steps.
fn random_pair(random: &mut Random) -> (Vec<u8>, Mappings, Mappings) {
    let fill = [3, 4, 9, 100][random.within(0..4) as usize];
    let mut older = Mappings::new();
    let count = [0, 3, 100, 200][random.within(0..4) as usize];
    let all = random_changes(random, count, 0..3000);
    apply(&mut older, &all);
    let mut image = vec![0; BLOCK];
    let entries: Vec<_> = older.iter().map(|(key, block)| (*key, *block)).collect();
    let first = thin_image::mapping_tree(&mut image, &entries, fill);
    let (mut root, mut newer) = (first, older.clone());
    for _ in 0..random.within(0..4) {
        let most = if random.one_in(4) { 300 } else { 4 };
        let count = random.within(0..most);
        let mut changes = random_changes(random, count, 0..3500);
        // Some of them are the same data block at another time.
        for (key, value) in &mut changes {
            if let (Some(block), true) = (newer.get(key), random.one_in(4)) {
                *value = Some(block << 24 | 9);
            }
        }
        if random.one_in(10) {
            changes = newer.keys().map(|key| (*key, None)).collect();
        }
        apply(&mut newer, &changes);
        root = thin_image::changed_tree(&mut image, root, &changes, fill);
    }
    let superblock = thin_image::build(&[], fill);
    image[..BLOCK].copy_from_slice(&superblock[..BLOCK]);
    let mut devices = [(1, first, older.len() as u64), (2, root, newer.len() as u64)];
    if random.one_in(2) {
        (devices[0].1, devices[0].2, devices[1].1, devices[1].2) = (root, devices[1].2, first, devices[0].2);
        (older, newer) = (newer, older);
    }
    thin_image::set_devices(&mut image, &devices, fill);
    (image, older, newer)
}

#[test]
fn the_changes_are_those_of_a_comparison_of_both_maps() {
    for seed in random::seeds(1, 60) {
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let (image, older, newer) = random_pair(&mut random);
        let metadata = of_bytes(&image);
        let len = |random: &mut Random| match random.within(0..4) {
            0 => LEN,
            1 => random.within(0..4000) * BLOCK_SIZE,
            _ => random.within(0..LEN / 512) * 512,
        };
        let one = len(&mut random);
        let other = len(&mut random);
        for lens in [(LEN, LEN), (one, one), (one, other), (one, one + 512), (one + 512, one), (one, 0), (0, one)] {
            for over_origin in [false, true] {
                let found = changes(&metadata, lens, over_origin).unwrap();
                assert_eq!(extents(&found), expected(&older, &newer, lens, over_origin), "{lens:?} {over_origin}");
            }
        }
    }
}

#[test]
fn equal_trees_are_not_read() {
    let mut image = thin_image::build(&[], 100);
    let mappings: Vec<_> = (0..100_000).map(|key| (2 * key, key)).collect();
    let root = thin_image::mapping_tree(&mut image, &mappings, 252);
    thin_image::set_devices(&mut image, &[(1, root, 100_000), (2, root, 100_000)], 100);
    let metadata = of_bytes(&image);
    let lens = (200_000 * BLOCK_SIZE, 200_000 * BLOCK_SIZE);
    assert_eq!(extents(&changes(&metadata, lens, false).unwrap()), [(0..lens.0, ExtentKind::Unchanged)]);
    // The top-level tree and the details.
    assert!(metadata.reader().reads() <= 4, "{}", metadata.reader().reads());
}
