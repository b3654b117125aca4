//! One open of a device: its reads, with reading ahead by the map.
//!
//! A client that copies a sparse device looks for the next extent, reads it, and looks for the next one. The kernel cannot
//! read ahead of it, since it does not know where the next extent is. The map does: as soon as a client reads in order,
//! the extents that come next are fetched, several at a time, into buffers of a limited size.
//!
//! # Freshness
//!
//! A read returns no bytes that are older than the open of its file. So a piece that was fetched is used only for the
//! open file that it was fetched for, and not for longer than a second. It is dropped when the device is opened once more,
//! since the kernel's page cache, into which the bytes go, is shared by all opens of a file; and when a guard of the stack
//! finds a change. Both add one to the generation of the handle, and a piece is used only in the generation in which its
//! read was begun. The kernel drops the cached pages of a file at each open, after the reply to the open, and waits for
//! the reads that are in progress (`fuse_open` or `fuse_open_common` of `fs/fuse/file.c`, `invalidate_inode_pages2`). So bytes
//! that were passed to the kernel before an open are not seen through that open.
//!
//! A client that reads with `O_DIRECT` gets nothing that was fetched, and neither does any client of a mount with
//! `direct_io`.

mod duties;
mod pattern;
mod shared;
#[cfg(test)]
mod tests;
mod window;

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Handle;
use crate::export::ReadQueue;
use crate::map::Extent;
use crate::map::view::Whence;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;
use duties::{Filling, Waiting};
use pattern::{Pattern, Step};
use window::{Found, Part, Window};

pub use shared::ReadAhead;

/// What is fetched ahead first, in pieces and in bytes. Each time the client has used half of it, twice as much is fetched.
const FIRST_PIECES: usize = 8;
const FIRST_BYTES: Bytes = Bytes::new(512 << 10);

/// The shortest piece that a long extent is divided into.
const SHORTEST_PIECE: Bytes = Bytes::new(128 << 10);

/// How far behind an extent is fetched at most. The kernel's own reading ahead does not know where an extent ends, and
/// asks for more than the extent in one request.
const LONGEST_EXCESS: Bytes = Bytes::new(128 << 10);

/// The longest piece, where the reads of the device may be as long. Twice as much gains nothing on a disk or a server, and a
/// client waits longer for the first byte of it.
const LONGEST_PIECE: Bytes = Bytes::new(1 << 20);

/// How long the last close of a device waits for a thread that begins reads.
const FINISH: Duration = Duration::from_secs(1);

/// The extents that are looked at for one plan, for each piece: neighbours need not differ in kind.
const EXTENTS_PER_PIECE: usize = 4;

/// One open of a device.
pub struct Reader {
    handle: Arc<Handle>,
    ahead: Arc<ReadAhead>,
    state: Mutex<State>,
    /// Notified when the state of a piece has changed.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pattern: Pattern,
    window: Window,
    /// How much may be fetched ahead now.
    goal_pieces: usize,
    goal_bytes: Bytes,
    /// The length of the client's longest read.
    longest_read: Bytes,
    /// How much is fetched behind the end of an extent.
    excess: Bytes,
    /// Some thread plans and begins reads.
    is_filling: bool,
    /// That thread begins reads.
    is_beginning: bool,
    /// The device is being closed. No reads are begun any more.
    is_closed: bool,
    /// The pieces are for something that the client no longer does.
    is_stopped: bool,
    /// Whether the file is in [`ReadAhead::readers`].
    is_listed: bool,
}

/// Bytes for a client.
pub enum ReadBytes<'a> {
    /// Of several pieces, copied into the caller's buffer.
    Copied(&'a [u8]),
    /// Of one piece.
    Piece(Arc<AlignedBuffer>, Range<usize>),
}

impl AsRef<[u8]> for ReadBytes<'_> {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Copied(bytes) => bytes,
            Self::Piece(buffer, range) => &buffer.bytes()[range.clone()],
        }
    }
}

impl Reader {
    /// A new open of a device.
    pub fn new(handle: Arc<Handle>, ahead: Arc<ReadAhead>) -> Arc<Self> {
        Arc::new(Self { handle, ahead, state: Mutex::default(), changed: Condvar::new() })
    }

    /// The device.
    pub fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    /// The bytes of a read, if all of them were fetched ahead. Waits until they are complete. `buffer` is used where they
    /// are in several pieces. Otherwise `None`, and the caller reads from the device.
    ///
    /// Not for a client that reads with `O_DIRECT`.
    pub fn fetched<'a>(
        self: &Arc<Self>,
        buffer: &'a mut AlignedBuffer,
        offset: Bytes,
        size: usize,
    ) -> Option<ReadBytes<'a>> {
        let queue = self.queue()?;
        let len = self.handle.export().len().ok()?;
        let end = offset.saturating_add(Bytes::new(size as u64)).min(len);
        let range = (offset < end).then_some(offset..end)?;
        // Looked up once: it may take system calls.
        let first = self.handle.expected_extent(range.start);
        let expected = |at: Bytes| if at == range.start { first } else { self.handle.expected_extent(at) };
        let step = {
            let mut state = self.lock();
            let step = state.pattern.note_read(&range, expected);
            if step == Step::Elsewhere {
                state.stop();
            }
            if let Some(excess) = self.excess(&range, first).filter(|&excess| excess <= LONGEST_EXCESS) {
                state.excess = state.excess.max(excess);
            }
            state.longest_read = state.longest_read.max(range.end.saturating_sub(range.start));
            step
        };
        let parts = self.parts(&range);
        if parts.is_none() && step != Step::Elsewhere {
            // Before the caller's read, so that both are in progress at the same time. That read does not wait for a map.
            self.fetch_more_from(queue, Unknown::Ends);
        }
        parts.map(|parts| copied(parts, buffer))
    }

    /// Fetches what the client will read next. Called after the reply to a read.
    pub fn fetch_more(self: &Arc<Self>) {
        if let Some(queue) = self.queue() {
            self.fetch_more_from(queue, Unknown::IsAsked);
        }
    }

    /// Gives up what is being fetched, and waits for it for a limited time. Nothing is fetched after that. Called when the
    /// device is closed, by a thread that holds no lock.
    pub fn finish(&self) {
        let until = Instant::now() + FINISH;
        let mut state = self.lock();
        state.is_closed = true;
        state.window.clear();
        // The client may close the file as soon as it has its last bytes, while more are fetched.
        while state.is_beginning {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        if let Some(queue) = self.queue() {
            queue.finish();
        }
    }

    /// What reads are begun with, if anything can be fetched.
    fn queue(&self) -> Option<&dyn ReadQueue> {
        self.handle.export().read_queue().filter(|_| self.ahead.is_used())
    }

    /// The parts of a range in the pieces, if these have all of it.
    fn parts(&self, range: &Range<Bytes>) -> Option<Vec<Part>> {
        let mut state = self.lock();
        loop {
            state.window.drop_stale(self.handle.generation(), Instant::now());
            match state.window.find(range) {
                Found::Parts(parts) => {
                    let position = state.pattern.position();
                    state.window.drop_used(position);
                    return Some(parts);
                }
                Found::Missing => return None,
                Found::Busy => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Found::Wait(id, read) => {
                    drop(state);
                    let mut waiting = Waiting { reader: self, id, read: None };
                    waiting.read = Some(read.wait());
                    drop(waiting);
                    state = self.lock();
                }
            }
        }
    }

    /// By how much a read that begins in data exceeds it, where a hole follows. `first` is the extent at its start.
    fn excess(&self, range: &Range<Bytes>, first: Option<Extent>) -> Option<Bytes> {
        let data = first.filter(|extent| extent.kind.is_data())?;
        let exceeds = data.end < range.end && self.handle.expected_extent(data.end)?.kind.is_hole();
        exceeds.then(|| range.end.saturating_sub(data.end))
    }

    fn fetch_more_from(self: &Arc<Self>, queue: &dyn ReadQueue, unknown: Unknown) {
        // Dropped last.
        let mut others = Vec::new();
        let Some(begin) = self.begin_filling(unknown) else { return };
        let mut filling = Filling { reader: self, ids: Vec::new(), begun: Vec::new() };
        if let Begin::Unknown(next) = begin {
            // A client that never looked for data has asked for no map. What comes of it is a hint, so a failure is none.
            let _ = self.handle.seek(next, Whence::Hole);
        }
        // Before the reads begin: a change from here on makes their bytes useless.
        let generation = self.handle.generation();
        let mut state = self.lock();
        if state.is_closed {
            return;
        }
        state.is_beginning = true;
        let planned = self.plan(&mut state, queue.longest(), generation, &mut others);
        let (ids, reads): (Vec<u64>, Vec<_>) =
            planned.into_iter().map(|(id, offset, buffer)| (id, (offset, buffer))).unzip();
        filling.ids = ids;
        // Without the lock: a connection may have to be made first.
        drop(state);
        if !reads.is_empty() {
            filling.begun = queue.begin(reads);
        }
        drop(filling);
        if self.lock().is_closed {
            queue.finish();
        }
    }

    /// Whether this thread is to plan and begin reads. One thread does so at a time.
    fn begin_filling(self: &Arc<Self>, unknown: Unknown) -> Option<Begin> {
        let mut state = self.lock();
        let state = &mut *state;
        if state.is_closed
            || state.is_filling
            || !state.pattern.is_in_order()
            || !state.wants_more(self.ahead.depth(), self.ahead.per_file)
        {
            return None;
        }
        if std::mem::take(&mut state.is_stopped) {
            state.window.clear();
        }
        state.window.drop_stale(self.handle.generation(), Instant::now());
        let next = state.window.planned.max(state.pattern.position());
        let is_unknown = self.handle.expected_extent(next).is_none();
        if is_unknown && (unknown == Unknown::Ends || !state.pattern.reads(None)) {
            return None;
        }
        state.is_filling = true;
        if !state.is_listed {
            state.is_listed = true;
            self.ahead.add(self);
        }
        Some(if is_unknown { Begin::Unknown(next) } else { Begin::Known })
    }

    /// Decides what is fetched next, and adds its pieces. Returns the number, the offset and the buffer of each.
    fn plan(
        &self,
        state: &mut State,
        longest: Bytes,
        generation: u64,
        others: &mut Vec<Arc<Reader>>,
    ) -> Vec<(u64, Bytes, AlignedBuffer)> {
        let mut planned = Vec::new();
        let Some(limit) = self.handle.readable_end() else { return planned };
        let (mut count, mut bytes) = state.window.ahead(state.pattern.position());
        let mut at = state.window.planned.max(state.pattern.position());
        let mut looks = state.goal_pieces * EXTENTS_PER_PIECE;
        while count < state.goal_pieces && bytes < state.goal_bytes && looks > 0 {
            looks -= 1;
            match self.next_piece(state, at, longest, limit) {
                NextPiece::None => break,
                NextPiece::Behind(end) => at = end,
                NextPiece::Range(range) => {
                    let len = range.end.saturating_sub(range.start);
                    let buffer = usize::try_from(len.get()).ok().and_then(|len| self.ahead.buffer(len, others));
                    let Some(buffer) = buffer else { break };
                    (count, bytes, at) = (count + 1, bytes.saturating_add(len), range.end);
                    planned.push((state.window.push(range.clone(), generation), range.start, buffer));
                }
            }
            state.window.planned = at;
        }
        planned
    }

    /// The next piece from `at` on, of at most `longest` bytes, which ends at `limit` at the latest.
    fn next_piece(&self, state: &State, at: Bytes, longest: Bytes, limit: Bytes) -> NextPiece {
        let expected = self.handle.expected_extent(at);
        let extent_end = expected.map_or(Bytes::MAX, |extent| extent.end);
        if !state.pattern.reads(expected.map(|extent| extent.kind)) {
            return if expected.is_some() { NextPiece::Behind(extent_end) } else { NextPiece::None };
        }
        let align = self.handle.export().align();
        let longest = longest.align_down(align);
        // Pieces begin where reads do, so that most reads are of one piece.
        let piece_len = state.longest_read.max(SHORTEST_PIECE).min(LONGEST_PIECE).min(longest).align_down(align);
        let piece_end = at.saturating_add(piece_len);
        let end = if extent_end > piece_end { piece_end } else { extent_end.saturating_add(state.excess) };
        // The last piece may end within the unit in which this extent begins.
        let start = at.align_down(align).max(state.window.end());
        let end = end.align_up(align).unwrap_or(end).min(start.saturating_add(longest)).min(limit);
        if start < end {
            NextPiece::Range(start..end)
        } else if at < end {
            NextPiece::Behind(end)
        } else {
            NextPiece::None
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Fetches no more: the client does something else. What was fetched is kept for a second, since two threads of the
    /// client may read two extents in turn.
    fn stop(&mut self) {
        self.is_stopped = true;
        (self.goal_pieces, self.goal_bytes, self.longest_read) = Default::default();
    }

    /// Whether the client has used so much that more is to be fetched. Then the goal is set to twice the last one.
    fn wants_more(&mut self, depth: usize, per_file: Bytes) -> bool {
        let (count, bytes) = self.window.ahead(self.pattern.position());
        if count > self.goal_pieces / 2 || bytes > Bytes::new(self.goal_bytes.get() / 2) {
            return false;
        }
        self.goal_pieces = (self.goal_pieces * 2).max(FIRST_PIECES).min(depth);
        // Several of the client's longest reads, since the kernel sends two or three at once.
        let first = FIRST_BYTES.max(Bytes::new(self.longest_read.get() * 4));
        self.goal_bytes = Bytes::new(self.goal_bytes.get() * 2).max(first).min(per_file);
        true
    }
}

/// What is planned from an offset on.
enum NextPiece {
    /// A piece.
    Range(Range<Bytes>),
    /// Nothing before this offset.
    Behind(Bytes),
    /// Nothing at all.
    None,
}

/// Where a plan begins.
enum Begin {
    /// At an extent that is expected.
    Known,
    /// At this offset, of which nothing is known.
    Unknown(Bytes),
}

/// What is done where no extent is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unknown {
    /// Nothing is fetched from there on.
    Ends,
    /// The map is asked, which may take long.
    IsAsked,
}

/// The bytes of parts that follow each other.
fn copied(mut parts: Vec<Part>, buffer: &mut AlignedBuffer) -> ReadBytes<'_> {
    if parts.len() == 1
        && let Some((piece, range)) = parts.pop()
    {
        return ReadBytes::Piece(piece, range);
    }
    let place = buffer.resize(parts.iter().map(|(_, range)| range.len()).sum());
    let mut at = 0;
    for (piece, range) in parts {
        place[at..at + range.len()].copy_from_slice(&piece.bytes()[range.clone()]);
        at += range.len();
    }
    ReadBytes::Copied(place)
}
