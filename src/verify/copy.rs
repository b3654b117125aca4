//! Whether a copy has the bytes of a device.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::batch::Batch;
use super::differences::{between, not_zero};
use super::findings::{Findings, Ranges};
use super::pieces::Pieces;
use super::progress::Progress;
use super::suspects::{LEAST_ROUNDS, Suspects, pause};
use super::{length, read_piece, threads};
use crate::error::Result;
use crate::handle::{Handle, Walk};
use crate::map::Extent;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// The result of a comparison.
#[derive(Debug)]
pub struct CopyReport {
    /// The length of the device.
    pub device_len: Bytes,
    /// The length of the copy. Only the part that both have is compared.
    pub copy_len: Bytes,
    /// Bytes in the extents of each kind, up to the end of the shorter one.
    pub counts: Counts,
    /// What does not agree: differences, wrong holes of the device, and what could not be read of it.
    pub device: Findings,
    /// Wrong holes of the copy, and what could not be read of it.
    pub copy: Findings,
}

/// Bytes that are holes in both, in one, or in neither.
#[derive(Debug, Default)]
pub struct Counts {
    /// Holes in both. They are not read.
    pub holes: Bytes,
    /// Holes in the device that are data in the copy.
    pub only_device: Bytes,
    /// Holes in the copy that are data in the device.
    pub only_copy: Bytes,
    /// Data in both.
    pub data: Bytes,
}

impl CopyReport {
    /// Whether the copy has the length and the bytes of the device, and all that was read of their holes was zero.
    pub fn agrees(&self) -> bool {
        self.device_len == self.copy_len && self.device.is_empty() && self.copy.is_empty()
    }
}

/// Compares a copy with a device. A range that is a hole in one of them is read from the other one, and compared with zeros.
///
/// # Errors
/// When one of them is gone.
pub fn copy(device: &Handle, copy: &Handle, progress: &Progress) -> Result<CopyReport> {
    let (device_len, copy_len) = (device.export().len()?, copy.export().len()?);
    let len = device_len.min(copy_len);
    progress.begin(len);
    let mut counts = Counts::default();
    let segments = Segments {
        at: Bytes::ZERO,
        device: Side::of(device, len),
        copy: Side::of(copy, len),
        counts: &mut counts,
        passed: |bytes| progress.advance(bytes),
    };
    let pair = Pair {
        device: Suspects::of(device),
        copy: Suspects::of(copy),
        handles: [device, copy],
        waiting: Batch::default(),
        different: Mutex::default(),
    };
    threads::for_each(Pieces::of(segments), |(piece, kind), buffers| {
        let bytes = Bytes::new(length(&piece) as u64);
        pair.compare(piece, kind, buffers)?;
        progress.advance(bytes);
        Ok(())
    })?;
    pair.decide(pair.waiting.take())?;
    let different = pair.different.into_inner().unwrap_or_else(PoisonError::into_inner);
    let findings = Findings { different, ..pair.device.end()? };
    Ok(CopyReport { device_len, copy_len, counts, device: findings, copy: pair.copy.end()? })
}

/// Which sides of a range are holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    DeviceHole,
    CopyHole,
    Data,
}

/// Two buffers for one piece.
#[derive(Default)]
struct PieceBuffers {
    device: AlignedBuffer,
    copy: AlignedBuffer,
}

/// A piece that differed.
struct Different {
    piece: Range<Bytes>,
    kind: Kind,
    ranges: Vec<Range<Bytes>>,
}

/// The device and its copy.
struct Pair<'a> {
    device: Suspects<'a>,
    copy: Suspects<'a>,
    handles: [&'a Handle; 2],
    waiting: Batch<Different>,
    different: Mutex<Ranges>,
}

impl Pair<'_> {
    /// Reads a piece of what is data, and compares it with the other side.
    fn compare(&self, piece: Range<Bytes>, kind: Kind, buffers: &mut PieceBuffers) -> Result<()> {
        let ranges = match kind {
            Kind::Data => self.differences(&piece, buffers),
            Kind::DeviceHole => {
                read(&self.copy, self.handles[1], &mut buffers.copy, &piece).map(|bytes| not_zero(bytes, piece.start))
            }
            Kind::CopyHole => read(&self.device, self.handles[0], &mut buffers.device, &piece)
                .map(|bytes| not_zero(bytes, piece.start)),
        };
        let Some(ranges) = ranges.filter(|ranges| !ranges.is_empty()) else { return Ok(()) };
        self.decide(self.waiting.add(Different { piece, kind, ranges }))
    }

    /// Reads a piece from both, and compares it. `None` if it cannot be read.
    fn differences(&self, piece: &Range<Bytes>, buffers: &mut PieceBuffers) -> Option<Vec<Range<Bytes>>> {
        let (device, copy) = self.read_both(piece, buffers)?;
        Some(between(device, copy, piece.start))
    }

    fn read_both<'b>(&self, piece: &Range<Bytes>, buffers: &'b mut PieceBuffers) -> Option<(&'b [u8], &'b [u8])> {
        let [device, copy] = self.handles;
        let device = read(&self.device, device, &mut buffers.device, piece);
        let copy = read(&self.copy, copy, &mut buffers.copy, piece);
        device.zip(copy)
    }

    /// Reads pieces again from both sides. Those that differ each time are differences.
    fn decide(&self, mut pieces: Vec<Different>) -> Result<()> {
        let mut buffers = PieceBuffers::default();
        for round in 0..LEAST_ROUNDS - 1 {
            if pieces.is_empty() {
                return Ok(());
            }
            thread::sleep(pause(round));
            for piece in &mut pieces {
                self.compare_again(piece, &mut buffers)?;
            }
            pieces.retain(|piece| !piece.ranges.is_empty());
        }
        let mut different = self.different.lock().unwrap_or_else(PoisonError::into_inner);
        pieces.into_iter().flat_map(|piece| piece.ranges).for_each(|range| different.add(range));
        Ok(())
    }

    /// Compares a piece again, with the bytes of a hole in place of zeros. If they are equal now, but not zero, the hole may be a
    /// wrong one.
    fn compare_again(&self, piece: &mut Different, buffers: &mut PieceBuffers) -> Result<()> {
        piece.ranges.clear();
        let Some((device, copy)) = self.read_both(&piece.piece, buffers) else { return Ok(()) };
        piece.ranges = between(device, copy, piece.piece.start);
        let (side, bytes) = match piece.kind {
            Kind::DeviceHole => (&self.device, device),
            Kind::CopyHole => (&self.copy, copy),
            Kind::Data => return Ok(()),
        };
        match piece.ranges.is_empty() {
            true => side.add(piece.piece.clone(), not_zero(bytes, piece.piece.start)),
            false => Ok(()),
        }
    }
}

/// The bytes of a piece. `None` if they cannot be read, which is one of the findings of that side.
fn read<'a>(
    side: &Suspects<'_>,
    handle: &Handle,
    buffer: &'a mut AlignedBuffer,
    piece: &Range<Bytes>,
) -> Option<&'a [u8]> {
    read_piece(handle, buffer, piece).inspect_err(|error| side.findings().add_unread(piece, error)).ok()
}

/// The extents of one side, of which the current one is kept.
struct Side<I> {
    extents: I,
    /// The end of the current extent, and whether it is a hole.
    current: Option<(Bytes, bool)>,
}

impl<'a> Side<Walk<'a>> {
    fn of(handle: &'a Handle, len: Bytes) -> Self {
        Self { extents: handle.walk(Bytes::ZERO..len), current: None }
    }
}

impl<I: Iterator<Item = Result<(Bytes, Extent)>>> Side<I> {
    /// The extent that ends after `at`.
    fn after(&mut self, at: Bytes) -> Option<Result<(Bytes, bool)>> {
        while self.current.is_none_or(|(end, _)| end <= at) {
            match self.extents.next()? {
                Ok((_, extent)) => self.current = Some((extent.end, extent.kind.is_hole())),
                Err(error) => return Some(Err(error)),
            }
        }
        self.current.map(Ok)
    }
}

/// The ranges that must be read from one side or from both. All are counted; `passed` is called with the bytes of each hole in
/// both.
struct Segments<'a, I, F> {
    /// The end of the last one.
    at: Bytes,
    device: Side<I>,
    copy: Side<I>,
    counts: &'a mut Counts,
    passed: F,
}

impl<I, F> Iterator for Segments<'_, I, F>
where
    I: Iterator<Item = Result<(Bytes, Extent)>>,
    F: Fn(Bytes),
{
    type Item = Result<(Range<Bytes>, Kind)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (device, copy) = match (self.device.after(self.at)?, self.copy.after(self.at)?) {
                (Ok(device), Ok(copy)) => (device, copy),
                (Err(error), _) | (_, Err(error)) => return Some(Err(error)),
            };
            let range = self.at..device.0.min(copy.0);
            self.at = range.end;
            let bytes = range.end.saturating_sub(range.start);
            let (count, kind) = match (device.1, copy.1) {
                (true, true) => (&mut self.counts.holes, None),
                (true, false) => (&mut self.counts.only_device, Some(Kind::DeviceHole)),
                (false, true) => (&mut self.counts.only_copy, Some(Kind::CopyHole)),
                (false, false) => (&mut self.counts.data, Some(Kind::Data)),
            };
            *count = count.saturating_add(bytes);
            match kind {
                Some(kind) => return Some(Ok((range, kind))),
                None => (self.passed)(bytes),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::ExtentKind;

    fn side(extents: &[(u64, bool)]) -> Side<std::vec::IntoIter<Result<(Bytes, Extent)>>> {
        let mut start = Bytes::ZERO;
        let extents = extents.iter().map(|&(end, is_hole)| {
            let kind = if is_hole { ExtentKind::Hole } else { ExtentKind::Data };
            let extent = Extent { end: Bytes::new(end), kind };
            Ok((std::mem::replace(&mut start, extent.end), extent))
        });
        Side { extents: extents.collect::<Vec<_>>().into_iter(), current: None }
    }

    #[test]
    fn what_is_a_hole_in_both_is_not_read() {
        let mut counts = Counts::default();
        let passed = std::cell::Cell::new(0);
        let segments = Segments {
            at: Bytes::ZERO,
            device: side(&[(10, true), (20, false), (30, false), (50, true)]),
            copy: side(&[(5, true), (15, false), (25, true), (50, true)]),
            counts: &mut counts,
            passed: |bytes: Bytes| passed.set(passed.get() + bytes.get()),
        };
        let found: Vec<_> =
            segments.map(Result::unwrap).map(|(range, kind)| (range.start.get(), range.end.get(), kind)).collect();
        let expected = [
            (5, 10, Kind::DeviceHole),
            (10, 15, Kind::Data),
            (15, 20, Kind::CopyHole),
            (20, 25, Kind::CopyHole),
            (25, 30, Kind::CopyHole),
        ];
        assert_eq!(found, expected);
        let bytes = [counts.holes, counts.only_device, counts.only_copy, counts.data].map(Bytes::get);
        assert_eq!((bytes, passed.get()), ([25, 5, 15, 5], 25));
    }

    #[test]
    fn an_error_of_one_side_ends_the_comparison() {
        let mut counts = Counts::default();
        let mut copy = side(&[(5, false)]);
        copy.extents = vec![Err(crate::error::Error::failed("gone"))].into_iter();
        let device = side(&[(5, false)]);
        let mut segments = Segments { at: Bytes::ZERO, device, copy, counts: &mut counts, passed: |_| {} };
        assert!(segments.next().is_some_and(|segment| segment.is_err()));
    }
}
