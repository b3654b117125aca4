//! Writes to pools that leave old bytes in a new block (`skip_block_zeroing`).
//!
//! Of a block that is not known to be mapped, all is written: what it reads as before the write, with the new bytes. An unmapped
//! block reads as zeros, or as its external origin, so no old byte of the pool remains in it.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{DeviceWriter, len};
use crate::export::range_locks::Use;
use crate::source::Provisioning;
use crate::sys::buffer::AlignedBuffer;
use crate::sys::device::DeviceId;
use crate::sys::sysfs::StatFile;
use crate::units::Bytes;

/// The number of ranges that are remembered.
const REMEMBERED: usize = 256;

/// A buffer of more bytes is not kept.
const KEPT: usize = 16 << 20;

/// Ranges that this writer has written as whole blocks of their pool, so that they are mapped: until something is discarded.
pub(super) struct Filled {
    /// The counters of the device; `None` where they cannot be read, and nothing is remembered.
    counters: Option<StatFile>,
    state: Mutex<State>,
    /// Held while blocks are filled: one at a time, because a block may be as large as 1 GiB.
    buffer: Mutex<AlignedBuffer>,
}

#[derive(Default)]
struct State {
    ranges: VecDeque<Range<Bytes>>,
    /// The number of times that all was forgotten.
    forgotten: u64,
    /// The number of discards of the device when the first range was remembered.
    discards: Option<u64>,
}

impl Filled {
    pub(super) fn new(id: DeviceId) -> Self {
        Self { counters: StatFile::open(id).ok(), state: Mutex::default(), buffer: Mutex::default() }
    }

    /// Forgets all ranges: some of them may not be mapped any more.
    pub(super) fn forget(&self) {
        let mut state = self.state();
        state.ranges.clear();
        state.discards = None;
        state.forgotten += 1;
    }

    /// The number that [`Filled::remember`] needs.
    fn forgotten(&self) -> u64 {
        self.state().forgotten
    }

    /// Whether all of these ranges are known to be mapped.
    fn has(&self, ranges: &[Range<Bytes>]) -> bool {
        let mut state = self.state();
        if state.discards.is_none() || state.discards != self.discards() {
            state.ranges.clear();
            state.discards = None;
        }
        let has = |range: &Range<Bytes>| {
            state.ranges.iter().any(|known| known.start <= range.start && range.end <= known.end)
        };
        ranges.iter().all(has)
    }

    /// Remembers ranges that were written as a whole, unless something was forgotten since it was `forgotten`.
    fn remember(&self, ranges: &[Range<Bytes>], forgotten: u64, discards: Option<u64>) {
        let mut state = self.state();
        if state.forgotten != forgotten || discards.is_none() {
            return;
        }
        if state.discards != discards {
            state.ranges.clear();
            state.discards = discards;
        }
        for range in ranges {
            match state.ranges.back_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => state.ranges.push_back(range.clone()),
            }
        }
        let surplus = state.ranges.len().saturating_sub(REMEMBERED);
        state.ranges.drain(..surplus);
    }

    /// The number of discards of the device so far, by all programs.
    fn discards(&self) -> Option<u64> {
        Some(self.counters.as_ref()?.read().ok()?.discards)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DeviceWriter {
    /// Writes so that no old byte of a pool becomes visible.
    pub(super) fn write_filled(&self, provisioning: &Provisioning, bytes: &[u8], offset: Bytes) -> io::Result<()> {
        let range = offset..offset.saturating_add(Bytes::new(bytes.len() as u64));
        let end = self.whole_end()?;
        let inside = range.start.min(end)..range.end.min(end);
        let blocks = provisioning.filled(&inside, end).into_iter().map(|block| self.around(&block)).collect::<Vec<_>>();
        let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else {
            return self.write_parts(bytes, offset, true);
        };
        let hull = first.start..last.end;
        let (forgotten, discards) = (self.filled.forgotten(), self.filled.discards());
        let is_whole = blocks.len() == 1 && hull == range;
        if is_whole || self.filled.has(&blocks) {
            let how = if range == self.around(&range) { Use::Shared } else { Use::Alone };
            let _lock = self.locks.lock(hull.clone(), how);
            // The blocks may have been discarded before the lock.
            if is_whole || self.filled.has(&blocks) {
                self.write_parts(bytes, offset, false)?;
                if is_whole {
                    self.filled.remember(&blocks, forgotten, discards);
                }
                return Ok(());
            }
        }
        let _lock = self.locks.lock(hull, Use::Alone);
        let count = len(&inside)?;
        self.fill(&blocks, &bytes[..count], offset)?;
        self.filled.remember(&blocks, forgotten, discards);
        match count < bytes.len() {
            true => self.write_parts(&bytes[count..], end, false),
            false => Ok(()),
        }
    }

    /// Writes all of `blocks` with the new bytes in them. All is read before the first write, which may map a block.
    fn fill(&self, blocks: &[Range<Bytes>], bytes: &[u8], offset: Bytes) -> io::Result<()> {
        let mut buffer = self.filled.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut total = 0_usize;
        for block in blocks {
            total = total.checked_add(len(block)?).ok_or(io::ErrorKind::OutOfMemory)?;
        }
        let mut rest = buffer.resize(total);
        let mut places = Vec::new();
        for block in blocks {
            let (place, others) = rest.split_at_mut(len(block)?);
            rest = others;
            self.read_blocks(place, block.start)?;
            overlay(place, block, bytes, offset)?;
            places.push((place, block.start));
        }
        for (place, start) in places {
            self.direct.write_all_at(place, start.get())?;
        }
        if total > KEPT {
            *buffer = AlignedBuffer::new();
        }
        Ok(())
    }
}

/// Copies those of `bytes`, which belong to `offset`, that are inside of a block to their place in it.
fn overlay(place: &mut [u8], block: &Range<Bytes>, bytes: &[u8], offset: Bytes) -> io::Result<()> {
    let end = offset.saturating_add(Bytes::new(bytes.len() as u64));
    let inside = block.start.max(offset)..block.end.min(end);
    if inside.start < inside.end {
        let (at, from, size) = (len(&(block.start..inside.start))?, len(&(offset..inside.start))?, len(&inside)?);
        place[at..at + size].copy_from_slice(&bytes[from..from + size]);
    }
    Ok(())
}
