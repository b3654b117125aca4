// A test case is a list of ranges, and a list of one is one too.
#![allow(clippy::single_range_in_vec_init)]

use super::*;
use crate::map::ExtentKind::{Data, Hole};
use crate::map::{next_data_by_extents, next_hole_by_extents, view};
use proptest::prelude::*;

fn build(len: u64, block_size: u64, ranges: &[Range<u64>]) -> FillMap {
    let builder = FillBuilder::new(Bytes::new(len), Bytes::new(block_size));
    let mut filler = builder.filler();
    for range in ranges {
        filler.set_range(Block(range.start)..Block(range.end));
    }
    drop(filler);
    builder.finish().expect("within the limit")
}

/// All runs, checked to be maximal and to cover the device.
fn runs(map: &FillMap) -> Vec<(u64, u64, ExtentKind)> {
    let (mut at, mut runs) = (0, Vec::new());
    while at < map.len().get() {
        let run = map.extent_at(Bytes::new(at));
        assert!(run.end.get() > at && run.end <= map.len());
        assert!(runs.last().is_none_or(|(_, _, kind)| *kind != run.kind), "two runs of one kind at {at}");
        runs.push((at, run.end.get(), run.kind));
        at = run.end.get();
    }
    runs
}

fn model(blocks: u64, ranges: &[Range<u64>]) -> Vec<bool> {
    let mut model = vec![false; blocks as usize];
    for range in ranges {
        for block in range.start..range.end.min(blocks) {
            model[block as usize] = true;
        }
    }
    model
}

/// Compares counts, the n-th mapped block, and words of 64 blocks with the model: near each edge of it, and at many others.
fn check_ranks(map: &FillMap, model: &[bool]) {
    let mut rank = 0;
    for (block, mapped) in (0..).zip(model) {
        let near_edge = model[(block as usize).saturating_sub(1)..].iter().take(3).any(|other| other != mapped);
        if near_edge || block % 1009 == 0 || block % CHUNK == 0 {
            assert_eq!(map.mapped_before(Block(block)), rank, "before {block}");
            assert!(!mapped || map.nth_mapped(rank) == Some(Block(block)), "block {block} is number {rank}");
        }
        rank += u64::from(*mapped);
    }
    assert_eq!((map.mapped(), map.nth_mapped(rank), map.nth_mapped(u64::MAX)), (rank, None, None));
    let end = model.len() as u64;
    for beyond in [end, end + 1, end + 3 * CHUNK, u64::MAX] {
        assert_eq!(map.mapped_before(Block(beyond)), rank, "before {beyond}");
    }
    for (word, blocks) in (0..).zip(model.chunks(64)).step_by(5) {
        let bits = blocks.iter().rev().fold(0, |bits, mapped| bits << 1 | u64::from(*mapped));
        assert_eq!(map.word(word), bits, "word {word}");
    }
    assert_eq!((map.word(end.div_ceil(64)), map.word(u64::MAX / 64)), (0, 0));
}

/// Compares every lookup at the edges of the model's runs, one to each side, with the model.
fn check(map: &FillMap, model: &[bool], len: u64, block_size: u64) {
    let allocated: u64 = (0u64..)
        .zip(model)
        .filter(|(_, mapped)| **mapped)
        .map(|(block, _)| ((block + 1) * block_size).min(len) - block * block_size)
        .sum();
    assert_eq!(map.allocated(), Some(Bytes::new(allocated)));
    assert_eq!(map.mapped, model.iter().filter(|mapped| **mapped).count() as u64);
    check_ranks(map, model);
    let mut want = Vec::new();
    let mut at = 0;
    for run in model.chunk_by(|a, b| a == b) {
        let end = at + run.len() as u64;
        want.push((at * block_size, (end * block_size).min(len), if run[0] { Data } else { Hole }));
        at = end;
    }
    assert_eq!(runs(map), want);
    for (start, end, kind) in want {
        for offset in [start, start + 1, (start + end) / 2, end - 1] {
            if offset < end {
                let offset = Bytes::new(offset);
                assert_eq!(map.extent_at(offset), Extent { end: Bytes::new(end), kind }, "at {offset}");
                assert_eq!(map.next_data(offset), next_data_by_extents(map, offset), "at {offset}");
                assert_eq!(map.next_hole(offset), next_hole_by_extents(map, offset), "at {offset}");
                for start in [0, offset.get() / 3, start] {
                    let range = Bytes::new(start)..offset;
                    let runs = view::runs(map, map.block_size, range.clone());
                    let data = runs.filter(|(_, run)| run.kind.is_data());
                    let data: u64 = data.map(|(start, run)| run.end.get() - start.get()).sum();
                    let count = view::count_data(map, map.block_size, &range);
                    assert_eq!(count, Some(Bytes::new(data)), "{range:?}");
                }
            }
        }
    }
}

#[test]
fn an_empty_device_and_a_device_without_mappings() {
    let none = build(0, 65536, &[0..9]);
    assert_eq!((none.allocated(), none.mapped), (Some(Bytes::ZERO), 0));
    assert_eq!(none.extent_at(Bytes::ZERO), Extent { end: Bytes::new(1), kind: Data });
    let hole = build(u64::MAX, 65536, &[]);
    assert_eq!(hole.extent_at(Bytes::ZERO), Extent { end: Bytes::MAX, kind: Hole });
    assert_eq!(hole.allocated(), Some(Bytes::ZERO));
    assert!(hole.memory() < Bytes::new(1024));
}

#[test]
fn boundaries_of_words_and_chunks() {
    let edges = [0, 1, 63, 64, 65, 4095, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK];
    let blocks = 3 * CHUNK + 7;
    let len = blocks * 3 - 1;
    for start in edges {
        for end in edges.into_iter().chain([blocks - 1, blocks, blocks + 1]).filter(|end| *end > start) {
            check(&build(len, 3, &[start..end]), &model(blocks, &[start..end]), len, 3);
        }
    }
}

#[test]
fn sizes_near_the_largest() {
    // The last block is partial, mapped, and its end does not fit in 64 bits.
    let (len, size) = (u64::MAX, 65536);
    let last = len.div_ceil(size) - 1;
    let map = build(len, size, &[0..1, last - 1..last + 5]);
    assert_eq!(runs(&map), [(0, size, Data), (size, (last - 1) * size, Hole), ((last - 1) * size, len, Data)]);
    assert_eq!(map.allocated(), Some(Bytes::new(2 * size + (len - last * size))));
    assert!(map.memory() < Bytes::new(16 << 10));
    let full = build(len, size, &[0..u64::MAX]);
    assert_eq!(runs(&full), [(0, len, Data)]);
    assert_eq!(full.allocated(), Some(Bytes::MAX));
    assert!(full.memory() < Bytes::new(16 << 10));
}

#[test]
fn memory_is_bounded_by_the_size_and_by_the_limit() {
    let blocks = 40 * CHUNK;
    let alternating: Vec<_> = (0..blocks).step_by(2).map(|block| block..block + 1).collect();
    let map = build(blocks * 65536, 65536, &alternating);
    assert_eq!(map.mapped, blocks / 2);
    assert!(map.memory().get() * 8 < blocks * 11 / 10, "{} bytes for {blocks} blocks", map.memory());

    let mut builder = FillBuilder::new(Bytes::MAX, Bytes::new(512));
    builder.max_chunks = 3;
    let mut filler = builder.filler();
    for at in 0..4 {
        filler.set_range(Block(at * CHUNK + 1)..Block(at * CHUNK + 2));
    }
    drop(filler);
    assert!(builder.finish().is_none());
}

#[test]
fn two_threads_fill_one_map() {
    let builder = FillBuilder::new(Bytes::new(5 * CHUNK), Bytes::new(1));
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let builder = &builder;
            scope.spawn(move || {
                let mut filler = builder.filler();
                for block in (thread..5 * CHUNK).step_by(2) {
                    filler.set_range(Block(block)..Block(block + 1));
                }
            });
        }
    });
    let map = builder.finish().expect("within the limit");
    assert_eq!(runs(&map), [(0, 5 * CHUNK, Data)]);
}

fn ranges(blocks: u64) -> impl Strategy<Value = Vec<Range<u64>>> {
    let edge = prop_oneof![
        0..blocks + 70,
        (0..blocks / 64 + 1).prop_map(|word| word * 64),
        (0..blocks / CHUNK + 1).prop_map(|chunk| chunk * CHUNK)
    ];
    let range = (edge, prop_oneof![4 => 1..5u64, 2 => 1..200u64, 1 => 1..3 * CHUNK]);
    proptest::collection::vec(range.prop_map(|(start, count)| start..start + count), 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn ranges_in_any_order_equal_the_model(
        (blocks, ranges) in (1..4 * CHUNK).prop_flat_map(|blocks| (Just(blocks), ranges(blocks))),
        block_size in 1..9u64,
        cut in 0..9u64,
    ) {
        let len = blocks * block_size - cut % block_size;
        check(&build(len, block_size, &ranges), &model(blocks, &ranges), len, block_size);
    }

    #[test]
    fn ascending_lists_equal_the_model(
        blocks in 1..2 * CHUNK,
        lists in proptest::collection::vec(
            (0..3 * CHUNK, proptest::collection::vec(prop_oneof![3 => Just(1), 1 => 1..300u64], 0..252)), 0..20),
    ) {
        let builder = FillBuilder::new(Bytes::new(blocks), Bytes::new(1));
        let mut filler = builder.filler();
        let mut model = vec![false; blocks as usize];
        for (start, steps) in lists {
            let list: Vec<u64> = steps.iter().scan(start, |at, step| { *at += step; Some(*at) }).collect();
            filler.set_ascending(list.iter().map(|block| Block(*block)));
            for block in list.into_iter().filter(|block| *block < blocks) {
                model[block as usize] = true;
            }
        }
        drop(filler);
        check(&builder.finish().expect("within the limit"), &model, blocks, 1);
    }
}
