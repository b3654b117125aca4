//! Compares the maps with the model.

mod lookups;

use std::sync::Arc;

use proptest::prelude::*;

use super::ExtentKind::{Data, Free, Hole, Unchanged};
use super::model::{ExpectedRuns, LeafMap, MapTree, common_kind, map_trees};
use super::view::{self, Whence};
use super::{Clip, Concat, Extent, ExtentKind, HoleMap, Overlay, Stripe, Uniform, Unstripe};
use crate::units::Bytes;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const ALIGN: Bytes = Bytes::new(4096);

/// All sequences of `len` blocks of the given kinds.
fn patterns(len: u32, kinds: &[ExtentKind]) -> impl Iterator<Item = Vec<ExtentKind>> {
    let kind = |number: usize, place| kinds[number / kinds.len().pow(place) % kinds.len()];
    (0..kinds.len().pow(len)).map(move |number| (0..len).map(|place| kind(number, place)).collect())
}

const TWO_KINDS: [ExtentKind; 2] = [Data, Hole];
const ALL_KINDS: [ExtentKind; 4] = [Data, Hole, Unchanged, Free];

fn leaf(blocks: &[ExtentKind]) -> MapTree {
    MapTree::Leaf { blocks: blocks.iter().map(|&kind| (kind, false)).collect(), counted: true }
}

fn uniform(len: u64, kind: ExtentKind) -> Arc<dyn HoleMap> {
    Arc::new(Uniform { len: Bytes::new(len), kind })
}

/// Every map of up to ten blocks of two kinds, and of up to five blocks of all kinds, in units of one to four blocks.
#[test]
fn the_view_of_every_small_map() {
    let of_two_kinds = (0..=10).flat_map(|len| patterns(len, &TWO_KINDS));
    let of_all_kinds = (0..=5).flat_map(|len| patterns(len, &ALL_KINDS));
    for blocks in of_two_kinds.chain(of_all_kinds) {
        let tree = leaf(&blocks);
        for align in 1..=4 {
            let units = blocks.chunks(align);
            let by_unit = ExpectedRuns::new(units.map(|unit| (unit.len() as u64, common_kind(unit.iter().copied()))));
            assert_eq!(tree.runs(1).aligned(align as u64), by_unit, "the model contradicts itself");
            tree.runs(1).check_view(&*tree.build(1), align as u64);
        }
    }
}

fn check_compositions(first: &[ExtentKind], second: &[ExtentKind]) {
    let parts = || vec![leaf(first), leaf(second)];
    let both = MapTree::Concat(parts());
    let mut trees = vec![both.clone(), MapTree::Overlay { layers: parts(), len: 6 }];
    for chunk in 1..=3 {
        trees.extend([5, 8, 9, 12].map(|len| MapTree::Stripe { legs: parts(), chunk, len }));
        let inner = Box::new(both.clone());
        trees.push(MapTree::Unstripe { inner, chunk, stripes: 2, index: chunk % 2, len: 5 });
    }
    trees.extend([0, 3, 8].map(|start| MapTree::Clip { inner: Box::new(both.clone()), start, len: 4 }));
    for tree in trees {
        tree.runs(1).check(&*tree.build(1));
        tree.runs(1).check_view(&*tree.build(1), 2);
    }
}

#[test]
fn every_small_stripe_overlay_and_concatenation() {
    for (first_len, second_len, kinds) in [(4, 5, &TWO_KINDS[..]), (2, 3, &ALL_KINDS)] {
        for first in patterns(first_len, kinds) {
            patterns(second_len, kinds).for_each(|second| check_compositions(&first, &second));
        }
    }
}

/// Checks `blocks` of `size` bytes each, which follow `lead` bytes of one kind.
fn check_after(lead: u64, kind: ExtentKind, blocks: &[ExtentKind], size: u64) {
    let tree = leaf(blocks);
    let expected = ExpectedRuns::new([(lead, kind)].into_iter().chain(blocks.iter().map(|&kind| (size, kind))));
    let map = Concat::new(vec![uniform(lead, kind), tree.build(size)]).expect("fits");
    expected.check(&map);
    for align in [512, 4096, 65536] {
        expected.check_view(&map, align);
    }
}

#[test]
fn positions_of_every_size() {
    let blocks = [Hole, Hole, Data, Hole, Data, Data, Hole, Hole, Hole, Hole, Hole, Hole, Data, Hole, Hole, Hole];
    let near = |place: u64| [place - 8192, place - 1000, place, place + 1];
    let places = [1 << 20, 2 * GIB, 4 * GIB, 16 * TIB, (1 << 63) - 20000, 1 << 63].into_iter().flat_map(near);
    for (lead, size) in places.flat_map(|place| [(place, 512), (place, 1000), (place, 4096)]) {
        for kind in [Data, Hole] {
            check_after(lead, kind, &blocks, size);
        }
    }
    for (size, spare) in
        [512, 1000, 4096].into_iter().flat_map(|size| [(size, 0), (size, 1), (size, 4095), (size, 5000)])
    {
        for kind in [Data, Hole] {
            check_after(u64::MAX - spare - size * 16, kind, &blocks, size);
            check_after(u64::MAX - spare - size * 14, kind, &blocks[..14], size);
            check_after(u64::MAX - spare - size * 13, kind, &blocks[..13], size);
        }
    }
}

proptest! {
    /// Any stack of maps, with blocks of any size up to the largest that fits in 64 bits.
    #[test]
    fn any_stack_equals_its_definition(tree in map_trees(), odd in 0..5000_u64, align in 1..9_u64) {
        let blocks = tree.blocks().len().max(1) as u64;
        prop_assume!(blocks < 2000);
        let expected = tree.runs(1);
        let map = tree.build(1);
        expected.check(&*map);
        expected.check_view(&*map, align);
        // A part of the stack may be longer than the stack: the largest scale is that of the longest part.
        let largest = u64::MAX / longest(&tree).max(1);
        for scale in [512, 1000, 4096, 4096 + odd, GIB, TIB + odd, largest - odd, largest] {
            let scale = scale.min(largest);
            let map = tree.build(scale);
            let expected = tree.runs(scale);
            expected.check(&*map);
            expected.check_view(&*map, 4096);
        }
    }
}

/// The most blocks that any part of a stack has.
fn longest(tree: &MapTree) -> u64 {
    let parts = match tree {
        MapTree::Uniform { .. } | MapTree::Leaf { .. } => 0,
        MapTree::Clip { inner, .. } | MapTree::Unstripe { inner, .. } => longest(inner),
        MapTree::Concat(parts) | MapTree::Overlay { layers: parts, .. } | MapTree::Stripe { legs: parts, .. } => {
            parts.iter().map(longest).max().unwrap_or(0)
        }
    };
    parts.max(tree.blocks().len() as u64)
}

/// The answers for the last byte and for the end.
#[test]
fn the_end_of_the_device() {
    for size in [4096 * 3, 4096 * 3 + 512, 4096 * 3 + 1] {
        let tail = size - 4096 * 2;
        let (last, end) = (Bytes::new(size - 1), Bytes::new(size));
        let data = LeafMap::new([(4096, Data), (4096, Hole), (tail, Data)]);
        assert_eq!(view::seek(&data, ALIGN, last, Whence::Data), Some(last));
        assert_eq!(view::seek(&data, ALIGN, last, Whence::Hole), Some(end));
        let hole = LeafMap::new([(4096 * 2, Data), (tail, Hole)]);
        assert_eq!(view::seek(&hole, ALIGN, last, Whence::Data), None);
        assert_eq!(view::seek(&hole, ALIGN, last, Whence::Hole), Some(last));
        for (map, whence) in
            [(&data, Whence::Data), (&data, Whence::Hole), (&hole, Whence::Data), (&hole, Whence::Hole)]
        {
            for offset in [end, Bytes::new(size + 1), Bytes::new(1 << 63), Bytes::MAX] {
                assert_eq!(view::seek(map, ALIGN, offset, whence), None);
            }
        }
    }
}

#[test]
fn an_empty_device_has_nothing() {
    let maps: [&dyn HoleMap; 3] = [
        &Uniform { len: Bytes::ZERO, kind: Hole },
        &Concat::new(Vec::new()).expect("no length"),
        &Overlay { layers: Vec::new(), len: Bytes::ZERO },
    ];
    for map in maps {
        assert!(map.is_empty());
        assert!(!view::has_hole(map, ALIGN));
        assert_eq!(view::seek(map, ALIGN, Bytes::ZERO, Whence::Hole), None);
        assert_eq!(view::runs(map, ALIGN, Bytes::ZERO..Bytes::MAX).count(), 0);
        assert_eq!(map.dense_because(), None);
    }
}

#[test]
fn no_alignment_is_one_byte() {
    let map = LeafMap::new([(3, Data), (2, Hole), (1, Data)]);
    assert_eq!(view::seek(&map, Bytes::ZERO, Bytes::ZERO, Whence::Hole), Some(Bytes::new(3)));
    assert_eq!(view::seek(&map, Bytes::ZERO, Bytes::new(3), Whence::Data), Some(Bytes::new(5)));
}

#[test]
fn holes_are_rounded_inwards() {
    let map = LeafMap::new([(512, Data), (8192, Hole), (512, Data), (7168, Hole), (4096, Data), (4095, Hole)]);
    let found: Vec<_> = view::runs(&map, ALIGN, Bytes::ZERO..Bytes::MAX)
        .map(|(start, run)| (start.get(), run.end.get(), run.kind))
        .collect();
    assert_eq!(
        found,
        [
            (0, 4096, Data),
            (4096, 8192, Hole),
            (8192, 12288, Data),
            (12288, 16384, Hole),
            (16384, 20480, Data),
            (20480, 24575, Hole)
        ]
    );
    let tail = Bytes::new(8200);
    assert_eq!(view::seek(&map, ALIGN, tail, Whence::Data), Some(tail), "a rounded-off end of a hole is data");
    let odd = LeafMap::new([(9000, Data), (1000, Hole)]);
    assert!(!view::has_hole(&odd, ALIGN), "the last hole has no whole unit");
}

/// The layouts that are tested by the kernel patches of 2024 for SEEK_HOLE on block devices, in one piece and through two
/// segments.
#[test]
fn the_layouts_of_the_kernel_series() {
    let sparse =
        [(4 * KIB, Data), (256 * MIB - 4 * KIB, Hole), (64 * KIB, Data), (767 * MIB + 959 * KIB, Hole), (KIB, Data)];
    let two = [
        (128 * MIB, Hole),
        (4 * KIB, Data),
        (384 * MIB - 4 * KIB, Hole),
        (64 * KIB, Data),
        (512 * MIB - 64 * KIB, Hole),
    ];
    let layouts: [&[(u64, ExtentKind)]; 4] = [&sparse, &two, &[(MIB, Data)], &[(GIB, Hole)]];
    for layout in layouts {
        let expected = ExpectedRuns::new(layout.iter().copied());
        let whole: Arc<dyn HoleMap> = Arc::new(LeafMap::new(layout.iter().copied()));
        expected.check_view(&*whole, 4096);
        let len = whole.len();
        for middle in [4096, 512 * KIB, 512 * KIB + 512].map(Bytes::new) {
            let clip = |start: Bytes, end: Bytes| -> Arc<dyn HoleMap> {
                Arc::new(Clip { inner: whole.clone(), start, len: end.saturating_sub(start) })
            };
            let segments = Concat::new(vec![clip(Bytes::ZERO, middle), clip(middle, len)]).expect("fits");
            expected.check(&segments);
            expected.check_view(&segments, 4096);
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    assert!(Concat::new(vec![uniform(u64::MAX, Hole), uniform(1, Hole)]).is_none());
    assert!(Stripe::new(Vec::new(), ALIGN, ALIGN).is_none());
    assert!(Stripe::new(vec![uniform(1, Hole)], Bytes::ZERO, ALIGN).is_none());
    assert!(Unstripe::new(uniform(1, Hole), ALIGN, 2, 2, ALIGN).is_none());
    assert!(Unstripe::new(uniform(1, Hole), ALIGN, 0, 0, ALIGN).is_none());
    assert!(Unstripe::new(uniform(1, Hole), Bytes::ZERO, 2, 0, ALIGN).is_none());
    let far = Clip { inner: uniform(u64::MAX, Hole), start: Bytes::new(u64::MAX - 1), len: Bytes::new(10) };
    ExpectedRuns::new([(1, Hole), (9, Data)]).check(&far);
}

#[test]
fn reasons_and_sizes_of_compositions() {
    let dense = || -> Arc<dyn HoleMap> { Arc::new(LeafMap::new([(4096, Data)])) };
    let mixed = || -> Arc<dyn HoleMap> { Arc::new(LeafMap::new([(1024, Data), (3072, Hole)])) };
    let reason = Some("all data".into());
    let concat = |parts| Concat::new(parts).expect("fits");
    let stripe = |legs| Stripe::new(legs, Bytes::new(512), Bytes::new(8192)).expect("has legs");
    let overlay = |layers| Overlay { layers, len: Bytes::new(4096) };
    assert_eq!(concat(vec![dense(), dense()]).dense_because(), reason);
    assert_eq!(concat(vec![dense(), uniform(0, Hole)]).dense_because(), reason, "an empty segment does not count");
    assert_eq!(concat(vec![dense(), mixed()]).dense_because(), None);
    assert_eq!(stripe(vec![dense(), dense()]).dense_because(), reason);
    assert_eq!(stripe(vec![mixed(), dense()]).dense_because(), None);
    assert_eq!(overlay(vec![mixed(), dense()]).dense_because(), reason);
    assert_eq!(overlay(vec![mixed(), mixed()]).dense_because(), None);
    let clip = Clip { inner: mixed(), start: Bytes::new(4096), len: Bytes::new(512) };
    assert!(clip.dense_because().is_some_and(|reason| reason.to_string().contains("beyond")));
    assert_eq!(concat(vec![dense(), mixed()]).allocated(), Some(Bytes::new(5120)));
    assert_eq!(stripe(vec![dense(), mixed()]).allocated(), Some(Bytes::new(5120)));
    assert_eq!(overlay(vec![uniform(4096, Hole), mixed()]).allocated(), Some(Bytes::new(1024)));
    assert_eq!(overlay(vec![mixed(), mixed()]).allocated(), None);
    assert_eq!(overlay(vec![mixed(), dense()]).allocated(), Some(Bytes::new(4096)));
    assert_eq!(overlay(vec![mixed(), mixed()]).memory(), Bytes::new(2));
}

/// A map that returns one invalid extent for every offset from `from` on.
struct InvalidMap {
    from: u64,
    answer: Extent,
}

const INVALID_LEN: u64 = 64 * TIB;

impl HoleMap for InvalidMap {
    fn len(&self) -> Bytes {
        Bytes::new(INVALID_LEN)
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        if offset < Bytes::new(self.from) { Extent { end: Bytes::new(self.from), kind: Hole } } else { self.answer }
    }
}

#[test]
fn an_invalid_answer_is_data_to_the_end() {
    for from in [0, MIB, INVALID_LEN - 1] {
        let ends = [0, from.saturating_sub(1), from, INVALID_LEN + 1, u64::MAX];
        for answer in ends.into_iter().flat_map(|end| [Data, Hole].map(|kind| Extent { end: Bytes::new(end), kind })) {
            let invalid: Arc<dyn HoleMap> = Arc::new(InvalidMap { from, answer });
            let expected = ExpectedRuns::new([(from, Hole), (INVALID_LEN - from, Data)]);
            expected.check_view(&*invalid, 4096);
            let len = Bytes::new(INVALID_LEN);
            let over: [Arc<dyn HoleMap>; 5] = [
                Arc::new(Clip { inner: invalid.clone(), start: Bytes::ZERO, len }),
                Arc::new(Concat::new(vec![invalid.clone()]).expect("fits")),
                Arc::new(Overlay { layers: vec![uniform(INVALID_LEN, Hole), invalid.clone()], len }),
                Arc::new(Stripe::new(vec![invalid.clone()], Bytes::new(65536), len).expect("has a leg")),
                Arc::new(Unstripe::new(invalid.clone(), Bytes::new(65536), 1, 0, len).expect("has a leg")),
            ];
            for map in over {
                expected.check(&*map);
                expected.check_view(&*map, 4096);
            }
        }
    }
}

fn runs_of(map: &dyn HoleMap) -> Vec<(u64, u64, ExtentKind)> {
    let runs = view::runs(map, ALIGN, Bytes::ZERO..Bytes::MAX);
    runs.map(|(start, run)| (start.get(), run.end.get(), run.kind)).collect()
}

#[test]
fn lseek_treats_all_holes_alike_and_the_printed_map_does_not() {
    let map = LeafMap::new([(8192, Unchanged), (8192, Free), (8192, Hole), (4096, Data), (4096, Free)]);
    assert!(view::has_hole(&map, ALIGN));
    for (offset, data, hole) in [(0, 24576, 0), (8192, 24576, 8192), (10000, 24576, 10000), (24576, 24576, 28672)] {
        let offset = Bytes::new(offset);
        assert_eq!(view::seek(&map, ALIGN, offset, Whence::Data), Some(Bytes::new(data)));
        assert_eq!(view::seek(&map, ALIGN, offset, Whence::Hole), Some(Bytes::new(hole)));
    }
    assert_eq!(view::seek(&map, ALIGN, Bytes::new(28672), Whence::Data), None);
    assert_eq!(map.allocated(), Some(Bytes::new(4096)));
    assert_eq!(
        runs_of(&map),
        [(0, 8192, Unchanged), (8192, 16384, Free), (16384, 24576, Hole), (24576, 28672, Data), (28672, 32768, Free)]
    );
}

#[test]
fn a_unit_of_several_kinds_of_holes_is_a_plain_hole() {
    let map = LeafMap::new([(4096 + 512, Unchanged), (4096, Free), (3584, Unchanged), (512, Free), (3584, Data)]);
    assert_eq!(runs_of(&map), [(0, 4096, Unchanged), (4096, 12288, Hole), (12288, 16384, Data)]);
    assert_eq!(view::seek(&map, ALIGN, Bytes::ZERO, Whence::Data), Some(Bytes::new(12288)));
    // Only together the two kinds of holes fill a unit.
    let halves = LeafMap::new([(4096, Data), (2048, Unchanged), (2048, Free), (4096, Data)]);
    assert_eq!(view::seek(&halves, ALIGN, Bytes::ZERO, Whence::Hole), Some(Bytes::new(4096)));
    assert_eq!(runs_of(&halves), [(0, 4096, Data), (4096, 8192, Hole), (8192, 12288, Data)]);
}

#[test]
fn data_wins_in_an_overlay_and_different_holes_are_a_plain_hole() {
    for (upper, lower) in ALL_KINDS.into_iter().flat_map(|upper| ALL_KINDS.map(|lower| (upper, lower))) {
        let overlay = Overlay { layers: vec![uniform(4096, upper), uniform(8192, lower)], len: Bytes::new(8192) };
        let both = match (upper, lower) {
            (Data, _) | (_, Data) => Data,
            (upper, lower) if upper == lower => upper,
            _ => Hole,
        };
        let extent = Extent { end: Bytes::new(if upper != Data && lower == Data { 8192 } else { 4096 }), kind: both };
        assert_eq!(overlay.extent_at(Bytes::ZERO), extent, "{upper:?} over {lower:?}");
        assert_eq!(overlay.extent_at(Bytes::new(4096)).kind, Data, "beyond the end of the upper layer");
    }
    for kind in ALL_KINDS {
        assert_eq!(kind.is_data(), kind == Data);
        assert_eq!(kind.is_hole(), kind != Data);
        assert_eq!(uniform(512, kind).allocated(), Some(Bytes::new(if kind == Data { 512 } else { 0 })));
    }
}
