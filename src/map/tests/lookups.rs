//! The number of lookups that an answer costs.

use super::super::model::CountingMap;
use super::*;

#[test]
fn a_hole_of_a_stripe_costs_one_lookup_per_leg() {
    let legs = [(); 3].map(|()| CountingMap::new(LeafMap::new([(TIB, Hole), (TIB, Data)])));
    let lookups = || legs.iter().map(|leg| leg.lookups()).collect::<Vec<_>>();
    let shared = legs.iter().map(|leg| leg.clone() as Arc<dyn HoleMap>).collect();
    let chunk = Bytes::new(96 * KIB);
    let stripe = Stripe::new(shared, chunk, Bytes::new(6 * TIB)).expect("has legs");
    // The holes of all legs end within one row of chunks. The hole of the first leg ends first on the device.
    let end = Bytes::new(TIB / chunk.get() * chunk.get() * 3 + TIB % chunk.get());
    for offset in [0, 1, 96 * KIB, 200 * KIB, GIB + 5].map(Bytes::new) {
        assert_eq!(stripe.extent_at(offset), Extent { end, kind: Hole });
        assert_eq!(lookups(), [1, 1, 1]);
    }
    assert_eq!(view::seek(&stripe, ALIGN, Bytes::new(GIB), Whence::Hole), Some(Bytes::new(GIB)));
    assert_eq!(lookups(), [1, 1, 1]);
    assert_eq!(view::seek(&stripe, ALIGN, Bytes::ZERO, Whence::Data), Some(end.align_down(ALIGN)));
    assert_eq!(lookups(), [2, 2, 1], "all legs for the hole, then the leg with the data and the leg that ends it");
    assert!(view::has_hole(&stripe, ALIGN));
    assert_eq!(lookups(), [1, 1, 1]);
    let dense = Bytes::new(5 * TIB);
    let run = view::runs(&stripe, ALIGN, dense..Bytes::MAX).next();
    assert_eq!(run, Some((dense, Extent { end: Bytes::new(6 * TIB), kind: Data })));
    assert_eq!(lookups(), [1, 1, 1]);
}

#[test]
fn a_leg_that_begins_behind_the_answer_is_not_looked_up() {
    let first = CountingMap::new(LeafMap::new([(KIB, Hole), (TIB, Data)]));
    let second = CountingMap::new(LeafMap::new([(TIB, Data)]));
    let stripe = Stripe::new(vec![first.clone(), second.clone()], ALIGN, Bytes::new(TIB)).expect("has legs");
    assert_eq!(stripe.extent_at(Bytes::ZERO), Extent { end: Bytes::new(KIB), kind: Hole });
    assert_eq!((first.lookups(), second.lookups()), (1, 0));
}

#[test]
fn an_overlay_looks_up_the_next_layer_only_under_a_hole() {
    let top = CountingMap::new(LeafMap::new([(MIB, Data), (TIB, Hole)]));
    let below = CountingMap::new(LeafMap::new([(GIB, Hole), (TIB, Data)]));
    let overlay = Overlay { layers: vec![top.clone(), below.clone()], len: Bytes::new(TIB) };
    assert_eq!(overlay.extent_at(Bytes::ZERO), Extent { end: Bytes::new(MIB), kind: Data });
    assert_eq!((top.lookups(), below.lookups()), (1, 0));
    assert_eq!(overlay.extent_at(Bytes::new(MIB)), Extent { end: Bytes::new(GIB), kind: Hole });
    assert_eq!((top.lookups(), below.lookups()), (1, 1));
}

#[test]
fn the_view_looks_up_no_more_than_its_answer_needs() {
    let pieces = || (0..20_000).map(|index| (4096, if index % 4 < 2 { Hole } else { Data }));
    let map = CountingMap::new(LeafMap {
        runs: ExpectedRuns::new([(GIB, Data)].into_iter().chain(pieces())),
        ..LeafMap::new([])
    });
    for (offset, whence, found, lookups) in [
        (0, Whence::Data, 0, 1),
        (4097, Whence::Data, 4097, 1),
        (0, Whence::Hole, GIB, 2),
        (GIB + 1, Whence::Hole, GIB + 1, 1),
        (GIB, Whence::Data, GIB + 8192, 2),
        (GIB + 8192, Whence::Hole, GIB + 16384, 2),
    ] {
        assert_eq!(view::seek(&*map, ALIGN, Bytes::new(offset), whence), Some(Bytes::new(found)));
        assert_eq!(map.lookups(), lookups, "{whence:?} from {offset}");
    }
    assert!(view::has_hole(&*map, ALIGN));
    assert_eq!(map.lookups(), 2);
    let within = Bytes::new(GIB + 4096)..Bytes::new(GIB + 12288);
    assert_eq!(view::runs(&*map, ALIGN, within).count(), 2);
    assert_eq!(map.lookups(), 2);
    assert_eq!(view::runs(&*map, ALIGN, Bytes::ZERO..Bytes::MAX).take(500).count(), 500);
    assert!(map.lookups() <= 501, "each extent is looked up once");
}

/// A hole of many extents is found at its first unit, at the same cost for any length of the hole.
#[test]
fn a_hole_in_pieces_is_not_walked_to_its_end() {
    let cuts = (1..100_000).map(|index| index * 1024).collect();
    let map = CountingMap::new(LeafMap { cuts, ..LeafMap::new([(100_000 * 1024, Hole)]) });
    assert_eq!(view::seek(&*map, ALIGN, Bytes::new(5000), Whence::Hole), Some(Bytes::new(5000)));
    assert_eq!(map.lookups(), 4);
    assert!(view::has_hole(&*map, ALIGN));
    assert_eq!(map.lookups(), 4);
}
