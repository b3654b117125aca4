//! The pieces of a device that were fetched ahead of a client.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::export::PendingRead;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// How long a piece may be used after its read was begun.
const LIFETIME: Duration = Duration::from_secs(1);
/// How far behind a piece a client must be for the piece to be dropped. It may have sent several reads at once.
const PASSED: Bytes = Bytes::new(4 << 20);

/// A range that is fetched, or was.
struct Piece {
    range: Range<Bytes>,
    /// Identifies the piece.
    id: u64,
    /// The number of opens and changes of the device, as it was before the read was begun (see [`super::Reader`]).
    generation: u64,
    begun: Instant,
    /// Bytes that the client has got.
    used: Bytes,
    state: PieceState,
}

enum PieceState {
    /// Some thread begins its read, or waits for it.
    Busy,
    /// Its read was begun.
    Pending(PendingRead),
    Here(Arc<AlignedBuffer>),
}

/// A range of a buffer.
pub(super) type Part = (Arc<AlignedBuffer>, Range<usize>);

/// What the pieces have of a range.
pub(super) enum Found {
    /// All of it, in order.
    Parts(Vec<Part>),
    /// All of it, but the read of this piece is not complete.
    Wait(u64, PendingRead),
    /// All of it, but another thread begins a read or waits for it.
    Busy,
    /// Not all of it.
    Missing,
}

/// The pieces, in ascending order of their ranges, which do not overlap.
#[derive(Default)]
pub(super) struct Window {
    pieces: VecDeque<Piece>,
    next_id: u64,
    /// The end of the range up to which it is decided what is fetched.
    pub(super) planned: Bytes,
}

impl Window {
    /// Drops all pieces.
    pub(super) fn clear(&mut self) {
        self.pieces.clear();
        self.planned = Bytes::ZERO;
    }

    /// Drops the pieces that may not be used any more: those of another generation, and those that are too old.
    pub(super) fn drop_stale(&mut self, generation: u64, now: Instant) {
        let is_old = |piece: &Piece| now.saturating_duration_since(piece.begun) >= LIFETIME;
        let is_stale = |piece: &Piece| piece.generation != generation || is_old(piece);
        if let Some(first) = self.pieces.iter().find(|piece| is_stale(piece)) {
            let start = first.range.start;
            self.pieces.retain(|piece| !is_stale(piece));
            // The ranges of those that were dropped last are planned again.
            self.planned = self.pieces.back().map_or(start, |piece| piece.range.end);
        }
    }

    /// Drops the pieces that the client has got completely, or is far behind.
    pub(super) fn drop_used(&mut self, position: Bytes) {
        self.pieces.retain(|piece| {
            let is_used = piece.used >= piece.range.end.saturating_sub(piece.range.start);
            !is_used && piece.range.end.saturating_add(PASSED) > position
        });
    }

    /// The end of the last piece.
    pub(super) fn end(&self) -> Bytes {
        self.pieces.back().map_or(Bytes::ZERO, |piece| piece.range.end)
    }

    /// The number of pieces, and their bytes, that are at or behind `position`.
    pub(super) fn ahead(&self, position: Bytes) -> (usize, Bytes) {
        let ahead = self.pieces.iter().filter(|piece| piece.range.end > position);
        ahead.fold((0, Bytes::ZERO), |(count, bytes), piece| {
            let len = piece.range.end.saturating_sub(piece.range.start.max(position));
            (count + 1, bytes.saturating_add(len))
        })
    }

    /// Adds a piece behind all others. Its read is begun next.
    pub(super) fn push(&mut self, range: Range<Bytes>, generation: u64) -> u64 {
        self.next_id += 1;
        let (id, begun) = (self.next_id, Instant::now());
        self.pieces.push_back(Piece { range, id, generation, begun, used: Bytes::ZERO, state: PieceState::Busy });
        id
    }

    /// The read of a piece was begun; `None` if it could not be. The piece may have been dropped in between.
    pub(super) fn begun(&mut self, id: u64, read: Option<PendingRead>) {
        match (self.index(id), read) {
            (Some(index), Some(read)) => self.pieces[index].state = PieceState::Pending(read),
            (Some(index), None) => drop(self.pieces.remove(index)),
            (None, _) => {}
        }
    }

    /// The read of a piece is complete, or failed.
    pub(super) fn complete(&mut self, id: u64, read: std::io::Result<AlignedBuffer>) {
        let Some(index) = self.index(id) else { return };
        let range = &self.pieces[index].range;
        let len = range.end.saturating_sub(range.start);
        match read {
            Ok(buffer) if Bytes::new(buffer.bytes().len() as u64) == len => {
                self.pieces[index].state = PieceState::Here(Arc::new(buffer));
            }
            // The client's own read gives the error, or the bytes that there are.
            Ok(_) | Err(_) => drop(self.pieces.remove(index)),
        }
    }

    /// Looks for a range that is not empty. What is found in buffers counts as got by the client.
    pub(super) fn find(&mut self, range: &Range<Bytes>) -> Found {
        let first = self.pieces.partition_point(|piece| piece.range.end <= range.start);
        let mut at = range.start;
        let mut last = first;
        while at < range.end {
            match self.pieces.get(last) {
                Some(piece) if piece.range.start <= at => at = piece.range.end,
                _ => return Found::Missing,
            }
            last += 1;
        }
        for piece in self.pieces.range_mut(first..last) {
            match std::mem::replace(&mut piece.state, PieceState::Busy) {
                PieceState::Busy => return Found::Busy,
                PieceState::Pending(read) => return Found::Wait(piece.id, read),
                here @ PieceState::Here(_) => piece.state = here,
            }
        }
        Found::Parts(self.pieces.range_mut(first..last).filter_map(|piece| piece.part(range)).collect())
    }

    fn index(&self, id: u64) -> Option<usize> {
        self.pieces.iter().position(|piece| piece.id == id)
    }
}

impl Piece {
    /// The part of a range that is in this piece, whose bytes are here.
    fn part(&mut self, range: &Range<Bytes>) -> Option<Part> {
        let PieceState::Here(buffer) = &self.state else { return None };
        let (start, end) = (self.range.start.max(range.start), self.range.end.min(range.end));
        let index = |at: Bytes| usize::try_from(at.saturating_sub(self.range.start).get()).ok();
        let part = (buffer.clone(), index(start)?..index(end)?);
        self.used = self.used.saturating_add(end.saturating_sub(start));
        Some(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    fn range(start: u64, end: u64) -> Range<Bytes> {
        Bytes::new(start * KIB)..Bytes::new(end * KIB)
    }

    fn push(window: &mut Window, start: u64, end: u64, generation: u64) {
        let id = window.push(range(start, end), generation);
        let mut buffer = AlignedBuffer::new();
        buffer.resize(usize::try_from((end - start) * KIB).unwrap()).fill(u8::try_from(start).unwrap());
        window.complete(id, Ok(buffer));
    }

    fn bytes(found: &Found) -> Option<Vec<(u8, usize)>> {
        match found {
            Found::Parts(parts) => {
                Some(parts.iter().map(|(buffer, part)| (buffer.bytes()[part.start], part.len())).collect())
            }
            Found::Missing => None,
            Found::Wait(..) | Found::Busy => panic!("all reads are complete"),
        }
    }

    #[test]
    fn a_range_is_found_only_if_the_pieces_have_all_of_it() {
        let mut window = Window::default();
        push(&mut window, 0, 64, 0);
        push(&mut window, 64, 128, 0);
        push(&mut window, 192, 256, 0);
        let mut at = |start, end| bytes(&window.find(&range(start, end)));
        assert_eq!(at(0, 64), Some(vec![(0, 65536)]));
        assert_eq!(at(60, 70), Some(vec![(0, 4096), (64, 6144)]));
        assert_eq!(at(192, 193), Some(vec![(192, 1024)]));
        assert_eq!([at(100, 129), at(128, 192), at(130, 200), at(250, 257)], [None, None, None, None]);
    }

    #[test]
    fn a_piece_of_an_earlier_generation_or_an_earlier_second_is_not_used() {
        let mut window = Window::default();
        push(&mut window, 0, 4, 1);
        push(&mut window, 4, 8, 2);
        window.planned = Bytes::new(8 * KIB);
        let now = Instant::now();
        window.drop_stale(2, now);
        assert_eq!(bytes(&window.find(&range(0, 4))), None);
        assert!(bytes(&window.find(&range(4, 8))).is_some());
        window.drop_stale(2, now + LIFETIME);
        assert_eq!(bytes(&window.find(&range(4, 8))), None);
        assert_eq!(window.planned, Bytes::new(4 * KIB), "what was dropped is planned again");
    }

    #[test]
    fn a_short_or_failed_read_gives_no_piece() {
        let mut window = Window::default();
        let failed = || std::io::Error::from_raw_os_error(5);
        for read in [Err(failed()), Ok(AlignedBuffer::new())] {
            let id = window.push(range(0, 4), 0);
            assert!(matches!(window.find(&range(0, 4)), Found::Busy));
            window.complete(id, read);
            assert_eq!(bytes(&window.find(&range(0, 4))), None);
        }
        let id = window.push(range(0, 4), 0);
        window.begun(id, None);
        assert_eq!(bytes(&window.find(&range(0, 4))), None);
        let id = window.push(range(0, 4), 0);
        window.clear();
        window.complete(id, Ok(AlignedBuffer::new()));
        assert_eq!(window.ahead(Bytes::ZERO), (0, Bytes::ZERO));
    }

    #[test]
    fn pieces_are_dropped_when_they_are_used_up_or_far_behind() {
        let mut window = Window::default();
        push(&mut window, 0, 4, 0);
        push(&mut window, 4, 8, 0);
        assert_eq!(window.ahead(Bytes::new(6 * KIB)), (1, Bytes::new(2 * KIB)));
        let _ = window.find(&range(0, 4));
        let _ = window.find(&range(4, 6));
        window.drop_used(Bytes::new(6 * KIB));
        assert_eq!((bytes(&window.find(&range(0, 4))), window.ahead(Bytes::ZERO).0), (None, 1));
        window.drop_used(Bytes::new(8 * KIB).saturating_add(PASSED));
        assert_eq!(window.ahead(Bytes::ZERO).0, 0);
    }
}
