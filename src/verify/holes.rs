//! Whether the holes of a device read as zeros.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::findings::Findings;
use super::pieces::Pieces;
use super::progress::Progress;
use super::sample::{Chosen, SAMPLE, choose};
use super::suspects::Suspects;
use super::{length, threads};
use crate::error::Result;
use crate::handle::Handle;
use crate::map::Extent;
use crate::units::Bytes;

/// The result of a verification of holes.
#[derive(Debug)]
pub struct HolesReport {
    /// The number of holes.
    pub holes: u64,
    /// Their bytes.
    pub bytes: Bytes,
    /// The number of pieces that were chosen, of a sample.
    pub chosen: u64,
    /// The bytes of holes that were read, or failed to be read.
    pub read: Bytes,
    /// What does not agree.
    pub findings: Findings,
}

/// Reads every hole, and compares it with zeros.
///
/// # Errors
/// When the device is gone.
pub fn holes(handle: &Handle, progress: &Progress) -> Result<HolesReport> {
    let len = handle.export().len()?;
    progress.begin(len);
    let mut counts = HoleCounts::default();
    let holes =
        Holes { extents: handle.walk(Bytes::ZERO..len), counts: &mut counts, passed: |data| progress.advance(data) };
    let (read, findings) = check(handle, Pieces::of(holes.map(|hole| hole.map(|hole| (hole, ())))), progress)?;
    Ok(HolesReport { holes: counts.holes, bytes: counts.bytes, chosen: 0, read, findings })
}

/// Reads `count` pieces of holes, chosen at random, and compares them with zeros. The same seed chooses the same pieces as long as
/// the device has the same holes.
///
/// # Errors
/// When the device is gone.
pub fn sample(handle: &Handle, count: u64, seed: u64, progress: &Progress) -> Result<HolesReport> {
    let range = Bytes::ZERO..handle.export().len()?;
    let mut counts = HoleCounts::default();
    Holes { extents: handle.walk(range.clone()), counts: &mut counts, passed: |_| {} }
        .try_for_each(|hole| hole.map(drop))?;
    let chosen = choose(count, counts.bytes, seed);
    let number = chosen.len() as u64;
    progress.begin(Bytes::new(number.saturating_mul(SAMPLE.get())).min(counts.bytes));
    let mut again = HoleCounts::default();
    let holes = Holes { extents: handle.walk(range), counts: &mut again, passed: |_| {} };
    let (read, findings) = check(handle, Pieces::of(Chosen::of(holes, chosen)), progress)?;
    Ok(HolesReport { holes: counts.holes, bytes: counts.bytes, chosen: number, read, findings })
}

/// Checks pieces of holes. Returns how many bytes they have, and what does not agree.
fn check(
    handle: &Handle,
    pieces: impl Iterator<Item = Result<(Range<Bytes>, ())>> + Send,
    progress: &Progress,
) -> Result<(Bytes, Findings)> {
    let read = AtomicU64::new(0);
    let suspects = Suspects::of(handle);
    threads::for_each(pieces, |(piece, ()), buffer| {
        let bytes = length(&piece) as u64;
        read.fetch_add(bytes, Ordering::Relaxed);
        suspects.check(piece, buffer)?;
        progress.advance(Bytes::new(bytes));
        Ok(())
    })?;
    Ok((Bytes::new(read.into_inner()), suspects.end()?))
}

/// The number of holes and their bytes.
#[derive(Default)]
struct HoleCounts {
    holes: u64,
    bytes: Bytes,
    /// The end of the last one.
    end: Option<Bytes>,
}

/// The holes among extents, which are counted. `passed` is called with the bytes of each extent of data.
struct Holes<'a, E, F> {
    extents: E,
    counts: &'a mut HoleCounts,
    passed: F,
}

impl<E, F> Iterator for Holes<'_, E, F>
where
    E: Iterator<Item = Result<(Bytes, Extent)>>,
    F: Fn(Bytes),
{
    type Item = Result<Range<Bytes>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (start, extent) = match self.extents.next()? {
                Ok(extent) => extent,
                Err(error) => return Some(Err(error)),
            };
            let bytes = extent.end.saturating_sub(start);
            if extent.kind.is_data() {
                (self.passed)(bytes);
                continue;
            }
            let counts = &mut *self.counts;
            // A hole may be in two answers, or consist of several kinds.
            counts.holes += u64::from(counts.end != Some(start));
            counts.end = Some(extent.end);
            counts.bytes = counts.bytes.saturating_add(bytes);
            return Some(Ok(start..extent.end));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::differences::tests::ranges;
    use super::*;
    use crate::map::ExtentKind;

    #[test]
    fn holes_that_touch_are_counted_once() {
        let extents =
            [(0, 5, ExtentKind::Hole), (5, 9, ExtentKind::Free), (9, 20, ExtentKind::Data), (20, 21, ExtentKind::Hole)];
        let extents = extents.map(|(start, end, kind)| Ok((Bytes::new(start), Extent { end: Bytes::new(end), kind })));
        let mut counts = HoleCounts::default();
        let passed = std::cell::Cell::new(0);
        let holes =
            Holes { extents: extents.into_iter(), counts: &mut counts, passed: |data: Bytes| passed.set(data.get()) };
        assert_eq!(holes.map(Result::unwrap).collect::<Vec<_>>(), ranges(&[(0, 5), (5, 9), (20, 21)]));
        assert_eq!((counts.holes, counts.bytes, passed.get()), (2, Bytes::new(10), 11));
    }
}
