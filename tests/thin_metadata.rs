//! Thin metadata from real tools, and damaged metadata.
// Some devices are lists of one range.
#![allow(clippy::single_range_in_vec_init)]

use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use blkholefs::testing::map::{ExtentKind, FillMap, HoleMap};
use blkholefs::testing::source::thin::error::{Damage, ThinError, ThinResult};
use blkholefs::testing::source::thin::lookup::NodeCache;
use blkholefs::testing::source::thin::metadata::Metadata;
use blkholefs::testing::source::thin::reader::MetadataReader;
use blkholefs::testing::source::thin::{MetaBlock, ThinId};
use blkholefs::testing::units::Bytes;

mod common;
#[path = "support/thin_image.rs"]
#[allow(dead_code)]
mod thin_image;
#[path = "support/thin_mutation.rs"]
#[allow(dead_code, reason = "only the fuzz targets have inputs")]
mod thin_mutation;
use common::needs;
use thin_image::{BLOCK, Device, NODE, SUPERBLOCK, put, stamp};
use thin_mutation::Image;

const BLOCK_SIZE: u64 = thin_image::DATA_BLOCK_SECTORS as u64 * 512;

fn open(path: &Path) -> Metadata {
    Metadata::open(MetadataReader::open(path).unwrap(), MetaBlock::SUPERBLOCK).unwrap()
}

fn id(id: u32) -> ThinId {
    ThinId::new(id).unwrap()
}

/// The mapped ranges of a map, in blocks.
fn mapped(map: &FillMap) -> Vec<Range<u64>> {
    let (mut at, mut ranges) = (0, Vec::new());
    while at < map.len().get() {
        let run = map.extent_at(Bytes::new(at));
        if run.kind == ExtentKind::Data {
            ranges.push(at / BLOCK_SIZE..run.end.get() / BLOCK_SIZE);
        }
        at = run.end.get();
    }
    ranges
}

/// Compares every device's map, by one thread and by two, with the output of `thin_dump` and with the input.
fn compare(name: &str, devices: &[Device]) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("meta");
    let mappings: usize = devices.iter().map(|device| device.mappings.len()).sum();
    thin_image::restore(&thin_image::xml(devices), 1024 + mappings as u64 / 80, &image);
    let dumped = thin_image::dump(&image);
    assert_eq!(dumped.len(), devices.len());
    let metadata = open(&image);
    let ids: Vec<u32> = metadata.devices().unwrap().iter().map(|id| id.get()).collect();
    assert_eq!(ids, devices.iter().map(|device| device.id).collect::<Vec<_>>());
    for (device, (dumped_id, ranges)) in devices.iter().zip(dumped) {
        assert_eq!(device.id, dumped_id);
        assert_eq!(device.ranges(), ranges, "{name}: thin_dump of {dumped_id}");
        let len = Bytes::new((device.mappings.last().map_or(0, |(block, _)| *block) + 10) * BLOCK_SIZE);
        for threads in [1, 2] {
            let map = metadata.map(id(device.id), len, threads).unwrap();
            assert_eq!(mapped(&map), ranges, "{name}: map of {dumped_id} by {threads}");
            assert_eq!(map.allocated(), Some(Bytes::new(device.mappings.len() as u64 * BLOCK_SIZE)));
        }
        assert_eq!(metadata.details(id(device.id)).unwrap().mapped_blocks, device.mappings.len() as u64);
    }
}

/// A pseudo-random number. The sequence is the same in every run.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn maps_of_restored_metadata_equal_thin_dump() {
    needs!(programs["thin_restore", "thin_dump"]);
    compare("contiguous", &[Device::new(1, [0..200_000], 5)]);
    compare("alternating", &[Device::new(1, (0..100_000).map(|block| 2 * block..2 * block + 1), 0)]);
    let mut state = 7;
    let mut at = 0;
    let runs = (0..20_000).map(|_| {
        let start = at + 1 + random(&mut state) % 40;
        at = start + 1 + random(&mut state) % 16;
        start..at
    });
    compare("random", &[Device::new(1, runs.collect::<Vec<_>>(), 0)]);
    compare("empty", &[Device::new(0, [], 0), Device::new(7, [(1 << 40)..(1 << 40) + 3], 0)]);
    let many = (0..700).map(|at| Device::new(at * 23_000, [u64::from(at)..u64::from(at) + 3], u64::from(at) * 3));
    compare("many devices", &many.collect::<Vec<_>>());
}

/// Devices whose trees have two levels of internal nodes when built with few entries to a node.
fn some_devices() -> Vec<Device> {
    vec![
        Device::new(1, (0..60).map(|at| at * 7..at * 7 + 3), 0),
        Device::new(2, [5..6], 1000),
        Device::new(3, [], 0),
        Device::new(4, (0..10).map(|at| 100 * at..100 * at + 20), 2000),
    ]
}

/// The image's bytes as metadata.
fn of_bytes(bytes: &[u8]) -> ThinResult<Metadata> {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    Metadata::open(MetadataReader::new(file).unwrap(), MetaBlock::SUPERBLOCK)
}

fn map_of(bytes: &[u8], device: u32) -> ThinResult<FillMap> {
    of_bytes(bytes)?.map(id(device), Bytes::new(2000 * BLOCK_SIZE), 1)
}

#[test]
fn trees_made_by_hand_are_read_and_clipped_to_the_size() {
    for fill in [3, 4, 100] {
        let devices = some_devices();
        let image = thin_image::build(&devices, fill);
        for device in &devices {
            assert_eq!(mapped(&map_of(&image, device.id).unwrap()), device.ranges());
        }
        let metadata = of_bytes(&image).unwrap();
        // In the middle of the second run: the last block is partial.
        let map = metadata.map(id(1), Bytes::new(8 * BLOCK_SIZE + 512), 1).unwrap();
        assert_eq!(map.allocated(), Some(Bytes::new(4 * BLOCK_SIZE + 512)));
        assert!(matches!(metadata.map(id(9), Bytes::new(1), 1), Err(ThinError::Unknown(_))));
        assert!(matches!(metadata.details(id(9)), Err(ThinError::Unknown(_))));
    }
}

/// The nodes of the tree below `root`, top down.
fn nodes(image: &[u8], root: u64) -> Vec<usize> {
    let mut nodes = vec![usize::try_from(root).unwrap()];
    let mut at = 0;
    while at < nodes.len() {
        let node = nodes[at] * BLOCK;
        if thin_image::get(image, node + 4, 4) == 1 {
            let entries = usize::try_from(thin_image::get(image, node + 16, 4)).unwrap();
            let max = usize::try_from(thin_image::get(image, node + 20, 4)).unwrap();
            nodes.extend(
                (0..entries)
                    .map(|at| usize::try_from(thin_image::get(image, node + 32 + 8 * max + 8 * at, 8)).unwrap()),
            );
        }
        at += 1;
    }
    nodes
}

/// A change of one node: (offset, value, size).
type Change = (usize, u64, usize);

/// The first device's tree in an image with two levels of internal nodes, as its nodes; the image; the map's error
/// after `change` of the node at `index` in that list, with a right checksum.
fn damaged(index: impl Fn(&[usize]) -> usize, change: impl Fn(&[usize]) -> Change) -> Option<(usize, Damage)> {
    let mut image = thin_image::build(&some_devices(), 4);
    let metadata = of_bytes(&image).unwrap();
    let nodes = nodes(&image, metadata.mapping_tree(id(1)).unwrap().root.get());
    let number = index(&nodes);
    let (at, value, size) = change(&nodes);
    put(&mut image, number * BLOCK + at, value, size);
    stamp(&mut image, number, NODE);
    match map_of(&image, 1) {
        Err(ThinError::Damaged(block, damage)) => Some((usize::try_from(block.get()).unwrap(), damage)),
        Err(error) => panic!("{error}"),
        Ok(_) => None,
    }
}

#[test]
fn each_kind_of_damage_is_an_error_though_the_checksum_is_right() {
    let first = |nodes: &[usize]| nodes[0];
    let last = |nodes: &[usize]| *nodes.last().unwrap();
    // Of an internal node with four entries, as all here but the last of a level: the second child and key.
    let (child, key) = (32 + 8 * 252 + 8, 40);
    let in_first = |change: Change| damaged(first, move |_| change).map(|(_, damage)| damage);
    let in_last = |change: Change| damaged(last, move |_| change).map(|(_, damage)| damage);
    assert_eq!(damaged(first, |_| (28, 0, 4)), None, "a change without effect is no damage");
    assert_eq!(in_last((16, 253, 4)), Some(Damage::Entries));
    assert_eq!(in_last((16, u64::MAX, 4)), Some(Damage::Entries));
    assert_eq!(in_last((16, 0, 4)), Some(Damage::Entries));
    assert_eq!(in_first((16, 0, 4)), Some(Damage::Entries));
    assert_eq!(in_last((20, 0, 4)), Some(Damage::Entries));
    assert_eq!(in_first((20, 255, 4)), Some(Damage::Entries));
    assert_eq!(in_first((24, 0, 4)), Some(Damage::ValueSize));
    assert_eq!(in_last((24, 24, 4)), Some(Damage::ValueSize));
    for flags in [0, 3, 4, 0x8000_0001] {
        assert_eq!(in_first((4, flags, 4)), Some(Damage::Kind));
    }
    assert_eq!(in_last((8, 1, 8)), Some(Damage::Location));
    assert_eq!(in_first((key, 0, 8)), Some(Damage::KeyOrder));
    assert_eq!(in_first((key, u64::MAX, 8)), Some(Damage::KeyOrder));
    assert_eq!(in_last((32, 0, 8)), Some(Damage::KeyRange));
    // A moved separator makes keys of an adjacent child lie outside of its key range.
    assert_eq!(in_first((key, 1, 8)), Some(Damage::KeyRange));
    assert_eq!(in_first((32, 1, 8)), Some(Damage::KeyRange));
    for pointer in [0, u64::from(u32::MAX), u64::MAX, 1 << 40] {
        assert_eq!(in_first((child, pointer, 8)), Some(Damage::Pointer), "{pointer}");
    }
    // Another device's leaf, in order and with a right checksum, but of other keys.
    let foreign = damaged(first, |nodes| (child, *nodes.iter().max().unwrap() as u64 + 1, 8));
    assert!(matches!(foreign, Some((_, Damage::KeyRange | Damage::Kind))), "{foreign:?}");
    let looping = damaged(first, |nodes| (child - 8, nodes[0] as u64, 8));
    assert_eq!(looping.map(|(_, damage)| damage), Some(Damage::Twice));
    assert_eq!(damaged(first, |nodes| (child, nodes[1] as u64, 8)).map(|(_, damage)| damage), Some(Damage::Twice));
    // A leaf where its level has internal nodes.
    assert!(matches!(
        damaged(first, |nodes| (child, *nodes.last().unwrap() as u64, 8)),
        Some((_, Damage::Kind | Damage::KeyRange))
    ));
}

#[test]
fn leaves_of_unequal_depth_are_an_error() {
    // Four leaves in key order below a root whose last child is an internal node over the fourth.
    let mut image = thin_image::build(&[Device::new(1, [0..16], 0)], 4);
    let root = usize::try_from(of_bytes(&image).unwrap().mapping_tree(id(1)).unwrap().root.get()).unwrap();
    let last_child = root * BLOCK + 32 + 8 * 252 + 8 * 3;
    let leaf = thin_image::get(&image, last_child, 8);
    let number = image.len() / BLOCK;
    let mut node = image[root * BLOCK..][..BLOCK].to_vec();
    put(&mut node, 8, number as u64, 8);
    put(&mut node, 16, 1, 4);
    put(&mut node, 32, 12, 8);
    put(&mut node, 32 + 8 * 252, leaf, 8);
    image.extend(node);
    stamp(&mut image, number, NODE);
    put(&mut image, last_child, number as u64, 8);
    stamp(&mut image, root, NODE);
    put(&mut image, 344, number as u64 + 1, 8);
    stamp(&mut image, 0, SUPERBLOCK);
    assert!(matches!(map_of(&image, 1), Err(ThinError::Damaged(_, Damage::Kind))));
}

#[test]
fn a_chain_of_nodes_deeper_than_any_tree_is_an_error() {
    // A chain of internal nodes with one child each, longer than any tree is deep.
    let mut image = thin_image::build(&[Device::new(1, [0..1], 0)], 4);
    let leaf = of_bytes(&image).unwrap().mapping_tree(id(1)).unwrap().root.get();
    let top = usize::try_from(thin_image::get(&image, 320, 8)).unwrap();
    let mut child = leaf;
    for _ in 0..70 {
        let number = image.len() / BLOCK;
        image.extend_from_within(top * BLOCK..(top + 1) * BLOCK);
        for (at, value, size) in [(4, 1, 4), (8, number as u64, 8), (32, 0, 8), (32 + 8 * 252, child, 8)] {
            put(&mut image, number * BLOCK + at, value, size);
        }
        stamp(&mut image, number, NODE);
        child = number as u64;
    }
    put(&mut image, top * BLOCK + 32 + 8 * 252, child, 8);
    stamp(&mut image, top, NODE);
    let blocks = (image.len() / BLOCK) as u64;
    put(&mut image, 344, blocks, 8);
    stamp(&mut image, 0, SUPERBLOCK);
    assert!(matches!(map_of(&image, 1), Err(ThinError::Damaged(_, Damage::Depth))));
}

#[test]
fn a_wrong_count_or_root_is_an_error() {
    let image = thin_image::build(&some_devices(), 100);
    let details = usize::try_from(thin_image::get(&image, 328, 8)).unwrap();
    let mut counted = image.clone();
    put(&mut counted, details * BLOCK + 32 + 8 * 126, 181, 8);
    stamp(&mut counted, details, NODE);
    let error = map_of(&counted, 1).err().unwrap();
    assert!(matches!(error, ThinError::Miscounted { found: 180, stated: 181, .. }), "{error}");

    let top = usize::try_from(thin_image::get(&image, 320, 8)).unwrap();
    for root in [0, 1 << 30, u64::MAX] {
        let mut lost = image.clone();
        put(&mut lost, top * BLOCK + 32 + 8 * 252, root, 8);
        stamp(&mut lost, top, NODE);
        assert!(matches!(map_of(&lost, 1), Err(ThinError::Damaged(_, Damage::Pointer))));
        assert!(map_of(&lost, 2).is_ok());
        assert_eq!(of_bytes(&lost).unwrap().devices().unwrap().len(), 4, "the other devices are listed");
    }
    // One wrong byte anywhere in the tree.
    for block in [top, details, nodes(&image, thin_image::get(&image, top * BLOCK + 32 + 8 * 252, 8))[0]] {
        let mut rotten = image.clone();
        rotten[block * BLOCK + 4000] ^= 4;
        assert!(matches!(map_of(&rotten, 1), Err(ThinError::Damaged(_, Damage::Checksum))));
    }
    // The device ends before a node.
    let short = &image[..top * BLOCK];
    assert!(matches!(map_of(short, 1), Err(ThinError::Io(..))));
}

/// The quick and repeatable form of the fuzz target `thin_metadata`.
#[test]
fn mutated_metadata_is_an_error_or_a_map() {
    let (mut state, mut maps, mut total) = (1, 0, 0);
    for fill in [3, 4, 9, 100] {
        let whole = thin_image::build(&some_devices(), fill);
        let len = whole.len();
        let mut image = Image::new(whole);
        let of_whole = image.read_edited(&[], None);
        assert_eq!(of_whole, 4);
        for round in 0..150 {
            let edits: Vec<_> = (0..1 + round % 4).map(|_| random(&mut state).to_le_bytes()).collect();
            maps += image.read_edited(&edits, None);
            total += of_whole;
        }
        assert_eq!(image.read_edited(&[], Some(100)), 0);
        image.read_edited(&[], Some(len / 2));
        assert_eq!(image.read_edited(&[], None), of_whole, "all changes were taken back");
    }
    // Most changes damage only one tree.
    assert!(total / 10 < maps && maps < total, "{maps} of {total}");
}

#[test]
fn a_walk_reads_in_few_requests_and_a_lookup_in_one_for_each_level() {
    // The nodes of two devices are interleaved. A request also reads blocks of the other device, so that it is not
    // split.
    let blocks = |device: u64| (0..3000).map(move |at| 2 * at + device..2 * at + device + 1);
    let mut image = thin_image::build(&[Device::new(1, blocks(0), 0), Device::new(2, blocks(1), 3000)], 9);
    let (one, two) = (tree_of(&image, 1), tree_of(&image, 2));
    assert_eq!((one.len(), one.len()), (two.len(), 334 + 38 + 5 + 1));
    thin_image::interleave(&mut image, &one, &two);
    let metadata = of_bytes(&image).unwrap();
    for device in [1, 2] {
        metadata.details(id(device)).unwrap();
        metadata.mapping_tree(id(device)).unwrap();
        let before = metadata.reader().reads();
        let map = metadata.map(id(device), Bytes::new(6000 * BLOCK_SIZE), 1).unwrap();
        assert_eq!(mapped(&map), blocks(u64::from(device) - 1).collect::<Vec<_>>());
        // One for each level of internal nodes, and 668 blocks of leaves by the 254.
        assert_eq!(metadata.reader().reads() - before, 3 + 3, "device {device}");
    }
    let cache = NodeCache::new(NonZeroUsize::new(1000).unwrap());
    let tree = metadata.mapping_tree(id(1)).unwrap();
    for (key, found, reads) in [(3001, Some(3002), 4), (3003, Some(3004), 0), (5998, Some(5998), 3), (5999, None, 0)] {
        let before = metadata.reader().reads();
        let next = tree.next(key, metadata.reader(), &cache).unwrap();
        assert_eq!(next.map(|(key, _)| key), found);
        assert_eq!(metadata.reader().reads() - before, reads, "look-up of {key}");
    }
}

/// An image of a device whose tree has five internal nodes, each right after its 126 leaves, the device, and the nodes
/// in the order on disk.
fn parents_after_children() -> (Vec<u8>, Device, Vec<usize>) {
    let device = Device::new(1, (0..5 * 126 * 126).map(|at| 2 * at..2 * at + 1), 0);
    let mut image = thin_image::build(std::slice::from_ref(&device), 126);
    let tree = tree_of(&image, 1);
    assert_eq!(tree.len(), 1 + 5 + 5 * 126);
    let (parents, leaves) = tree[1..].split_at(5);
    let groups = leaves.chunks(126).zip(parents).flat_map(|(leaves, parent)| leaves.iter().chain([parent]));
    thin_image::arrange(&mut image, &groups.chain([&tree[0]]).copied().collect::<Vec<_>>());
    let mut order = tree;
    order.sort_unstable();
    (image, device, order)
}

#[test]
fn children_before_their_parent_are_read_with_it() {
    let (image, device, order) = parents_after_children();
    let len = Bytes::new(2 * device.mappings.len() as u64 * BLOCK_SIZE);
    for threads in [1, 2] {
        let metadata = of_bytes(&image).unwrap();
        metadata.details(id(1)).unwrap();
        metadata.mapping_tree(id(1)).unwrap();
        let before = metadata.reader().reads();
        assert_eq!(mapped(&metadata.map(id(1), len, threads).unwrap()), device.ranges());
        let reads = metadata.reader().reads() - before;
        // The root, the first of the internal nodes, the others by twos with their leaves, and the leaves of the first.
        assert!(reads == 1 + 1 + 2 + 1 || threads == 2 && reads < 10, "{reads} by {threads}");
    }

    // The first leaf of the third internal node, which is read with that.
    let leaf = order[2 * 127];
    let damage = |at: usize, value: u64, size: usize, threads| {
        let mut image = image.clone();
        put(&mut image, leaf * BLOCK + at, value, size);
        stamp(&mut image, leaf, NODE);
        match of_bytes(&image).unwrap().map(id(1), len, threads) {
            Err(ThinError::Damaged(block, damage)) => (block.get(), damage),
            other => panic!("{:?}", other.map(|map| map.allocated())),
        }
    };
    assert_eq!(damage(4, 1, 4, 1), (leaf as u64, Damage::Kind));
    // Of two nodes of one level and unequal kinds, the one that is read later is named.
    assert_eq!(damage(4, 1, 4, 2).1, Damage::Kind);
    for threads in [1, 2] {
        assert_eq!(damage(8, 1, 8, threads), (leaf as u64, Damage::Location));
        assert_eq!(damage(16, 0, 4, threads), (leaf as u64, Damage::Entries));
        assert_eq!(damage(32, 0, 8, threads), (leaf as u64, Damage::KeyRange));
    }
}

/// The nodes of a device's tree, top down.
fn tree_of(image: &[u8], device: u32) -> Vec<usize> {
    nodes(image, of_bytes(image).unwrap().mapping_tree(id(device)).unwrap().root.get())
}

#[test]
fn volumes_that_share_leaves_have_their_own_maps() {
    let devices = [Device::new(1, [0..20], 0), Device::new(2, [0..20, 30..35], 0), Device::new(3, [0..20], 0)];
    let mut image = thin_image::build(&devices, 5);
    let roots = [1, 2, 3].map(|device| tree_of(&image, device)[0]);
    let (one, two) = (roots[0] * BLOCK, roots[1] * BLOCK);
    // The second device's own leaf is its last; the third is a snapshot that was not written to.
    image.copy_within(one + 32 + 8 * 252..one + 32 + 8 * 256, two + 32 + 8 * 252);
    stamp(&mut image, roots[1], NODE);
    let top = usize::try_from(thin_image::get(&image, 320, 8)).unwrap();
    put(&mut image, top * BLOCK + 32 + 8 * 254, roots[0] as u64, 8);
    stamp(&mut image, top, NODE);
    assert_eq!(tree_of(&image, 2)[1..5], tree_of(&image, 1)[1..]);
    assert_eq!(tree_of(&image, 3), tree_of(&image, 1));
    for device in &devices {
        assert_eq!(mapped(&map_of(&image, device.id).unwrap()), device.ranges(), "device {}", device.id);
    }
}
