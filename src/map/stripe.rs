//! Striped devices, and one leg seen through a striped device.

use std::sync::Arc;

use super::compose::{all_dense, allocated_within, memory_of};
use super::{Extent, HoleMap, Kind, ask};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// Where bytes live: chunk `c` of the device is chunk `c / stripes` of leg `c % stripes` (`drivers/md/dm-stripe.c`).
#[derive(Clone, Copy)]
struct Layout {
    chunk: u64,
    stripes: u64,
}

impl Layout {
    /// `None` for a chunk of no bytes, or no stripes.
    fn new(chunk: Bytes, stripes: u64) -> Option<Self> {
        (chunk > Bytes::ZERO && stripes > 0).then_some(Self { chunk: chunk.get(), stripes })
    }

    /// The leg that holds `offset`.
    fn leg_of(self, offset: Bytes) -> u64 {
        offset.get() / self.chunk % self.stripes
    }

    /// The first position of `leg` that the device holds at or after `offset`. Never above `offset`.
    fn on_leg(self, leg: u64, offset: Bytes) -> Bytes {
        let row = offset.get() / self.chunk / self.stripes;
        let current = self.leg_of(offset);
        Bytes::new(match leg.cmp(&current) {
            std::cmp::Ordering::Less => (row + 1) * self.chunk,
            std::cmp::Ordering::Equal => row * self.chunk + offset.get() % self.chunk,
            std::cmp::Ordering::Greater => row * self.chunk,
        })
    }

    /// Where the device holds position `at` of `leg`, or `None` beyond what a position can hold.
    fn on_device(self, leg: u64, at: Bytes) -> Option<Bytes> {
        let chunk = (at.get() / self.chunk).checked_mul(self.stripes)?.checked_add(leg)?;
        chunk.checked_mul(self.chunk)?.checked_add(at.get() % self.chunk).map(Bytes::new)
    }
}

/// Legs that hold the device's chunks in turn: dm `striped`, and md raid0 over legs of one length. Legs may be longer
/// than the stripes need; where one is shorter, the rest is data.
pub struct Stripe {
    legs: Vec<Arc<dyn HoleMap>>,
    layout: Layout,
    len: Bytes,
}

impl Stripe {
    /// A device of `len` bytes over `legs`, `chunk` bytes from each in turn. `None` without legs, or with an empty chunk.
    pub fn new(legs: Vec<Arc<dyn HoleMap>>, chunk: Bytes, len: Bytes) -> Option<Self> {
        let layout = Layout::new(chunk, u64::try_from(legs.len()).ok()?)?;
        Some(Self { legs, layout, len })
    }

    /// The legs with their numbers, from leg `first` on and around.
    fn legs_from(&self, first: u64) -> impl Iterator<Item = (u64, &dyn HoleMap)> {
        let numbered = || (0..).zip(self.legs.iter().map(|leg| &**leg));
        numbered().skip_while(move |&(leg, _)| leg < first).chain(numbered().take_while(move |&(leg, _)| leg < first))
    }
}

impl HoleMap for Stripe {
    fn len(&self) -> Bytes {
        self.len
    }

    /// Each leg is asked once, at its first position at or after `offset`. The answer ends where the first leg's run
    /// does, or where a leg of the other kind begins. The legs come in the order of those positions, so that none is
    /// asked which begins after that end.
    fn extent_at(&self, offset: Bytes) -> Extent {
        if offset >= self.len {
            return Extent::outside(offset);
        }
        let mut answer: Option<Kind> = None;
        let mut end = self.len;
        for (leg, map) in self.legs_from(self.layout.leg_of(offset)) {
            let at = self.layout.on_leg(leg, offset);
            let Some(begin) = self.layout.on_device(leg, at).filter(|&begin| begin < end) else { break };
            let run = ask(map, at);
            if run.kind != *answer.get_or_insert(run.kind) {
                end = begin;
                break;
            }
            end = self.layout.on_device(leg, run.end).map_or(end, |run_end| end.min(run_end));
        }
        Extent { end, kind: answer.unwrap_or(Kind::Data) }
    }

    fn allocated(&self) -> Option<Bytes> {
        self.legs_from(0).try_fold(Bytes::ZERO, |sum, (leg, map)| {
            sum.checked_add(allocated_within(map, Bytes::ZERO, self.layout.on_leg(leg, self.len))?)
        })
    }

    fn dense_because(&self) -> Option<DenseReason> {
        all_dense(self.legs_from(0).map(|(_, map)| map))
    }

    fn memory(&self) -> Bytes {
        memory_of(self.legs_from(0).map(|(_, map)| map))
    }
}

/// One leg seen through a striped device: dm `unstriped` (`drivers/md/dm-unstripe.c`).
///
/// What the other legs hold between two chunks of this one ends a run of the device, so a long run of this leg alone
/// costs a question per chunk.
pub struct Unstripe {
    inner: Arc<dyn HoleMap>,
    layout: Layout,
    index: u64,
    len: Bytes,
}

impl Unstripe {
    /// The first `len` bytes of leg `index` out of `inner`, a device of `stripes` legs. `None` where there is no such
    /// leg, or the chunk is empty.
    pub fn new(inner: Arc<dyn HoleMap>, chunk: Bytes, stripes: u64, index: u64, len: Bytes) -> Option<Self> {
        let layout = Layout::new(chunk, stripes).filter(|_| index < stripes)?;
        Some(Self { inner, layout, index, len })
    }
}

impl HoleMap for Unstripe {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        if offset >= self.len {
            return Extent::outside(offset);
        }
        match self.layout.on_device(self.index, offset).filter(|&at| at < self.inner.len()) {
            Some(at) => {
                let run = ask(&*self.inner, at);
                Extent { end: self.layout.on_leg(self.index, run.end).min(self.len), kind: run.kind }
            }
            None => Extent { end: self.len, kind: Kind::Data },
        }
    }

    fn dense_because(&self) -> Option<DenseReason> {
        self.inner.dense_because()
    }

    fn memory(&self) -> Bytes {
        self.inner.memory()
    }
}
