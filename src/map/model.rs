//! The model that the maps are tested against: the kind of every block, computed from the definitions alone.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::collection::vec;
use proptest::prelude::*;

use super::view::{self, Whence};
use super::{Clip, Concat, Extent, ExtentKind, HoleMap, Overlay, Stripe, Uniform, Unstripe};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The maximal runs of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedRuns(Vec<(Range<u64>, ExtentKind)>);

impl ExpectedRuns {
    /// Parts one after the other, each a length and a kind. Neighbours of one kind become one run.
    pub fn new(parts: impl IntoIterator<Item = (u64, ExtentKind)>) -> Self {
        let mut runs: Vec<(Range<u64>, ExtentKind)> = Vec::new();
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
        self.0.iter().filter(|(_, kind)| kind.is_data()).map(|(range, _)| range.end - range.start).sum()
    }

    pub fn has_hole(&self) -> bool {
        self.0.iter().any(|(_, kind)| kind.is_hole())
    }

    /// The rest of the run that holds `offset`.
    fn run(&self, offset: u64) -> Option<Extent> {
        let (range, kind) = self.0.iter().find(|(range, _)| range.contains(&offset))?;
        Some(Extent { end: Bytes::new(range.end), kind: *kind })
    }

    /// The same runs in units of `align` bytes: every sequence of holes is rounded inwards, but for an end that is the end
    /// of the device. Units of the sequence in which two kinds of holes meet are plain holes.
    pub fn aligned(&self, align: u64) -> Self {
        let len = self.len();
        let whole = |range: &Range<u64>| {
            let start = u128::from(range.start).next_multiple_of(u128::from(align));
            let end = if range.end == len { len } else { range.end - range.end % align };
            u64::try_from(start).ok().filter(|&start| start < end).map(|start| start..end)
        };
        let mut parts = Vec::new();
        let mut at = 0;
        for holes in self.0.split(|(_, kind)| kind.is_data()).filter(|holes| !holes.is_empty()) {
            let Some(hole) = whole(&(holes[0].0.start..holes[holes.len() - 1].0.end)) else { continue };
            parts.push((hole.start - at, ExtentKind::Data));
            at = hole.start;
            for (range, kind) in holes.iter().filter_map(|(range, kind)| whole(range).zip(Some(*kind))) {
                parts.extend([(range.start - at, ExtentKind::Hole), (range.end - range.start, kind)]);
                at = range.end;
            }
            parts.push((hole.end - at, ExtentKind::Hole));
            at = hole.end;
        }
        parts.push((len - at, ExtentKind::Data));
        Self::new(parts)
    }

    fn seek(&self, offset: u64, whence: Whence) -> Option<u64> {
        if offset >= self.len() {
            return None;
        }
        let is_wanted = |kind: ExtentKind| kind.is_hole() == (whence == Whence::Hole);
        let found = self.0.iter().find(|(range, kind)| range.end > offset && is_wanted(*kind));
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

    /// Checks that `map` keeps the contract of [`HoleMap`] and has these runs.
    pub fn check(&self, map: &dyn HoleMap) {
        assert_eq!(map.len().get(), self.len());
        for at in self.positions() {
            let found = map.extent_at(Bytes::new(at));
            match self.run(at) {
                Some(run) => {
                    assert!(found.end > Bytes::new(at) && found.end <= run.end, "{found:?} at {at} of {run:?}");
                    assert_eq!(found.kind, run.kind, "at {at}");
                }
                None => assert_eq!(found, Extent::outside(Bytes::new(at)), "outside, at {at}"),
            }
        }
        if let Some(allocated) = map.allocated() {
            assert_eq!(allocated.get(), self.data(), "allocated");
        }
        assert!(map.dense_because().is_none() || !self.has_hole(), "dense, but has holes");
    }

    /// Checks that every answer of [`view`] over `map` follows from these runs.
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
            let first = view::runs(map, unit, offset..Bytes::MAX).next();
            assert_eq!(first, expected.run(at).map(|run| (offset, run)), "at {at}, aligned to {align}");
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

/// A map that returns given runs, some of them in several extents.
pub struct LeafMap {
    pub runs: ExpectedRuns,
    /// Positions at which an extent ends in any case.
    pub cuts: Vec<u64>,
    /// Whether the map knows how many bytes are data.
    pub counted: bool,
}

impl LeafMap {
    pub fn new(parts: impl IntoIterator<Item = (u64, ExtentKind)>) -> Self {
        Self { runs: ExpectedRuns::new(parts), cuts: Vec::new(), counted: true }
    }
}

impl HoleMap for LeafMap {
    fn len(&self) -> Bytes {
        Bytes::new(self.runs.len())
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let Some(run) = self.runs.run(offset.get()) else { return Extent::outside(offset) };
        let cut = self.cuts.iter().copied().filter(|&cut| cut > offset.get()).min().map_or(run.end, Bytes::new);
        Extent { end: run.end.min(cut), kind: run.kind }
    }

    fn allocated(&self) -> Option<Bytes> {
        self.counted.then(|| Bytes::new(self.runs.data()))
    }

    fn dense_because(&self) -> Option<DenseReason> {
        (self.counted && !self.runs.has_hole()).then(|| "all data".into())
    }

    fn memory(&self) -> Bytes {
        Bytes::new(1)
    }
}

/// A map that counts its lookups, and passes them on to another map.
pub struct CountingMap<M> {
    inner: M,
    lookups: AtomicUsize,
}

impl<M: HoleMap> CountingMap<M> {
    pub fn new(inner: M) -> Arc<Self> {
        Arc::new(Self { inner, lookups: AtomicUsize::new(0) })
    }

    /// The number of lookups since the last call.
    pub fn lookups(&self) -> usize {
        self.lookups.swap(0, Ordering::Relaxed)
    }
}

impl<M: HoleMap> HoleMap for CountingMap<M> {
    fn len(&self) -> Bytes {
        self.inner.len()
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        self.lookups.fetch_add(1, Ordering::Relaxed);
        self.inner.extent_at(offset)
    }
}

/// A stack of maps, whose positions and lengths are in blocks.
#[derive(Clone, Debug)]
pub enum MapTree {
    Uniform { len: usize, kind: ExtentKind },
    Leaf { blocks: Vec<(ExtentKind, bool)>, counted: bool },
    Clip { inner: Box<MapTree>, start: usize, len: usize },
    Concat(Vec<MapTree>),
    Overlay { layers: Vec<MapTree>, len: usize },
    Stripe { legs: Vec<MapTree>, chunk: usize, len: usize },
    Unstripe { inner: Box<MapTree>, chunk: usize, stripes: usize, index: usize, len: usize },
}

impl MapTree {
    /// The kind of each block, from the definition of each composition.
    pub fn blocks(&self) -> Vec<ExtentKind> {
        let at = |blocks: &Vec<ExtentKind>, index: usize| blocks.get(index).copied().unwrap_or(ExtentKind::Data);
        let all = |trees: &[MapTree]| trees.iter().map(MapTree::blocks).collect::<Vec<_>>();
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
                (0..*len).map(|index| common_kind(layers.iter().map(|layer| at(layer, index)))).collect()
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

    /// The runs of the stack, with blocks of `scale` bytes.
    pub fn runs(&self, scale: u64) -> ExpectedRuns {
        ExpectedRuns::new(self.blocks().into_iter().map(|kind| (scale, kind)))
    }

    /// The maps of the stack, with blocks of `scale` bytes. A length that does not fit in 64 bits becomes the largest one.
    pub fn build(&self, scale: u64) -> Arc<dyn HoleMap> {
        let bytes = |blocks: &usize| Bytes::new(scale.saturating_mul(*blocks as u64));
        let all = |trees: &[MapTree]| trees.iter().map(|tree| tree.build(scale)).collect::<Vec<_>>();
        match self {
            Self::Uniform { len, kind } => Arc::new(Uniform { len: bytes(len), kind: *kind }),
            Self::Leaf { blocks, counted } => Arc::new(LeafMap {
                runs: self.runs(scale),
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

/// The kind of a range of several kinds: data if any of them is data, else the only kind, else a plain hole. Data if there
/// is none at all.
pub fn common_kind(kinds: impl IntoIterator<Item = ExtentKind>) -> ExtentKind {
    let kinds: HashSet<ExtentKind> = kinds.into_iter().collect();
    match kinds.iter().next() {
        _ if kinds.contains(&ExtentKind::Data) => ExtentKind::Data,
        None => ExtentKind::Data,
        Some(only) if kinds.len() == 1 => *only,
        Some(_) => ExtentKind::Hole,
    }
}

/// Data half of the time, so that compositions keep some holes and some data.
fn kinds() -> impl Strategy<Value = ExtentKind> {
    use ExtentKind::{Data, Free, Hole, Unchanged};
    prop_oneof![4 => Just(Data), 2 => Just(Hole), 1 => Just(Unchanged), 1 => Just(Free)]
}

/// Maps without inner maps: long and short runs, which are cut into extents anywhere.
fn leaves() -> impl Strategy<Value = MapTree> {
    let runs = vec((kinds(), 1..6_usize, any::<bool>()), 0..8);
    prop_oneof![
        1 => (0..20_usize, kinds()).prop_map(|(len, kind)| MapTree::Uniform { len, kind }),
        4 => (runs, any::<bool>()).prop_map(|(runs, counted)| {
            let run = |(kind, len, cut)| (0..len).map(move |index| (kind, cut && index != 1));
            MapTree::Leaf { blocks: runs.into_iter().flat_map(run).collect(), counted }
        }),
    ]
}

/// Stacks of maps of any shape.
pub fn map_trees() -> impl Strategy<Value = MapTree> {
    leaves().prop_recursive(3, 24, 4, |inner| {
        let some = |from| vec(inner.clone(), from..5);
        prop_oneof![
            (inner.clone(), 0..30_usize, 0..40_usize).prop_map(|(inner, start, len)| MapTree::Clip {
                inner: inner.into(),
                start,
                len
            }),
            some(0).prop_map(MapTree::Concat),
            (some(0), 0..40_usize).prop_map(|(layers, len)| MapTree::Overlay { layers, len }),
            (some(1), 1..6_usize, 0..90_usize).prop_map(|(legs, chunk, len)| MapTree::Stripe { legs, chunk, len }),
            (inner.clone(), 1..6_usize, 1..5_usize, any::<prop::sample::Index>(), 0..40_usize).prop_map(
                |(inner, chunk, stripes, index, len)| MapTree::Unstripe {
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
