//! What the maps are tested against: a kind per block, worked out from the definitions and nothing else.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::collection::vec;
use proptest::prelude::*;

use super::view::{self, Whence};
use super::{Clip, Concat, Extent, HoleMap, Kind, Overlay, Stripe, Uniform, Unstripe};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The maximal runs of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture(Vec<(Range<u64>, Kind)>);

impl Picture {
    /// Parts one after the other, each a length and a kind. Neighbours of one kind become one run.
    pub fn new(parts: impl IntoIterator<Item = (u64, Kind)>) -> Self {
        let mut runs: Vec<(Range<u64>, Kind)> = Vec::new();
        let mut at = 0;
        for (len, kind) in parts {
            let end = at + len;
            match runs.last_mut() {
                _ if len == 0 => {}
                Some(last) if last.1 == kind => last.0.end = end,
                _ => runs.push((at..end, kind)),
            }
            at = end;
        }
        Self(runs)
    }

    pub fn len(&self) -> u64 {
        self.0.last().map_or(0, |(range, _)| range.end)
    }

    /// Bytes of data.
    pub fn data(&self) -> u64 {
        self.0.iter().filter(|(_, kind)| *kind == Kind::Data).map(|(range, _)| range.end - range.start).sum()
    }

    pub fn has_hole(&self) -> bool {
        self.0.iter().any(|(_, kind)| *kind == Kind::Hole)
    }

    /// The rest of the run that holds `offset`.
    fn run(&self, offset: u64) -> Option<Extent> {
        let (range, kind) = self.0.iter().find(|(range, _)| range.contains(&offset))?;
        Some(Extent { end: Bytes::new(range.end), kind: *kind })
    }

    /// The same with every hole rounded inwards, but for an end that is the device's.
    pub fn aligned(&self, align: u64) -> Self {
        let len = self.len();
        let mut parts = Vec::new();
        let mut at = 0;
        for (range, _) in self.0.iter().filter(|(_, kind)| *kind == Kind::Hole) {
            let start = u128::from(range.start).next_multiple_of(u128::from(align));
            let end = if range.end == len { len } else { range.end - range.end % align };
            if let Some(start) = u64::try_from(start).ok().filter(|&start| start < end) {
                parts.extend([(start - at, Kind::Data), (end - start, Kind::Hole)]);
                at = end;
            }
        }
        parts.push((len - at, Kind::Data));
        Self::new(parts)
    }

    fn seek(&self, offset: u64, whence: Whence) -> Option<u64> {
        let wanted = if whence == Whence::Data { Kind::Data } else { Kind::Hole };
        if offset >= self.len() {
            return None;
        }
        let found = self.0.iter().find(|(range, kind)| range.end > offset && *kind == wanted);
        match found {
            Some((range, _)) => Some(range.start.max(offset)),
            None if whence == Whence::Hole => Some(self.len()),
            None => None,
        }
    }

    /// Every boundary and the ends, each with both of its neighbours.
    fn positions(&self) -> Vec<u64> {
        let edges = self.0.iter().map(|(range, _)| range.end).chain([0, self.len() / 2, u64::MAX]);
        let mut all: Vec<u64> = edges.flat_map(|at| [at.saturating_sub(1), at, at.saturating_add(1)]).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// That `map` keeps the contract of [`HoleMap`] and is this picture.
    pub fn check(&self, map: &dyn HoleMap) {
        assert_eq!(map.len().get(), self.len());
        for at in self.positions() {
            let run = map.extent_at(Bytes::new(at));
            match self.run(at) {
                Some(all) => {
                    assert!(run.end > Bytes::new(at) && run.end <= all.end, "{run:?} at {at}, where {all:?} is right");
                    assert_eq!(run.kind, all.kind, "at {at}");
                }
                None => assert_eq!(run, Extent::outside(Bytes::new(at)), "outside, at {at}"),
            }
        }
        if let Some(allocated) = map.allocated() {
            assert_eq!(allocated.get(), self.data(), "allocated");
        }
        assert!(map.dense_because().is_none() || !self.has_hole(), "dense, but has holes");
    }

    /// That every answer of the view over `map` is the one that follows from this picture.
    pub fn check_view(&self, map: &dyn HoleMap, align: u64) {
        let expected = self.aligned(align);
        let unit = Bytes::new(align);
        assert_eq!(view::has_hole(map, unit), expected.has_hole());
        let mut positions = self.positions();
        positions.extend(expected.positions());
        for at in positions {
            let offset = Bytes::new(at);
            for whence in [Whence::Data, Whence::Hole] {
                let found = view::seek(map, unit, offset, whence).map(Bytes::get);
                assert_eq!(found, expected.seek(at, whence), "{whence:?} from {at}, aligned to {align}");
            }
            let run = expected.run(at).unwrap_or(Extent::outside(offset));
            assert_eq!(view::run(map, unit, offset), run, "at {at}, aligned to {align}");
        }
        let all: Vec<_> = view::runs(map, unit, Bytes::ZERO..Bytes::MAX).collect();
        assert_eq!(all, expected.runs_within(&(0..u64::MAX)));
        for pair in expected.positions().windows(4) {
            for range in [pair[0]..pair[3], pair[1]..pair[2]] {
                let some: Vec<_> = view::runs(map, unit, Bytes::new(range.start)..Bytes::new(range.end)).collect();
                assert_eq!(some, expected.runs_within(&range), "{range:?}, aligned to {align}");
            }
        }
    }

    fn runs_within(&self, within: &Range<u64>) -> Vec<(Bytes, Extent)> {
        let cut = self.0.iter().map(|(range, kind)| (range.start.max(within.start), range.end.min(within.end), *kind));
        let kept = cut.filter(|(start, end, _)| start < end);
        kept.map(|(start, end, kind)| (Bytes::new(start), Extent { end: Bytes::new(end), kind })).collect()
    }
}

/// A leaf that shows a picture, its runs cut at some more positions.
pub struct Cut {
    pub picture: Picture,
    /// Positions at which a run ends whatever follows.
    pub cuts: Vec<u64>,
    /// Whether it knows how much of it is data.
    pub counted: bool,
}

impl Cut {
    pub fn new(parts: impl IntoIterator<Item = (u64, Kind)>) -> Self {
        Self { picture: Picture::new(parts), cuts: Vec::new(), counted: true }
    }
}

impl HoleMap for Cut {
    fn len(&self) -> Bytes {
        Bytes::new(self.picture.len())
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let Some(run) = self.picture.run(offset.get()) else { return Extent::outside(offset) };
        let cut = self.cuts.iter().copied().filter(|&cut| cut > offset.get()).min().map_or(run.end, Bytes::new);
        Extent { end: run.end.min(cut), kind: run.kind }
    }

    fn allocated(&self) -> Option<Bytes> {
        self.counted.then(|| Bytes::new(self.picture.data()))
    }

    fn dense_because(&self) -> Option<DenseReason> {
        (self.counted && !self.picture.has_hole()).then(|| "all data".into())
    }

    fn memory(&self) -> Bytes {
        Bytes::new(1)
    }
}

/// Counts the questions to another map.
pub struct Counting<M> {
    pub inner: M,
    asked: AtomicUsize,
}

impl<M: HoleMap> Counting<M> {
    pub fn new(inner: M) -> Arc<Self> {
        Arc::new(Self { inner, asked: AtomicUsize::new(0) })
    }

    /// The questions since the last call.
    pub fn asked(&self) -> usize {
        self.asked.swap(0, Ordering::Relaxed)
    }
}

impl<M: HoleMap> HoleMap for Counting<M> {
    fn len(&self) -> Bytes {
        self.inner.len()
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.inner.extent_at(offset)
    }
}

/// A stack of maps, measured in blocks.
#[derive(Clone, Debug)]
pub enum Spec {
    Uniform { len: usize, kind: Kind },
    Leaf { blocks: Vec<(Kind, bool)>, counted: bool },
    Clip { inner: Box<Spec>, start: usize, len: usize },
    Concat(Vec<Spec>),
    Overlay { layers: Vec<Spec>, len: usize },
    Stripe { legs: Vec<Spec>, chunk: usize, len: usize },
    Unstripe { inner: Box<Spec>, chunk: usize, stripes: usize, index: usize, len: usize },
}

impl Spec {
    /// The kind of each block, by definition.
    pub fn blocks(&self) -> Vec<Kind> {
        let at = |blocks: &Vec<Kind>, index: usize| blocks.get(index).copied().unwrap_or(Kind::Data);
        let all = |specs: &[Spec]| specs.iter().map(Spec::blocks).collect::<Vec<_>>();
        match self {
            Self::Uniform { len, kind } => vec![*kind; *len],
            Self::Leaf { blocks, .. } => blocks.iter().map(|(kind, _)| *kind).collect(),
            Self::Clip { inner, start, len } => {
                let inner = inner.blocks();
                (0..*len).map(|index| at(&inner, start + index)).collect()
            }
            Self::Concat(segments) => all(segments).concat(),
            Self::Overlay { layers, len } => {
                let layers = all(layers);
                let hole = |index| !layers.is_empty() && layers.iter().all(|layer| at(layer, index) == Kind::Hole);
                (0..*len).map(|index| if hole(index) { Kind::Hole } else { Kind::Data }).collect()
            }
            Self::Stripe { legs, chunk, len } => {
                let legs = all(legs);
                let place =
                    |index: usize| (index / chunk % legs.len(), index / chunk / legs.len() * chunk + index % chunk);
                (0..*len).map(|index| at(&legs[place(index).0], place(index).1)).collect()
            }
            Self::Unstripe { inner, chunk, stripes, index, len } => {
                let inner = inner.blocks();
                let place = |position: usize| (position / chunk * stripes + index) * chunk + position % chunk;
                (0..*len).map(|position| at(&inner, place(position))).collect()
            }
        }
    }

    /// The picture of the stack, with blocks of `scale` bytes.
    pub fn picture(&self, scale: u64) -> Picture {
        Picture::new(self.blocks().into_iter().map(|kind| (scale, kind)))
    }

    /// The stack itself, with blocks of `scale` bytes. A length that this makes too large becomes the largest there is.
    pub fn build(&self, scale: u64) -> Arc<dyn HoleMap> {
        let bytes = |blocks: &usize| Bytes::new(scale.saturating_mul(*blocks as u64));
        let all = |specs: &[Spec]| specs.iter().map(|spec| spec.build(scale)).collect::<Vec<_>>();
        match self {
            Self::Uniform { len, kind } => Arc::new(Uniform { len: bytes(len), kind: *kind }),
            Self::Leaf { blocks, counted } => Arc::new(Cut {
                picture: self.picture(scale),
                cuts: (0..).zip(blocks).filter(|(_, block)| block.1).map(|(index, _)| index * scale).collect(),
                counted: *counted,
            }),
            Self::Clip { inner, start, len } => {
                Arc::new(Clip { inner: inner.build(scale), start: bytes(start), len: bytes(len) })
            }
            Self::Concat(segments) => Arc::new(Concat::new(all(segments)).unwrap()),
            Self::Overlay { layers, len } => Arc::new(Overlay { layers: all(layers), len: bytes(len) }),
            Self::Stripe { legs, chunk, len } => Arc::new(Stripe::new(all(legs), bytes(chunk), bytes(len)).unwrap()),
            Self::Unstripe { inner, chunk, stripes, index, len } => Arc::new(
                Unstripe::new(inner.build(scale), bytes(chunk), *stripes as u64, *index as u64, bytes(len)).unwrap(),
            ),
        }
    }
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Data), Just(Kind::Hole)]
}

/// Leaves: long and short runs, cut anywhere.
fn leaves() -> impl Strategy<Value = Spec> {
    let runs = vec((kinds(), 1..6_usize, any::<bool>()), 0..8);
    prop_oneof![
        1 => (0..20_usize, kinds()).prop_map(|(len, kind)| Spec::Uniform { len, kind }),
        4 => (runs, any::<bool>()).prop_map(|(runs, counted)| {
            let run = |(kind, len, cut)| (0..len).map(move |index| (kind, cut && index != 1));
            Spec::Leaf { blocks: runs.into_iter().flat_map(run).collect(), counted }
        }),
    ]
}

/// Stacks of any shape.
pub fn specs() -> impl Strategy<Value = Spec> {
    leaves().prop_recursive(3, 24, 4, |inner| {
        let some = |from| vec(inner.clone(), from..5);
        prop_oneof![
            (inner.clone(), 0..30_usize, 0..40_usize).prop_map(|(inner, start, len)| Spec::Clip {
                inner: inner.into(),
                start,
                len
            }),
            some(0).prop_map(Spec::Concat),
            (some(0), 0..40_usize).prop_map(|(layers, len)| Spec::Overlay { layers, len }),
            (some(1), 1..6_usize, 0..90_usize).prop_map(|(legs, chunk, len)| Spec::Stripe { legs, chunk, len }),
            (inner.clone(), 1..6_usize, 1..5_usize, any::<prop::sample::Index>(), 0..40_usize).prop_map(
                |(inner, chunk, stripes, index, len)| Spec::Unstripe {
                    inner: inner.into(),
                    chunk,
                    stripes,
                    index: index.index(stripes),
                    len,
                }
            ),
        ]
    })
}
