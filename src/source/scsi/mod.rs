//! SCSI disks: GET LBA STATUS tells which blocks have no storage behind them.
//!
//! A hole needs two promises. The disk promises in READ CAPACITY(16), and in VPD page B2h where it has one, that a block
//! without storage reads as zeros; and it says of this block, now, that it is deallocated or anchored. The second is
//! asked each time a hole is claimed, because a disk in a storage network has other writers than this host, which move
//! no counter here. Only data is remembered: that is allowed whatever they do.
//!
//! A disk that cannot keep a promise, or fails a command, is not asked again as long as the map lives.

pub mod pages;
mod target;
mod walks;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use self::target::{Failure, Target};
use self::walks::Walks;
use crate::error::Error;
use crate::map::{HoleMap, Kind, Run};
use crate::source::{Layer, dense};
use crate::units::Bytes;

/// What a SCSI disk is called in a layer.
const KIND: &str = "SCSI disk";
/// Runs of data that are remembered at most; then all are forgotten.
const KNOWN_MAX: usize = 4096;
/// What a walk that takes too long is told to be data at once.
const RESPITE: Bytes = Bytes::new(64 << 20);
/// How often a block is asked again because the device reports an event instead.
const ATTEMPTS: u32 = 4;

/// The holes of an open SCSI disk (the whole disk, not a partition) of `len` bytes in logical blocks of `block` bytes.
///
/// The layer is dense, with the reason, when the disk makes no promise or refuses the first question.
pub fn layer(name: &str, file: Arc<File>, len: Bytes, block: Bytes) -> Layer {
    match ScsiMap::new(Target::disk(file), len, block) {
        Ok(map) => Layer {
            name: name.to_owned(),
            kind: KIND.to_owned(),
            holes_from: "GET LBA STATUS".to_owned(),
            map: Arc::new(map),
            below: Vec::new(),
        },
        Err(reason) => dense::layer(name, KIND, len, reason.to_string()),
    }
}

/// An NVMe disk of `len` bytes: all data.
pub fn nvme_layer(name: &str, len: Bytes) -> Layer {
    let reason = "NVMe disks are not asked: it needs Get LBA Status with action type 02h (tracked allocated LBAs), \
                  which few of them have, and a namespace that reports zeros for deallocated blocks (DLFEAT 001b)";
    dense::layer(name, "NVMe disk", len, reason)
}

struct ScsiMap {
    target: Target,
    len: Bytes,
    block: Bytes,
    known: Mutex<KnownData>,
    walks: Mutex<Walks>,
    gave_up: OnceLock<String>,
}

impl ScsiMap {
    fn new(target: Target, len: Bytes, block: Bytes) -> Result<Self, Error> {
        target.promise(len, block)?;
        let map =
            Self { target, len, block, known: Mutex::default(), walks: Mutex::default(), gave_up: OnceLock::new() };
        if len > Bytes::ZERO {
            map.ask(Bytes::ZERO)?;
        }
        Ok(map)
    }

    /// The run at `offset`, as the disk says now. What is data is remembered.
    fn ask(&self, offset: Bytes) -> Result<Run, Error> {
        let start = offset.align_down(self.block);
        for _ in 0..ATTEMPTS {
            match self.target.status(start, self.block, self.len) {
                Ok(status) => {
                    if let Some(fault) = status.fault {
                        log::debug!("GET LBA STATUS at byte {start}: {fault}: data from there on");
                    }
                    self.remember(start, &status.runs);
                    let nothing = Run { end: self.len, kind: Kind::Data };
                    return Ok(status.runs.first().copied().unwrap_or(nothing));
                }
                Err(Failure::Failed(error)) => return Err(error),
                Err(Failure::Attention) => self.target.promise(self.len, self.block)?,
            }
        }
        Err(Error::failed("GET LBA STATUS keeps being answered with UNIT ATTENTION"))
    }

    fn remember(&self, start: Bytes, runs: &[Run]) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut start = start;
        for run in runs {
            if run.kind == Kind::Data {
                known.insert(start, run.end);
            }
            start = run.end;
        }
    }

    fn give_up(&self, error: &Error) {
        if self.gave_up.set(error.to_string()).is_ok() {
            log::warn!("SCSI disk shown as all data: {error}");
        }
    }
}

impl HoleMap for ScsiMap {
    fn len(&self) -> Bytes {
        self.len
    }

    fn run_at(&self, offset: Bytes) -> Run {
        if offset >= self.len {
            return Run { end: offset.saturating_add(Bytes::new(1)), kind: Kind::Data };
        }
        let data_to = |end: Bytes| Run { end: end.min(self.len), kind: Kind::Data };
        if self.gave_up.get().is_some() {
            return data_to(self.len);
        }
        if let Some(end) = self.known.lock().unwrap_or_else(PoisonError::into_inner).end_of(offset) {
            return data_to(end);
        }
        let walks = || self.walks.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(walked) = walks().join(offset) else {
            log::warn!("SCSI disk takes too long to tell where a hole ends: data at byte {offset}");
            return data_to(offset.saturating_add(RESPITE));
        };
        let begin = Instant::now();
        match self.ask(offset) {
            Ok(run) => {
                if run.kind == Kind::Hole {
                    walks().leave(run.end, walked.saturating_add(begin.elapsed()));
                }
                run
            }
            Err(error) => {
                self.give_up(&error);
                data_to(self.len)
            }
        }
    }

    fn dense_because(&self) -> Option<String> {
        self.gave_up.get().cloned()
    }

    fn memory(&self) -> Bytes {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).runs.len();
        let entry = 2 * size_of::<(Bytes, Bytes)>();
        Bytes::new(u64::try_from(known.saturating_mul(entry)).unwrap_or(u64::MAX))
    }
}

/// Ranges that were data when they were last asked, by their start; they do not overlap.
#[derive(Default)]
struct KnownData {
    runs: BTreeMap<Bytes, Bytes>,
}

impl KnownData {
    /// The end of the known run of data that holds `offset`.
    fn end_of(&self, offset: Bytes) -> Option<Bytes> {
        let (_, end) = self.runs.range(..=offset).next_back()?;
        (*end > offset).then_some(*end)
    }

    /// Adds `[start, end)`, joined with what it touches.
    fn insert(&mut self, mut start: Bytes, mut end: Bytes) {
        while let Some((first, last)) = self.runs.range(..=end).next_back().map(|(first, last)| (*first, *last)) {
            if last < start {
                break;
            }
            self.runs.remove(&first);
            start = start.min(first);
            end = end.max(last);
        }
        if self.runs.len() >= KNOWN_MAX {
            self.runs.clear();
        }
        self.runs.insert(start, end);
    }
}

#[cfg(test)]
mod tests;
