//! How a device allocates space for what is written to it, as far as a writer has to know it.
//!
//! A thin volume has no command that makes a range zero: a discard may do it, and writing zeros allocates space for them. In a pool
//! with `skip_block_zeroing` a block that is allocated for a write has old bytes of the pool around what is written. Both
//! matter through layers that map each byte to one byte below: linear, striped, and partitions.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::source::dm::params;
use crate::source::{dm, thin};
use crate::sys::device::DeviceId;
use crate::sys::dm::{Control, Events, Table, TableTarget};
use crate::sys::sysfs;
use crate::units::{Bytes, Sectors};

/// More layers than this are taken for a mistake.
const MAX_DEPTH: usize = 32;

/// How a device allocates space.
#[derive(Debug)]
pub struct Provisioning {
    top: Part,
    /// Whether a device below is allocated as it is written.
    is_sparse: bool,
    /// The state of device-mapper's event counter before the first table was read; `None` if there was no table.
    events: Option<Events>,
}

/// A device, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Thin {
        /// The size of a block of the pool.
        block: Bytes,
        /// Whether the pool fills the rest of a new block with zeros.
        zeroes: bool,
        /// Whether unmapped blocks are read from an external origin.
        has_origin: bool,
    },
    /// What begins there on a device.
    From(Bytes, Box<Part>),
    /// Targets one after the other, each with its end.
    Row(Vec<(Bytes, Part)>),
    /// Chunks that are distributed over the legs in turn.
    Stripe { chunk: Bytes, legs: Vec<Part> },
    /// Anything else.
    Other,
}

/// Reads the layers of a device, from the top down.
struct LayerReader<'a> {
    control: &'a dm::SharedControl,
    events: Option<Events>,
    depth: usize,
}

impl Provisioning {
    /// Reads the tables of a device and of those below it.
    ///
    /// # Errors
    /// When a table cannot be read: then it is not known what a write does. `PermissionDenied` without the right to read tables.
    pub fn of(id: DeviceId, control: &dm::SharedControl) -> io::Result<Self> {
        let mut layers = LayerReader { control, events: None, depth: 0 };
        let top = layers.device(id)?;
        let is_sparse = layers.is_sparse(id)?;
        Ok(Self { top, is_sparse, events: layers.events })
    }

    /// Whether no table was replaced since.
    pub fn unchanged(&self, control: &dm::SharedControl) -> bool {
        let Some(before) = self.events else { return true };
        control.control().is_some_and(|control| control.events().is_ok_and(|now| now == before))
    }

    /// Whether a write of zeros may allocate space that reads as zeros without it: there is a thin volume or a snapshot below.
    pub fn is_sparse(&self) -> bool {
        self.is_sparse
    }

    /// If a discard leaves no other bytes than zeros, those from before, or those of a discarded block of the pool: the size of a
    /// piece of the device that has at least one whole block of each pool that it is in, wherever it begins. `None` where a discard
    /// may leave any bytes.
    pub fn discard_unit(&self) -> Option<Bytes> {
        self.top.discard_unit()
    }

    /// Whether a discard of `range` can unmap anything: a pool unmaps whole blocks alone (`get_bio_block_range` of `dm-thin.c`).
    pub fn discards_blocks(&self, range: &Range<Bytes>) -> bool {
        self.top.discards_blocks(range)
    }

    /// Whether a write of a part of a block may make old bytes of a pool visible in the rest of it.
    pub fn exposes_old_bytes(&self) -> bool {
        self.top.exposes_old_bytes()
    }

    /// The ranges that must be written as a whole so that a write of `range` makes no old bytes of a pool visible: the blocks
    /// of such pools that `range` is in, as far as the device of `len` bytes has them. In order; neighbours are joined.
    pub fn filled(&self, range: &Range<Bytes>, len: Bytes) -> Vec<Range<Bytes>> {
        let mut ranges = self.top.filled(range, len);
        ranges.sort_by_key(|range| range.start);
        let mut joined: Vec<Range<Bytes>> = Vec::new();
        for range in ranges.into_iter().filter(|range| range.start < range.end) {
            match joined.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        joined
    }
}

impl Part {
    fn discard_unit(&self) -> Option<Bytes> {
        match self {
            Self::Thin { block, has_origin: false, .. } => block.get().checked_mul(2).map(Bytes::new),
            Self::Thin { .. } | Self::Other => None,
            Self::From(_, inner) => inner.discard_unit(),
            Self::Row(parts) => largest(parts.iter().map(|(_, part)| part.discard_unit())),
            Self::Stripe { chunk, legs } => {
                let unit = largest(legs.iter().map(Self::discard_unit))?;
                // A leg has its part of each row, and the first and the last row may be cut.
                let rows = unit.get().div_ceil(chunk.get()).checked_add(2)?;
                rows.checked_mul(chunk.get())?.checked_mul(u64::try_from(legs.len()).ok()?).map(Bytes::new)
            }
        }
    }

    fn discards_blocks(&self, range: &Range<Bytes>) -> bool {
        match self {
            Self::Thin { block, .. } => {
                range.start.align_up(*block).is_some_and(|first| first < range.end.align_down(*block))
            }
            Self::From(start, inner) => {
                inner.discards_blocks(&(range.start.saturating_add(*start)..range.end.saturating_add(*start)))
            }
            // Not worth a look at each part.
            Self::Row(_) | Self::Stripe { .. } | Self::Other => true,
        }
    }

    fn exposes_old_bytes(&self) -> bool {
        match self {
            Self::Thin { zeroes, .. } => !zeroes,
            Self::Other => false,
            Self::From(_, inner) => inner.exposes_old_bytes(),
            Self::Row(parts) => parts.iter().any(|(_, part)| part.exposes_old_bytes()),
            Self::Stripe { legs, .. } => legs.iter().any(Self::exposes_old_bytes),
        }
    }

    fn filled(&self, range: &Range<Bytes>, len: Bytes) -> Vec<Range<Bytes>> {
        match self {
            Self::Thin { block, zeroes: false, .. } => {
                vec![range.start.align_down(*block)..range.end.align_up(*block).unwrap_or(len).min(len)]
            }
            Self::Thin { .. } | Self::Other => vec![range.clone()],
            Self::From(start, inner) => {
                let below = range.start.saturating_add(*start)..range.end.saturating_add(*start);
                let filled = inner.filled(&below, start.saturating_add(len));
                let above = |at: Bytes| at.saturating_sub(*start).min(len);
                filled.into_iter().map(|range| above(range.start)..above(range.end)).collect()
            }
            Self::Row(parts) => filled_row(parts, range),
            Self::Stripe { chunk, legs } => filled_stripe(*chunk, legs, range, len),
        }
    }
}

/// The largest of all values; `None` if one of them is.
fn largest(values: impl Iterator<Item = Option<Bytes>>) -> Option<Bytes> {
    values.collect::<Option<Vec<_>>>()?.into_iter().max()
}

fn filled_row(parts: &[(Bytes, Part)], range: &Range<Bytes>) -> Vec<Range<Bytes>> {
    let mut filled = Vec::new();
    let mut start = Bytes::ZERO;
    for (end, part) in parts {
        let inside = range.start.max(start)..range.end.min(*end);
        if inside.start < inside.end {
            let below = inside.start.saturating_sub(start)..inside.end.saturating_sub(start);
            let above = |at: Bytes| at.saturating_add(start);
            let found = part.filled(&below, end.saturating_sub(start));
            filled.extend(found.into_iter().map(|range| above(range.start)..above(range.end)));
        }
        start = *end;
    }
    filled
}

fn filled_stripe(chunk: Bytes, legs: &[Part], range: &Range<Bytes>, len: Bytes) -> Vec<Range<Bytes>> {
    let (chunk, count) = (chunk.get(), legs.len() as u64);
    let leg_len = Bytes::new(len.get() / count);
    let mut filled = Vec::new();
    for (index, leg) in (0..).zip(legs) {
        // The bytes of this leg before an offset of the device.
        let before = |at: u64| {
            let (number, inside) = (at / chunk, at % chunk);
            let in_row =
                if number % count > index { chunk } else { 0 } + if number % count == index { inside } else { 0 };
            number / count * chunk + in_row
        };
        let on_leg = before(range.start.get())..before(range.end.get());
        if on_leg.is_empty() {
            continue;
        }
        for found in leg.filled(&(Bytes::new(on_leg.start)..Bytes::new(on_leg.end)), leg_len) {
            let mut at = found.start.get();
            while at < found.end.get() {
                let end = (at / chunk + 1).saturating_mul(chunk).min(found.end.get());
                let start = (at / chunk * count + index).saturating_mul(chunk).saturating_add(at % chunk);
                filled.push(Bytes::new(start)..Bytes::new(start.saturating_add(end - at)).min(len));
                at = end;
            }
        }
    }
    filled
}

impl LayerReader<'_> {
    fn device(&mut self, id: DeviceId) -> io::Result<Part> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(io::Error::other("its stack is too deep"));
        }
        let part = self.part(id);
        self.depth -= 1;
        part
    }

    fn part(&mut self, id: DeviceId) -> io::Result<Part> {
        if let Some((disk, start)) = sysfs::partition(id)? {
            return self.from(disk, start);
        }
        let Some((_, table)) = self.table(id)? else { return Ok(Part::Other) };
        if let [target] = &table.targets[..] {
            return self.target(target);
        }
        let mut parts = Vec::new();
        for target in &table.targets {
            let end = target.start.get().checked_add(target.len.get()).map(Sectors::new).and_then(Sectors::bytes);
            parts.push((end.ok_or_else(not_understood)?, self.target(target)?));
        }
        Ok(Part::Row(parts))
    }

    fn target(&mut self, target: &TableTarget) -> io::Result<Part> {
        match target.kind.as_str() {
            "linear" => {
                let place = params::linear(&target.params).ok_or_else(not_understood)?;
                self.from(place.device, place.start)
            }
            "striped" => {
                let striped = params::striped(&target.params).ok_or_else(not_understood)?;
                let legs = striped.legs.iter().map(|leg| self.from(leg.device, leg.start));
                let legs = legs.collect::<io::Result<Vec<_>>>()?;
                Ok(Part::Stripe { chunk: striped.chunk.bytes().ok_or_else(not_understood)?, legs })
            }
            "thin" => self.thin(&target.params),
            _ => Ok(Part::Other),
        }
    }

    fn from(&mut self, id: DeviceId, start: Sectors) -> io::Result<Part> {
        let start = start.bytes().ok_or_else(not_understood)?;
        Ok(match self.device(id)? {
            Part::Other => Part::Other,
            part if start == Bytes::ZERO => part,
            part => Part::From(start, Box::new(part)),
        })
    }

    fn thin(&mut self, params: &str) -> io::Result<Part> {
        let thin = thin::params::thin_table(params).ok_or_else(not_understood)?;
        let (_, pool) = self.table(thin.pool)?.ok_or_else(not_understood)?;
        let [target] = &pool.targets[..] else { return Err(not_understood()) };
        let pool = thin::params::pool_table(&target.params).ok_or_else(not_understood)?;
        Ok(Part::Thin { block: pool.block.bytes(), zeroes: pool.zeroes_new_blocks, has_origin: thin.origin.is_some() })
    }

    /// The live table of a device-mapper device; `None` for any other device.
    fn table(&mut self, id: DeviceId) -> io::Result<Option<(Arc<Control>, Table)>> {
        if !dm::is_mapped(id)? {
            return Ok(None);
        }
        let control = self.control.control().ok_or_else(no_control)?;
        if self.events.is_none() {
            self.events = Some(control.events()?);
        }
        let table = control.table(id)?;
        Ok(Some((control, table)))
    }

    /// Whether a device, or one below it, is allocated as it is written.
    fn is_sparse(&mut self, id: DeviceId) -> io::Result<bool> {
        let (mut next, mut seen) = (vec![id], HashSet::new());
        while let Some(id) = next.pop() {
            if !seen.insert(id) {
                continue;
            }
            let table = self.table(id)?;
            let sparse = |target: &TableTarget| matches!(target.kind.as_str(), "thin" | "snapshot");
            if table.is_some_and(|(_, table)| table.targets.iter().any(sparse)) {
                return Ok(true);
            }
            next.extend(sysfs::partition(id)?.map(|(disk, _)| disk));
            next.extend(sysfs::slaves(id)?);
        }
        Ok(false)
    }
}

fn no_control() -> io::Error {
    let why = "reading the table of the device, or of one below it, needs root and /dev/mapper/control";
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

fn not_understood() -> io::Error {
    io::Error::other("the table of the device, or of one below it, is not understood")
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]
mod tests {
    use super::*;

    const BLOCK: u64 = 64 << 10;

    fn thin(zeroes: bool, has_origin: bool) -> Part {
        Part::Thin { block: Bytes::new(BLOCK), zeroes, has_origin }
    }

    fn filled(top: Part, range: Range<u64>, len: u64) -> Vec<Range<u64>> {
        let provisioning = Provisioning { top, is_sparse: true, events: None };
        let filled = provisioning.filled(&(Bytes::new(range.start)..Bytes::new(range.end)), Bytes::new(len));
        filled.into_iter().map(|range| range.start.get()..range.end.get()).collect()
    }

    #[test]
    fn a_write_fills_the_blocks_that_it_is_in() {
        let len = 10 * BLOCK + 512;
        assert_eq!(filled(thin(false, false), 5..6, len), [0..BLOCK]);
        assert_eq!(filled(thin(false, false), BLOCK - 1..BLOCK + 1, len), [0..2 * BLOCK]);
        assert_eq!(filled(thin(false, true), len - 1..len, len), [10 * BLOCK..len]);
        assert_eq!(filled(thin(true, false), 5..6, len), [5..6]);
        // A window that begins inside a block has only the rest of it.
        let window = Part::From(Bytes::new(BLOCK / 2), Box::new(thin(false, false)));
        assert_eq!(filled(window.clone(), 5..6, len), [0..BLOCK / 2]);
        assert_eq!(filled(window.clone(), BLOCK / 2..BLOCK, len), [BLOCK / 2..3 * BLOCK / 2]);
        assert_eq!(filled(window, len - 1..len, len), [10 * BLOCK - BLOCK / 2..len]);
        let row = Part::Row(vec![(Bytes::new(BLOCK / 2), Part::Other), (Bytes::new(4 * BLOCK), thin(false, false))]);
        assert_eq!(filled(row.clone(), 10..20, 4 * BLOCK), [10..20]);
        assert_eq!(filled(row, 10..BLOCK, 4 * BLOCK), [10..3 * BLOCK / 2]);
    }

    #[test]
    fn a_discard_needs_a_whole_block() {
        let window = Part::From(Bytes::new(BLOCK / 2), Box::new(thin(true, false)));
        let stripe = Part::Stripe { chunk: Bytes::new(BLOCK), legs: vec![thin(true, false)] };
        for (top, range, discards) in [
            (thin(true, false), 1..2 * BLOCK - 1, false),
            (thin(true, false), 512..BLOCK, false),
            (thin(true, false), 512..2 * BLOCK, true),
            (thin(true, false), BLOCK..2 * BLOCK + 5, true),
            (window.clone(), 0..BLOCK, false),
            (window, BLOCK / 2..BLOCK + BLOCK / 2, true),
            (stripe, 5..6, true),
        ] {
            let range = Bytes::new(range.start)..Bytes::new(range.end);
            assert_eq!(top.discards_blocks(&range), discards, "{top:?} {range:?}");
        }
    }

    #[test]
    fn the_blocks_of_a_leg_are_chunks_of_the_stripe() {
        let chunk = BLOCK / 4;
        let stripe = Part::Stripe { chunk: Bytes::new(chunk), legs: vec![thin(false, false), thin(true, false)] };
        let chunks = |numbers: &[u64]| numbers.iter().map(|at| at * chunk..(at + 1) * chunk).collect::<Vec<_>>();
        assert_eq!(filled(stripe.clone(), 5..6, 32 * chunk), chunks(&[0, 2, 4, 6]));
        assert_eq!(filled(stripe.clone(), 10 * chunk..10 * chunk + 1, 32 * chunk), chunks(&[8, 10, 12, 14]));
        assert_eq!(filled(stripe.clone(), chunk..chunk + 1, 32 * chunk), [chunk..chunk + 1]);
        assert_eq!(filled(stripe, 0..8 * chunk, 32 * chunk), [0..8 * chunk]);
    }

    /// Each byte of a write is in what is filled, and the filled bytes of a leg are whole blocks of it.
    #[test]
    fn stripes_of_any_chunk_fill_whole_blocks() {
        for (chunk, count) in [(4096, 3), (BLOCK, 2), (3 * BLOCK, 2), (BLOCK / 2, 1)] {
            let stripe = Part::Stripe { chunk: Bytes::new(chunk), legs: vec![thin(false, false); count] };
            let len = 24 * BLOCK * count as u64;
            for start in [0, 5, chunk - 1, chunk, 7 * chunk + 9] {
                for size in [1, chunk, 2 * chunk + 1, 5 * chunk] {
                    let found = filled(stripe.clone(), start..start + size, len);
                    let has = |at: u64| found.iter().any(|range| range.contains(&at));
                    assert!((start..start + size).step_by(97).chain([start + size - 1]).all(has), "{found:?}");
                    let leg_of = |at: u64| at / chunk % count as u64;
                    let on_leg = |at: u64| at / chunk / count as u64 * chunk + at % chunk;
                    for leg in 0..count as u64 {
                        let all: Vec<u64> = (0..len).step_by(4096).filter(|&at| leg_of(at) == leg).collect();
                        for at in all.iter().filter(|&&at| has(at)) {
                            let block = on_leg(*at) / BLOCK;
                            assert!(all.iter().all(|&other| on_leg(other) / BLOCK != block || has(other)));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_discard_is_safe_only_where_all_is_thin_without_an_origin() {
        let unit = |top| Provisioning { top, is_sparse: true, events: None }.discard_unit().map(Bytes::get);
        assert_eq!(unit(thin(true, false)), Some(2 * BLOCK));
        assert_eq!(unit(thin(true, true)), None);
        assert_eq!(unit(Part::Other), None);
        let stripe = |second| Part::Stripe { chunk: Bytes::new(4096), legs: vec![thin(true, false), second] };
        assert_eq!(unit(stripe(thin(false, false))), Some((2 * BLOCK + 2 * 4096) * 2));
        assert_eq!(unit(stripe(Part::Other)), None);
        let row = Part::Row(vec![(Bytes::new(BLOCK), thin(true, false)), (Bytes::new(2 * BLOCK), thin(true, true))]);
        assert_eq!(unit(row), None);
    }
}
