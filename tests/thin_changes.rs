//! What changed between two thin devices, from their metadata alone.
// Some devices are lists of one range.
#![allow(clippy::single_range_in_vec_init)]

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blkholefs::testing::map::{ChangeMap, ExtentKind, HoleMap};
use blkholefs::testing::source::changes::IdentityValue;
use blkholefs::testing::source::thin::changes::Compared;
use blkholefs::testing::source::thin::error::{Damage, ThinError, ThinResult};
use blkholefs::testing::source::thin::metadata::Metadata;
use blkholefs::testing::source::thin::offline::OfflinePool;
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
use thin_image::{BLOCK, NODE, put, stamp};

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

/// Volumes of 100 000 mappings, of which a few differ; the metadata, and the nodes that only the newer one has.
fn some_changes(count: u64) -> (Vec<u8>, Range<usize>) {
    let mut image = thin_image::build(&[], 100);
    let mappings: Vec<_> = (0..100_000).map(|key| (2 * key, key)).collect();
    let older = thin_image::mapping_tree(&mut image, &mappings, 252);
    let changes: Vec<_> = (0..count).map(|at| (at * 2 * (100_000 / count), Some((200_000 + at) << 24))).collect();
    let own = image.len() / BLOCK;
    let newer = thin_image::changed_tree(&mut image, older, &changes, 252);
    let own = own..image.len() / BLOCK;
    thin_image::set_devices(&mut image, &[(1, older, 100_000), (2, newer, 100_000)], 100);
    (image, own)
}

#[test]
fn only_nodes_that_differ_are_read() {
    for count in [1, 2, 10] {
        let (image, own) = some_changes(count);
        let metadata = of_bytes(&image);
        let lens = (200_000 * BLOCK_SIZE, 200_000 * BLOCK_SIZE);
        let map = changes(&metadata, lens, false).unwrap();
        assert_eq!(map.allocated(), Some(Bytes::new(count * BLOCK_SIZE)));
        // The trees of devices and of details; the height of both trees; the nodes that differ, in requests for
        // several.
        let most = 3 + 2 * 3 + 2 * own.len() as u64;
        assert!(metadata.reader().reads() <= most, "{count} changes: {} reads", metadata.reader().reads());
    }
}

#[test]
fn damage_of_a_node_that_is_read_is_an_error() {
    let (image, own) = some_changes(4);
    let lens = (200_000 * BLOCK_SIZE, 200_000 * BLOCK_SIZE);
    for block in own {
        // One wrong byte, and with a right checksum: the block number, the kind, a key.
        let mut rotten = image.clone();
        rotten[block * BLOCK + 4000] ^= 4;
        assert!(matches!(changes(&of_bytes(&rotten), lens, false), Err(ThinError::Damaged(_, Damage::Checksum))));
        for (at, value, size, damage) in [
            (8, 1, 8, Damage::Location),
            (4, 3, 4, Damage::Kind),
            (32, u64::MAX, 8, Damage::KeyOrder),
            (16, 253, 4, Damage::Entries),
        ] {
            let mut wrong = image.clone();
            put(&mut wrong, block * BLOCK + at, value, size);
            stamp(&mut wrong, block, NODE);
            match changes(&of_bytes(&wrong), lens, false) {
                Err(ThinError::Damaged(_, found)) => assert_eq!(found, damage, "block {block}"),
                other => panic!("block {block}, {damage}: {:?}", other.map(|map| map.allocated())),
            }
        }
    }
}

#[test]
fn a_wrong_number_of_mappings_is_an_error() {
    let (mut image, _) = some_changes(4);
    let details = usize::try_from(thin_image::get(&image, 328, 8)).unwrap();
    put(&mut image, details * BLOCK + 32 + 8 * 126 + 24, 100_001, 8);
    stamp(&mut image, details, NODE);
    let lens = (200_000 * BLOCK_SIZE, 200_000 * BLOCK_SIZE);
    assert!(matches!(changes(&of_bytes(&image), lens, false), Err(ThinError::OtherDifference { .. })));
}

/// The image and some data as an offline pool.
fn offline(image: &[u8], directory: &Path) -> (PathBuf, Arc<OfflinePool>) {
    let (metadata, data) = (directory.join("metadata"), directory.join("data"));
    std::fs::write(&metadata, image).unwrap();
    File::create(&data).unwrap().set_len(1 << 20).unwrap();
    (metadata.clone(), Arc::new(OfflinePool::open(&metadata, &data).unwrap()))
}

#[test]
fn volumes_of_an_offline_pool_have_an_identity_and_are_watched() {
    let (mut image, _) = some_changes(4);
    let details = usize::try_from(thin_image::get(&image, 328, 8)).unwrap();
    // The transaction and the time of the creation of both.
    for (at, value) in [(8, 3), (16, 5), (24 + 8, 4), (24 + 16, 6)] {
        put(&mut image, details * BLOCK + 32 + 8 * 126 + at, value, if at % 24 == 8 { 8 } else { 4 });
    }
    stamp(&mut image, details, NODE);
    let directory = tempfile::tempdir().unwrap();
    let (metadata, pool) = offline(&image, directory.path());
    let found = pool.changes(id(1), id(2)).unwrap();
    // The last mapping is that of block 199 998.
    let size = 199_999 * BLOCK_SIZE;
    let number = IdentityValue::Number;
    let fields = [
        ("pool", IdentityValue::None),
        ("older", number(1)),
        ("newer", number(2)),
        ("older-created", number(5)),
        ("newer-created", number(6)),
        ("transaction", number(4)),
        ("size", number(size)),
        ("block-size", number(BLOCK_SIZE)),
    ];
    assert_eq!((found.identity.kind, &found.identity.fields[..]), ("thin", &fields[..]));
    assert_eq!((found.map.len(), found.map.allocated()), (Bytes::new(size), Some(Bytes::new(4 * BLOCK_SIZE))));
    assert!(found.is_current());

    let refused = |older, newer| pool.changes(id(older), id(newer)).unwrap_err();
    assert!(refused(2, 2).to_string().ends_with("cannot compare volume 2 with itself"));
    for (older, newer) in [(1, 9), (9, 1)] {
        assert_eq!(refused(older, newer).errno(), libc::ENOENT);
    }
    File::options().write(true).open(&metadata).unwrap().write_all_at(&[0], 0).unwrap();
    assert!(!found.is_current(), "the metadata was written");
    assert!(refused(1, 2).to_string().contains("it is not proven"));
}

#[test]
fn an_offline_volume_with_damage_is_refused() {
    let (mut image, own) = some_changes(4);
    image[own.start * BLOCK + 4000] ^= 4;
    let directory = tempfile::tempdir().unwrap();
    let (_, pool) = offline(&image, directory.path());
    let error = pool.changes(id(1), id(2)).unwrap_err();
    assert!(error.to_string().contains("wrong checksum"), "{error}");
}
