//! Maps of striped devices, and of one leg of a striped device.

use std::sync::Arc;

use super::compose::{all_dense, allocated_within, memory_of};
use super::{Extent, ExtentKind, HoleMap, ask_expected, ask_now, extent_of_inner};
use crate::reason::DenseReason;
use crate::units::Bytes;

/// The geometry of a striped device: chunk `c` of the device is chunk `c / stripes` of leg `c % stripes`
/// (`drivers/md/dm-stripe.c`). A row is one chunk of every leg.
#[derive(Clone, Copy)]
struct StripeGeometry {
    /// Bytes in a chunk.
    chunk: u64,
    stripes: u64,
}

impl StripeGeometry {
    /// `None` if `chunk` or `stripes` is zero.
    fn new(chunk: Bytes, stripes: u64) -> Option<Self> {
        (chunk > Bytes::ZERO && stripes > 0).then_some(Self { chunk: chunk.get(), stripes })
    }

    /// The leg that holds `offset`.
    fn leg_of(self, offset: Bytes) -> u64 {
        offset.get() / self.chunk % self.stripes
    }

    /// The first position on `leg` whose byte is at or after `offset` on the device. It is never above `offset`.
    fn on_leg(self, leg: u64, offset: Bytes) -> Bytes {
        let row = offset.get() / self.chunk / self.stripes;
        let current = self.leg_of(offset);
        Bytes::new(match leg.cmp(&current) {
            std::cmp::Ordering::Less => (row + 1) * self.chunk,
            std::cmp::Ordering::Equal => row * self.chunk + offset.get() % self.chunk,
            std::cmp::Ordering::Greater => row * self.chunk,
        })
    }

    /// The position on the device of the byte `at` of `leg`, or `None` if it does not fit in 64 bits.
    fn on_device(self, leg: u64, at: Bytes) -> Option<Bytes> {
        let chunk = (at.get() / self.chunk).checked_mul(self.stripes)?.checked_add(leg)?;
        chunk.checked_mul(self.chunk)?.checked_add(at.get() % self.chunk).map(Bytes::new)
    }
}

/// A striped device: device-mapper's `striped` target, or an md raid0 array over legs of one length. Legs may be longer
/// than the device needs. Where a leg is too short, the missing part is data.
pub struct Stripe {
    legs: Vec<Arc<dyn HoleMap>>,
    geometry: StripeGeometry,
    len: Bytes,
}

impl Stripe {
    /// A device of `len` bytes in chunks of `chunk` bytes over `legs`. `None` if there are no legs, or if `chunk` is zero.
    pub fn new(legs: Vec<Arc<dyn HoleMap>>, chunk: Bytes, len: Bytes) -> Option<Self> {
        let geometry = StripeGeometry::new(chunk, u64::try_from(legs.len()).ok()?)?;
        Some(Self { legs, geometry, len })
    }

    /// Queries each leg once, at its first byte at or after `offset`, in the order of these bytes on the device. The
    /// answer ends where the first extent of any leg ends, or where a leg with an extent of another kind begins. A leg
    /// that begins behind this end is not queried.
    fn extent_by<E>(&self, offset: Bytes, ask: impl Fn(&dyn HoleMap, Bytes) -> Result<Extent, E>) -> Result<Extent, E> {
        if offset >= self.len {
            return Ok(Extent::outside(offset));
        }
        let mut kind: Option<ExtentKind> = None;
        let mut end = self.len;
        for (leg, map) in self.legs_from(self.geometry.leg_of(offset)) {
            let at = self.geometry.on_leg(leg, offset);
            let Some(begin) = self.geometry.on_device(leg, at).filter(|&begin| begin < end) else { break };
            let extent = ask(map, at)?;
            if extent.kind != *kind.get_or_insert(extent.kind) {
                end = begin;
                break;
            }
            end = self.geometry.on_device(leg, extent.end).map_or(end, |extent_end| end.min(extent_end));
        }
        Ok(Extent { end, kind: kind.unwrap_or(ExtentKind::Data) })
    }

    /// All legs with their numbers: from leg `first` to the last one, then from leg 0 on.
    fn legs_from(&self, first: u64) -> impl Iterator<Item = (u64, &dyn HoleMap)> {
        let numbered = || (0..).zip(self.legs.iter().map(|leg| &**leg));
        numbered().skip_while(move |&(leg, _)| leg < first).chain(numbered().take_while(move |&(leg, _)| leg < first))
    }
}

impl HoleMap for Stripe {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let Ok(extent) = self.extent_by(offset, ask_now);
        extent
    }

    fn expected_extent(&self, offset: Bytes) -> Option<Extent> {
        self.extent_by(offset, ask_expected).ok()
    }

    fn allocated(&self) -> Option<Bytes> {
        self.legs_from(0).try_fold(Bytes::ZERO, |sum, (leg, map)| {
            sum.checked_add(allocated_within(map, Bytes::ZERO, self.geometry.on_leg(leg, self.len))?)
        })
    }

    fn dense_because(&self) -> Option<DenseReason> {
        all_dense(self.legs_from(0).map(|(_, map)| map))
    }

    fn is_guarded(&self) -> bool {
        self.legs_from(0).all(|(_, map)| map.is_guarded())
    }

    fn memory(&self) -> Bytes {
        memory_of(self.legs_from(0).map(|(_, map)| map))
    }
}

/// One leg of a striped device, of which only the map of the striped device is known: device-mapper's `unstriped` target
/// (`drivers/md/dm-unstripe.c`).
///
/// The chunks of a leg are not adjacent on the striped device. Where the other legs hold another kind, each chunk of this
/// leg is an extent of its own.
pub struct Unstripe {
    inner: Arc<dyn HoleMap>,
    geometry: StripeGeometry,
    index: u64,
    len: Bytes,
}

impl Unstripe {
    /// The first `len` bytes of leg `index` of `inner`, a device of `stripes` legs. `None` if there is no such leg, or if
    /// `chunk` is zero.
    pub fn new(inner: Arc<dyn HoleMap>, chunk: Bytes, stripes: u64, index: u64, len: Bytes) -> Option<Self> {
        let geometry = StripeGeometry::new(chunk, stripes).filter(|_| index < stripes)?;
        Some(Self { inner, geometry, index, len })
    }
}

impl Unstripe {
    fn extent_by<E>(&self, offset: Bytes, ask: impl Fn(&dyn HoleMap, Bytes) -> Result<Extent, E>) -> Result<Extent, E> {
        if offset >= self.len {
            return Ok(Extent::outside(offset));
        }
        let at = self.geometry.on_device(self.index, offset);
        extent_of_inner((&*self.inner, at), self.len, |end| self.geometry.on_leg(self.index, end), ask)
    }
}

impl HoleMap for Unstripe {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let Ok(extent) = self.extent_by(offset, ask_now);
        extent
    }

    fn expected_extent(&self, offset: Bytes) -> Option<Extent> {
        self.extent_by(offset, ask_expected).ok()
    }

    fn dense_because(&self) -> Option<DenseReason> {
        self.inner.dense_because()
    }

    fn is_guarded(&self) -> bool {
        self.inner.is_guarded()
    }

    fn memory(&self) -> Bytes {
        self.inner.memory()
    }
}
