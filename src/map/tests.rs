//! The maps against the model.

use std::sync::Arc;

use proptest::prelude::*;

use super::Kind::{Data, Hole};
use super::model::{Counting, Cut, Picture, Spec, specs};
use super::view::{self, Whence};
use super::{Clip, Concat, Extent, HoleMap, Kind, Overlay, Stripe, Uniform, Unstripe};
use crate::units::Bytes;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const ALIGN: Bytes = Bytes::new(4096);

fn patterns(len: usize) -> impl Iterator<Item = Vec<Kind>> {
    (0..1_u32 << len).map(move |bits| (0..len).map(|bit| if bits >> bit & 1 == 1 { Hole } else { Data }).collect())
}

fn leaf(blocks: &[Kind]) -> Spec {
    Spec::Leaf { blocks: blocks.iter().map(|&kind| (kind, false)).collect(), counted: true }
}

fn uniform(len: u64, kind: Kind) -> Arc<dyn HoleMap> {
    Arc::new(Uniform { len: Bytes::new(len), kind })
}

/// Every map of up to ten blocks, seen in units of one to four: a unit is a hole if all of its blocks are.
#[test]
fn the_view_of_every_small_map() {
    for (len, align) in (0..=10).flat_map(|len| (1..=4).map(move |align| (len, align))) {
        for blocks in patterns(len) {
            let spec = leaf(&blocks);
            let by_unit = Picture::new(
                blocks
                    .chunks(align)
                    .map(|unit| (unit.len() as u64, if unit.iter().all(|&kind| kind == Hole) { Hole } else { Data })),
            );
            assert_eq!(spec.picture(1).aligned(align as u64), by_unit, "the model disagrees with itself");
            spec.picture(1).check_view(&*spec.build(1), align as u64);
        }
    }
}

#[test]
fn every_small_stripe_overlay_and_concatenation() {
    for (first, second) in patterns(4).flat_map(|first| patterns(5).map(move |second| (first.clone(), second))) {
        let parts = || vec![leaf(&first), leaf(&second)];
        let both = Spec::Concat(parts());
        let mut specs = vec![both.clone(), Spec::Overlay { layers: parts(), len: 6 }];
        for chunk in 1..=3 {
            specs.extend([5, 8, 9, 12].map(|len| Spec::Stripe { legs: parts(), chunk, len }));
            let inner = Box::new(both.clone());
            specs.push(Spec::Unstripe { inner, chunk, stripes: 2, index: chunk % 2, len: 5 });
        }
        specs.extend([0, 3, 8].map(|start| Spec::Clip { inner: Box::new(both.clone()), start, len: 4 }));
        for spec in specs {
            spec.picture(1).check(&*spec.build(1));
            spec.picture(1).check_view(&*spec.build(1), 2);
        }
    }
}

/// Pieces at a given place: all of `blocks`, of `size` bytes each, after `lead` bytes of one kind.
fn check_after(lead: u64, kind: Kind, blocks: &[Kind], size: u64) {
    let spec = leaf(blocks);
    let picture = Picture::new([(lead, kind)].into_iter().chain(blocks.iter().map(|&kind| (size, kind))));
    let map = Concat::new(vec![uniform(lead, kind), spec.build(size)]).expect("fits");
    picture.check(&map);
    for align in [512, 4096, 65536] {
        picture.check_view(&map, align);
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
    /// Any stack, in blocks of any size up to the largest that fits.
    #[test]
    fn any_stack_is_what_its_definition_says(spec in specs(), odd in 0..5000_u64, align in 1..9_u64) {
        let blocks = spec.blocks().len().max(1) as u64;
        prop_assume!(blocks < 2000);
        let picture = spec.picture(1);
        let map = spec.build(1);
        picture.check(&*map);
        picture.check_view(&*map, align);
        // A leaf may be longer than the stack, so that the largest scale is found by its own length.
        let largest = u64::MAX / longest(&spec).max(1);
        for scale in [512, 1000, 4096, 4096 + odd, GIB, TIB + odd, largest - odd, largest] {
            let scale = scale.min(largest);
            let map = spec.build(scale);
            let picture = spec.picture(scale);
            picture.check(&*map);
            picture.check_view(&*map, 4096);
        }
    }
}

/// The most blocks that any part of a stack has.
fn longest(spec: &Spec) -> u64 {
    let parts = match spec {
        Spec::Uniform { .. } | Spec::Leaf { .. } => 0,
        Spec::Clip { inner, .. } | Spec::Unstripe { inner, .. } => longest(inner),
        Spec::Concat(parts) | Spec::Overlay { layers: parts, .. } | Spec::Stripe { legs: parts, .. } => {
            parts.iter().map(longest).max().unwrap_or(0)
        }
    };
    parts.max(spec.blocks().len() as u64)
}

/// The results at the last byte and at the end.
#[test]
fn the_end_of_the_device() {
    for size in [4096 * 3, 4096 * 3 + 512, 4096 * 3 + 1] {
        let tail = size - 4096 * 2;
        let (last, end) = (Bytes::new(size - 1), Bytes::new(size));
        let data = Cut::new([(4096, Data), (4096, Hole), (tail, Data)]);
        assert_eq!(view::seek(&data, ALIGN, last, Whence::Data), Some(last));
        assert_eq!(view::seek(&data, ALIGN, last, Whence::Hole), Some(end));
        let hole = Cut::new([(4096 * 2, Data), (tail, Hole)]);
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
    let map = Cut::new([(3, Data), (2, Hole), (1, Data)]);
    assert_eq!(view::seek(&map, Bytes::ZERO, Bytes::ZERO, Whence::Hole), Some(Bytes::new(3)));
    assert_eq!(view::seek(&map, Bytes::ZERO, Bytes::new(3), Whence::Data), Some(Bytes::new(5)));
}

#[test]
fn holes_are_rounded_inwards() {
    let map = Cut::new([(512, Data), (8192, Hole), (512, Data), (7168, Hole), (4096, Data), (4095, Hole)]);
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
    assert_eq!(view::seek(&map, ALIGN, tail, Whence::Data), Some(tail), "a tail that was rounded away is data");
    let odd = Cut::new([(9000, Data), (1000, Hole)]);
    assert!(!view::has_hole(&odd, ALIGN), "no unit of the last hole is whole");
}

/// The layouts of the selftests of the 2024 kernel series, on a file and through two segments.
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
    let layouts: [&[(u64, Kind)]; 4] = [&sparse, &two, &[(MIB, Data)], &[(GIB, Hole)]];
    for layout in layouts {
        let picture = Picture::new(layout.iter().copied());
        let whole: Arc<dyn HoleMap> = Arc::new(Cut::new(layout.iter().copied()));
        picture.check_view(&*whole, 4096);
        let len = whole.len();
        for middle in [4096, 512 * KIB, 512 * KIB + 512].map(Bytes::new) {
            let clip = |start: Bytes, end: Bytes| -> Arc<dyn HoleMap> {
                Arc::new(Clip { inner: whole.clone(), start, len: end.saturating_sub(start) })
            };
            let segments = Concat::new(vec![clip(Bytes::ZERO, middle), clip(middle, len)]).expect("fits");
            picture.check(&segments);
            picture.check_view(&segments, 4096);
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
    Picture::new([(1, Hole), (9, Data)]).check(&far);
}

#[test]
fn reasons_and_sizes_of_compositions() {
    let dense = || -> Arc<dyn HoleMap> { Arc::new(Cut::new([(4096, Data)])) };
    let mixed = || -> Arc<dyn HoleMap> { Arc::new(Cut::new([(1024, Data), (3072, Hole)])) };
    let reason = Some("all data".into());
    let concat = |parts| Concat::new(parts).expect("fits");
    let stripe = |legs| Stripe::new(legs, Bytes::new(512), Bytes::new(8192)).expect("has legs");
    let overlay = |layers| Overlay { layers, len: Bytes::new(4096) };
    assert_eq!(concat(vec![dense(), dense()]).dense_because(), reason);
    assert_eq!(concat(vec![dense(), uniform(0, Hole)]).dense_because(), reason, "an empty segment has no say");
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

/// A map with one wrong answer from `from` on.
struct Broken {
    from: u64,
    answer: Extent,
}

const BROKEN_LEN: u64 = 64 * TIB;

impl HoleMap for Broken {
    fn len(&self) -> Bytes {
        Bytes::new(BROKEN_LEN)
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        if offset < Bytes::new(self.from) { Extent { end: Bytes::new(self.from), kind: Hole } } else { self.answer }
    }
}

#[test]
fn a_wrong_answer_is_data_to_the_end() {
    for from in [0, MIB, BROKEN_LEN - 1] {
        let ends = [0, from.saturating_sub(1), from, BROKEN_LEN + 1, u64::MAX];
        for answer in ends.into_iter().flat_map(|end| [Data, Hole].map(|kind| Extent { end: Bytes::new(end), kind })) {
            let broken: Arc<dyn HoleMap> = Arc::new(Broken { from, answer });
            let picture = Picture::new([(from, Hole), (BROKEN_LEN - from, Data)]);
            picture.check_view(&*broken, 4096);
            let len = Bytes::new(BROKEN_LEN);
            let over: [Arc<dyn HoleMap>; 5] = [
                Arc::new(Clip { inner: broken.clone(), start: Bytes::ZERO, len }),
                Arc::new(Concat::new(vec![broken.clone()]).expect("fits")),
                Arc::new(Overlay { layers: vec![uniform(BROKEN_LEN, Hole), broken.clone()], len }),
                Arc::new(Stripe::new(vec![broken.clone()], Bytes::new(65536), len).expect("has a leg")),
                Arc::new(Unstripe::new(broken.clone(), Bytes::new(65536), 1, 0, len).expect("has a leg")),
            ];
            for map in over {
                picture.check(&*map);
                picture.check_view(&*map, 4096);
            }
        }
    }
}

#[test]
fn a_hole_over_a_stripe_costs_one_question_per_leg() {
    let legs = [(); 3].map(|()| Counting::new(Cut::new([(TIB, Hole), (TIB, Data)])));
    let asked = || legs.iter().map(|leg| leg.asked()).collect::<Vec<_>>();
    let shared = legs.iter().map(|leg| leg.clone() as Arc<dyn HoleMap>).collect();
    let chunk = Bytes::new(96 * KIB);
    let stripe = Stripe::new(shared, chunk, Bytes::new(6 * TIB)).expect("has legs");
    // The holes end within a row of chunks, of which the first leg's comes first.
    let end = Bytes::new(TIB / chunk.get() * chunk.get() * 3 + TIB % chunk.get());
    for offset in [0, 1, 96 * KIB, 200 * KIB, GIB + 5].map(Bytes::new) {
        assert_eq!(stripe.extent_at(offset), Extent { end, kind: Hole });
        assert_eq!(asked(), [1, 1, 1]);
    }
    assert_eq!(view::seek(&stripe, ALIGN, Bytes::new(GIB), Whence::Hole), Some(Bytes::new(GIB)));
    assert_eq!(asked(), [1, 1, 1]);
    assert_eq!(view::seek(&stripe, ALIGN, Bytes::ZERO, Whence::Data), Some(end.align_down(ALIGN)));
    assert_eq!(asked(), [2, 2, 1], "one round for the hole, then the leg with the data and the one that ends it");
    assert!(view::has_hole(&stripe, ALIGN));
    assert_eq!(asked(), [1, 1, 1]);
    let dense = Bytes::new(5 * TIB);
    assert_eq!(view::run(&stripe, ALIGN, dense), Extent { end: Bytes::new(6 * TIB), kind: Data });
    assert_eq!(asked(), [1, 1, 1]);
}

#[test]
fn a_leg_is_not_asked_beyond_the_answer() {
    let first = Counting::new(Cut::new([(KIB, Hole), (TIB, Data)]));
    let second = Counting::new(Cut::new([(TIB, Data)]));
    let stripe = Stripe::new(vec![first.clone(), second.clone()], ALIGN, Bytes::new(TIB)).expect("has legs");
    assert_eq!(stripe.extent_at(Bytes::ZERO), Extent { end: Bytes::new(KIB), kind: Hole });
    assert_eq!((first.asked(), second.asked()), (1, 0));
}

#[test]
fn an_overlay_asks_the_next_layer_only_under_a_hole() {
    let top = Counting::new(Cut::new([(MIB, Data), (TIB, Hole)]));
    let below = Counting::new(Cut::new([(GIB, Hole), (TIB, Data)]));
    let overlay = Overlay { layers: vec![top.clone(), below.clone()], len: Bytes::new(TIB) };
    assert_eq!(overlay.extent_at(Bytes::ZERO), Extent { end: Bytes::new(MIB), kind: Data });
    assert_eq!((top.asked(), below.asked()), (1, 0));
    assert_eq!(overlay.extent_at(Bytes::new(MIB)), Extent { end: Bytes::new(GIB), kind: Hole });
    assert_eq!((top.asked(), below.asked()), (1, 1));
}

#[test]
fn the_view_asks_no_further_than_its_answer() {
    let pieces = || (0..20_000).map(|index| (4096, if index % 4 < 2 { Hole } else { Data }));
    let map = Counting::new(Cut { picture: Picture::new([(GIB, Data)].into_iter().chain(pieces())), ..Cut::new([]) });
    for (offset, whence, found, questions) in [
        (0, Whence::Data, 0, 1),
        (4097, Whence::Data, 4097, 1),
        (0, Whence::Hole, GIB, 2),
        (GIB + 1, Whence::Hole, GIB + 1, 1),
        (GIB, Whence::Data, GIB + 8192, 2),
        (GIB + 8192, Whence::Hole, GIB + 16384, 2),
    ] {
        assert_eq!(view::seek(&*map, ALIGN, Bytes::new(offset), whence), Some(Bytes::new(found)));
        assert_eq!(map.asked(), questions, "{whence:?} from {offset}");
    }
    assert!(view::has_hole(&*map, ALIGN));
    assert_eq!(map.asked(), 2);
    let within = Bytes::new(GIB + 4096)..Bytes::new(GIB + 12288);
    assert_eq!(view::runs(&*map, ALIGN, within).count(), 2);
    assert_eq!(map.asked(), 2);
    assert_eq!(view::runs(&*map, ALIGN, Bytes::ZERO..Bytes::MAX).take(500).count(), 500);
    assert!(map.asked() <= 501, "each run is asked for once");
}

/// A hole in many pieces is found at its first unit, wherever it ends.
#[test]
fn a_hole_in_pieces_is_not_walked_to_its_end() {
    let cuts = (1..100_000).map(|index| index * 1024).collect();
    let map = Counting::new(Cut { cuts, ..Cut::new([(100_000 * 1024, Hole)]) });
    assert_eq!(view::seek(&*map, ALIGN, Bytes::new(5000), Whence::Hole), Some(Bytes::new(5000)));
    assert_eq!(map.asked(), 4);
    assert!(view::has_hole(&*map, ALIGN));
    assert_eq!(map.asked(), 4);
}
