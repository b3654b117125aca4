//! Ranges of holes that were not zero: which of them are wrong holes.
//!
//! Each suspect passes rounds, with pauses in between. In a round the map is asked, the range is read, and the map is asked again.
//! All answers come after the question ([`Handle::holes_now`]). A byte stays suspect only if it is in a hole in each answer, and
//! not zero in each read. After three rounds or more it is a wrong hole if
//!
//! - in one round the state of the stack was the same in both answers, so that no change was seen between them, and
//! - the guards of the stack find each change, or the bytes were the same in all rounds.
//!
//! A byte that is not zero between two true answers was written after the first one, and discarded before the second one. Where
//! the guards find each change, they find these two, so the state is another one. A guard need not find a write before it
//! completes, but its bytes may be readable before. The pauses are for that: only a write that is in progress from the first
//! round to the last one, 300 ms later, could be taken for a wrong hole. A file at the bottom is compared by its times. A disk or
//! server with writers that this host does not see has no guards of contents. There, a false alarm takes a writer that in each
//! round writes the same bytes between the first answer and the read, and discards them between the read and the second answer.
//!
//! What passes all rounds without a proof is undecided. `docs/correctness.md` has the argument.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::batch::Batch;
use super::differences::{intersection, not_zero};
use super::findings::Findings;
use super::{length, read_piece};
use crate::error::Result;
use crate::handle::Handle;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// The rounds of each suspect.
pub(super) const LEAST_ROUNDS: u32 = 3;

/// The rounds after which a suspect without proof is undecided.
const MOST_ROUNDS: u32 = 8;

/// The pause after a round.
pub(super) fn pause(round: u32) -> Duration {
    Duration::from_millis(if round == 0 { 50 } else { 250 })
}

/// The suspects of one device. They are collected, and decided many at a time.
pub(super) struct Suspects<'a> {
    handle: &'a Handle,
    waiting: Batch<Suspect>,
    findings: Mutex<Findings>,
}

impl<'a> Suspects<'a> {
    pub(super) fn of(handle: &'a Handle) -> Self {
        Self { handle, waiting: Batch::default(), findings: Mutex::default() }
    }

    pub(super) fn findings(&self) -> MutexGuard<'_, Findings> {
        self.findings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a piece of a hole. It is a suspect if it is not zero.
    ///
    /// # Errors
    /// When the device is gone.
    pub(super) fn check(&self, piece: Range<Bytes>, buffer: &mut AlignedBuffer) -> Result<()> {
        match read_piece(self.handle, buffer, &piece) {
            Ok(bytes) => {
                let ranges = not_zero(bytes, piece.start);
                self.add(piece, ranges)
            }
            Err(error) => {
                self.findings().add_unread(&piece, &error);
                Ok(())
            }
        }
    }

    /// Adds ranges of a piece that were not zero, if there are any.
    ///
    /// # Errors
    /// When the device is gone.
    pub(super) fn add(&self, piece: Range<Bytes>, ranges: Vec<Range<Bytes>>) -> Result<()> {
        if ranges.is_empty() {
            return Ok(());
        }
        self.decide(self.waiting.add(Suspect::new(piece, ranges)))
    }

    /// Decides the remaining suspects, and returns all findings.
    ///
    /// # Errors
    /// When the device is gone.
    pub(super) fn end(self) -> Result<Findings> {
        self.decide(self.waiting.take())?;
        Ok(self.findings.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn decide(&self, mut suspects: Vec<Suspect>) -> Result<()> {
        let mut buffer = AlignedBuffer::new();
        for round in 0..MOST_ROUNDS {
            for suspect in &mut suspects {
                suspect.pass_round(self, &mut buffer)?;
            }
            suspects.retain(|suspect| !suspect.ranges.is_empty());
            if round + 1 >= LEAST_ROUNDS {
                let mut findings = self.findings();
                for suspect in suspects.extract_if(.., |suspect| suspect.is_proven()) {
                    suspect.ranges.into_iter().for_each(|range| findings.wrong.add(range));
                }
            }
            if suspects.is_empty() {
                return Ok(());
            }
            if round + 1 < MOST_ROUNDS {
                thread::sleep(pause(round));
            }
        }
        let mut findings = self.findings();
        suspects.into_iter().flat_map(|suspect| suspect.ranges).for_each(|range| findings.undecided.add(range));
        Ok(())
    }
}

/// A piece of a hole in which some bytes were not zero.
struct Suspect {
    piece: Range<Bytes>,
    /// What was not zero in each read, and in a hole in each answer.
    ranges: Vec<Range<Bytes>>,
    /// A hash of these bytes in the last read.
    hash: Option<u64>,
    /// How many reads in a row had the same bytes as the one before.
    repeated: u32,
    /// In some round no change was seen.
    was_quiet: bool,
    /// The guards find each change.
    is_guarded: bool,
}

impl Suspect {
    fn new(piece: Range<Bytes>, ranges: Vec<Range<Bytes>>) -> Self {
        Self { piece, ranges, hash: None, repeated: 0, was_quiet: false, is_guarded: false }
    }

    fn is_proven(&self) -> bool {
        self.was_quiet && (self.is_guarded || self.repeated + 1 >= LEAST_ROUNDS)
    }

    /// Asks, reads, and asks again. What is no suspect any more leaves the ranges.
    fn pass_round(&mut self, suspects: &Suspects<'_>, buffer: &mut AlignedBuffer) -> Result<()> {
        let before = suspects.handle.holes_now(&self.piece)?;
        self.keep(&before.holes);
        if self.ranges.is_empty() {
            return Ok(());
        }
        match read_piece(suspects.handle, buffer, &self.piece) {
            Ok(bytes) => self.note_read(bytes),
            Err(error) => {
                suspects.findings().add_unread(&self.piece, &error);
                self.ranges.clear();
                return Ok(());
            }
        }
        let after = suspects.handle.holes_now(&self.piece)?;
        self.keep(&after.holes);
        let state = after.state.filter(|_| after.state == before.state);
        self.was_quiet |= state.is_some();
        self.is_guarded = state.map_or(self.is_guarded, |state| state.is_guarded);
        Ok(())
    }

    fn keep(&mut self, others: &[Range<Bytes>]) {
        let kept = intersection(&self.ranges, others);
        if kept != self.ranges {
            self.hash = None;
            self.ranges = kept;
        }
    }

    fn note_read(&mut self, bytes: &[u8]) {
        self.keep(&not_zero(bytes, self.piece.start));
        let mut hasher = DefaultHasher::new();
        for range in &self.ranges {
            let before = self.piece.start..range.start;
            bytes.get(length(&before)..length(&before) + length(range)).hash(&mut hasher);
        }
        let hash = hasher.finish();
        self.repeated = if self.hash == Some(hash) { self.repeated + 1 } else { 0 };
        self.hash = Some(hash);
    }
}

#[cfg(test)]
mod tests;
