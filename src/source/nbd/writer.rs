//! Writing to an export.
//!
//! All requests of an export that can be written go over one connection, so a read that follows a write is answered by the
//! server that has answered the write. See "Writing to an NBD export" in `docs/correctness.md`.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::client::{Client, ESHUTDOWN, TRIES};
use super::connection::{Connection, NbdChange, RequestId};
use super::frame::ReplyWhen;
use super::proto::ExportInfo;
use super::reply::{ReplyContent, RequestError};
use super::unflushed::{Unflushed, WriterState};
use crate::range_locks::{RangeLock, RangeLocks, Use};
use crate::units::Bytes;

/// The longest range of one request for zeros, a multiple of every minimum block size. A server that has to write the zeros
/// needs time for them, and its reply is waited for no longer than for one write.
const LONGEST_ZEROES: Bytes = Bytes::new(256 << 20);
/// The number of requests of one call that wait for their replies at the same time.
const BATCH: usize = 16;
/// `NBD_EINVAL`, `NBD_EOVERFLOW` and `NBD_ENOTSUP`: what a server may reply to a request for zeros that it does not execute.
const REFUSALS: [u32; 3] = [22, 75, 95];
/// The errors of the protocol ("Error values"). Each is the errno of the same number. "The client SHOULD treat an unexpected
/// error value as if it had been NBD_EINVAL".
const ERRORS: [u32; 8] = [1, 5, 12, 22, 28, 75, 95, ESHUTDOWN];

/// What the writers of one export share.
#[derive(Debug, Default)]
pub(super) struct SharedWrites {
    unflushed: Mutex<Unflushed>,
    locks: RangeLocks,
}

impl SharedWrites {
    fn unflushed(&self) -> MutexGuard<'_, Unflushed> {
        self.unflushed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One open of an export for writing.
///
/// Callers check ranges first: none is empty, and none ends after the end of the export.
#[derive(Debug)]
pub struct ExportWriter {
    client: Arc<Client>,
    state: Mutex<WriterState>,
}

impl Client {
    /// Opens the export for writing.
    ///
    /// # Errors
    ///
    /// EROFS when the server says that the export is read-only.
    pub fn writer(self: &Arc<Self>) -> io::Result<ExportWriter> {
        let ExportInfo { read_only, flush, fua, .. } = self.agreement().export;
        if read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        if !flush && !fua {
            log::warn!(
                "{}: the server has no flush, so nothing is known about writes after a loss of power",
                self.uri()
            );
        }
        let state = Mutex::new(self.writes().unflushed().open());
        Ok(ExportWriter { client: self.clone(), state })
    }
}

/// The parts of a range, in view of the minimum block size.
struct BlockParts {
    /// The blocks that the range covers only in part: none, one, or two.
    edges: Vec<Range<Bytes>>,
    /// The blocks that it covers completely. Empty if there is none.
    inner: Range<Bytes>,
}

impl BlockParts {
    /// The parts of `range` of an export of `size` bytes. The last block may be shorter than the others.
    fn of(range: &Range<Bytes>, block: Bytes, size: Bytes) -> Self {
        let block_at = |at: Bytes| {
            let start = at.align_down(block);
            start..start.saturating_add(block).min(size)
        };
        let (first, last) = (block_at(range.start), block_at(range.end));
        let mut edges = Vec::new();
        let mut inner = range.clone();
        if range.start > first.start {
            inner.start = first.end;
            edges.push(first);
        }
        if range.end > last.start && range.end < size {
            inner.end = last.start;
            edges.push(last);
        }
        edges.dedup();
        inner.end = inner.end.max(inner.start);
        Self { edges, inner }
    }
}

impl ExportWriter {
    /// Writes all of `bytes` at `offset`. When it returns, the server has answered.
    ///
    /// # Errors
    ///
    /// The errno that the server reports. EIO when there is no answer; see [`Unflushed::fail`].
    pub fn write_at(&self, bytes: &[u8], offset: Bytes) -> io::Result<()> {
        let range = offset..offset.saturating_add(Bytes::new(bytes.len() as u64));
        let parts = self.parts(&range);
        let _lock = self.lock(&range, &parts);
        let mut edges = Vec::new();
        for edge in &parts.edges {
            let (mut block, place) = self.read_edge(edge, &range)?;
            let at = edge.start.saturating_add(Bytes::new(place.start as u64)).index_from(offset);
            block[place.clone()].copy_from_slice(&bytes[at..at + place.len()]);
            edges.push((edge.start, block));
        }
        let mut changes: Vec<_> = edges.iter().map(|(start, block)| NbdChange::Write(*start, block)).collect();
        let mut at = parts.inner.start;
        while at < parts.inner.end {
            let next = at.saturating_add(self.client.agreement().blocks.maximum).min(parts.inner.end);
            changes.push(NbdChange::Write(at, &bytes[at.index_from(offset)..next.index_from(offset)]));
            at = next;
        }
        changes.chunks(BATCH).try_for_each(|batch| self.send(batch)).map_err(|failure| self.io_error(&failure))
    }

    /// Makes a range read as zeros. Returns whether the server has promised that; if not, any part of the range may be as it
    /// was before.
    ///
    /// # Errors
    ///
    /// As [`ExportWriter::write_at`].
    pub fn make_zero(&self, range: &Range<Bytes>) -> io::Result<bool> {
        if !self.client.agreement().export.write_zeroes {
            return Ok(false);
        }
        let parts = self.parts(range);
        let _lock = self.lock(range, &parts);
        let mut zeros = vec![parts.inner.clone()];
        for edge in &parts.edges {
            let (mut block, place) = self.read_edge(edge, range)?;
            block[place].fill(0);
            if block.iter().all(|byte| *byte == 0) {
                // So that the server can deallocate the whole block.
                zeros.push(edge.clone());
            } else {
                self.send(&[NbdChange::Write(edge.start, &block)]).map_err(|failure| self.io_error(&failure))?;
            }
        }
        for range in zeros {
            if !self.write_zeroes(range).map_err(|failure| self.io_error(&failure))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns when everything is permanent that was answered before, as far as the server promises that.
    ///
    /// # Errors
    ///
    /// EIO, at least once, when writes of any writer may be lost since they were answered. The errno that the server reports.
    pub fn flush(&self) -> io::Result<()> {
        self.flush_until(Instant::now() + self.client.timeouts().flush).map_err(|failure| self.io_error(&failure))
    }

    fn flush_until(&self, until: Instant) -> Result<(), RequestError> {
        for _ in 0..TRIES {
            let (connection, covered) = self.connection(until)?;
            if self.report_loss() {
                let lost = "writes before the connection ended, or before a flush failed, may be lost";
                log::error!("{}: {lost}", self.client.uri());
                return Err(RequestError::Broken(lost.to_owned()));
            }
            let answer = match self.client.agreement().export.flush {
                true => connection
                    .submit_change(&NbdChange::Flush, ReplyWhen::Complete, until)
                    .and_then(|id| connection.wait(id, until))
                    .map(drop),
                // The protocol has no way to ask for more. With FUA, each write was permanent when it was answered.
                false => Ok(()),
            };
            match answer {
                Ok(()) => {
                    self.unflushed().flush(connection.number(), covered);
                    return Ok(());
                }
                Err(failure @ RequestError::Server(_)) => {
                    self.retire_if_shut_down(&connection, &failure);
                    self.unflushed().lose(connection.number(), covered);
                    self.report_loss();
                    return Err(failure);
                }
                // If something was not flushed, the next connection makes it a loss. If not, the flush can be sent again.
                Err(failure) if Instant::now() >= until => return Err(failure),
                Err(_) => {}
            }
        }
        Err(RequestError::Broken("each connection ended before it had flushed".to_owned()))
    }

    /// Whether a write without an answer has ended the writing.
    pub fn has_ended(&self) -> bool {
        self.unflushed().has_ended(&self.state())
    }

    /// Whether there was a loss that this writer has not reported. It counts as reported from now on.
    fn report_loss(&self) -> bool {
        self.unflushed().report(&mut self.state())
    }

    /// Sends requests for zeros in whole minimum blocks. Returns false when the server refuses one.
    fn write_zeroes(&self, range: Range<Bytes>) -> Result<bool, RequestError> {
        let maximum = self.client.agreement().blocks.maximum;
        let mut longest = LONGEST_ZEROES;
        let mut at = range.start;
        while at < range.end {
            let next = at.saturating_add(longest).min(range.end);
            match self.send(&[NbdChange::WriteZeroes(at..next)]) {
                Ok(()) => at = next,
                // It may be only too long, as it has no payload ("Block size constraints").
                Err(RequestError::Server(error)) if REFUSALS.contains(&error) => {
                    if next.saturating_sub(at) <= maximum {
                        return Ok(false);
                    }
                    longest = maximum;
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(true)
    }

    /// Sends writes, and waits for the answers to all of them. An error is that of the first one that failed.
    fn send(&self, changes: &[NbdChange<'_>]) -> Result<(), RequestError> {
        let until = Instant::now() + self.client.timeouts().change;
        let mut sent = Vec::new();
        let mut result = Ok(());
        for change in changes {
            match self.submit(change, until) {
                Ok(request) => sent.push(request),
                Err(failure) => {
                    result = Err(failure);
                    break;
                }
            }
        }
        for (connection, id) in sent {
            result = result.and(self.take_answer(&connection, connection.wait(id, until)));
        }
        result
    }

    /// Sends a write. While no byte of it was sent, it can go over another connection.
    fn submit(&self, change: &NbdChange<'_>, until: Instant) -> Result<(Arc<Connection>, RequestId), RequestError> {
        let mut last = RequestError::Broken("the request was not sent in time".to_owned());
        for _ in 0..TRIES {
            let (connection, _) = self.connection(until)?;
            match connection.submit_change(change, self.reply_when(), until) {
                Ok(id) => return Ok((connection, id)),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }

    fn take_answer(
        &self,
        connection: &Connection,
        answer: Result<ReplyContent, RequestError>,
    ) -> Result<(), RequestError> {
        match answer {
            Ok(_) => {
                if self.reply_when() == ReplyWhen::Complete {
                    self.unflushed().answer(connection.number());
                }
                Ok(())
            }
            Err(failure @ RequestError::Server(_)) => {
                self.retire_if_shut_down(connection, &failure);
                Err(failure)
            }
            Err(failure) => {
                let uri = self.client.uri();
                log::error!("{uri}: a write has no answer, and the file must be opened again to write: {failure}");
                self.unflushed().fail();
                Err(failure)
            }
        }
    }

    /// The connection for the next request, and the number of writes that were answered on it.
    fn connection(&self, until: Instant) -> Result<(Arc<Connection>, u64), RequestError> {
        let until = until.min(Instant::now() + self.client.timeouts().request);
        loop {
            let connection = self.client.connection(until).map_err(RequestError::Broken)?;
            if connection.is_hung_up() {
                // A write that is sent would have no answer.
                connection.retire();
                continue;
            }
            let answered = self.unflushed().begin(&self.state(), connection.number());
            return Ok((connection, answered.map_err(RequestError::Broken)?));
        }
    }

    /// "If the client receives an NBD_ESHUTDOWN error it MUST initiate a soft disconnect."
    fn retire_if_shut_down(&self, connection: &Connection, failure: &RequestError) {
        if *failure == RequestError::Server(ESHUTDOWN) {
            connection.retire();
        }
    }

    /// Writes are permanent when they are answered only where there is no other way.
    fn reply_when(&self) -> ReplyWhen {
        let ExportInfo { flush, fua, .. } = self.client.agreement().export;
        if fua && !flush { ReplyWhen::Permanent } else { ReplyWhen::Complete }
    }

    fn parts(&self, range: &Range<Bytes>) -> BlockParts {
        BlockParts::of(range, self.client.minimum_block(), self.client.size())
    }

    /// Locks the blocks of a range. While one of them is read, changed and written, nothing else is written to it.
    fn lock(&self, range: &Range<Bytes>, parts: &BlockParts) -> RangeLock<'_> {
        let start = parts.edges.first().map_or(range.start, |edge| edge.start.min(range.start));
        let end = parts.edges.last().map_or(range.end, |edge| edge.end.max(range.end));
        let sharing = if parts.edges.is_empty() { Use::Shared } else { Use::Alone };
        self.client.writes().locks.lock(start..end, sharing)
    }

    /// The bytes of a block that `range` covers in part, and which of them are in the range.
    fn read_edge(&self, edge: &Range<Bytes>, range: &Range<Bytes>) -> io::Result<(Vec<u8>, Range<usize>)> {
        let mut block = vec![0; edge.end.index_from(edge.start)];
        if self.client.read_at(&mut block, edge.start)? != block.len() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let place = range.start.max(edge.start).index_from(edge.start)..range.end.min(edge.end).index_from(edge.start);
        Ok((block, place))
    }

    /// Locked after [`ExportWriter::unflushed`].
    fn state(&self) -> MutexGuard<'_, WriterState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unflushed(&self) -> MutexGuard<'_, Unflushed> {
        self.client.writes().unflushed()
    }

    /// What a caller gets for a request that failed.
    fn io_error(&self, failure: &RequestError) -> io::Error {
        log::debug!("{}: cannot write: {failure}", self.client.uri());
        let errno = match failure {
            RequestError::Server(error) if ERRORS.contains(error) => i32::try_from(*error).unwrap_or(libc::EIO),
            RequestError::Server(_) => libc::EINVAL,
            _ => libc::EIO,
        };
        io::Error::from_raw_os_error(errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(start: u64, end: u64) -> Range<Bytes> {
        Bytes::new(start)..Bytes::new(end)
    }

    /// Blocks of 16 bytes, and a last one of 5.
    #[test]
    fn parts_of_a_range() {
        for (range, edges, inner) in [
            (bytes(16, 48), vec![], bytes(16, 48)),
            (bytes(16, 133), vec![], bytes(16, 133)),
            (bytes(128, 133), vec![], bytes(128, 133)),
            (bytes(5, 48), vec![bytes(0, 16)], bytes(16, 48)),
            (bytes(16, 49), vec![bytes(48, 64)], bytes(16, 48)),
            (bytes(5, 49), vec![bytes(0, 16), bytes(48, 64)], bytes(16, 48)),
            (bytes(5, 17), vec![bytes(0, 16), bytes(16, 32)], bytes(16, 16)),
            (bytes(17, 20), vec![bytes(16, 32)], bytes(32, 32)),
            (bytes(16, 20), vec![bytes(16, 32)], bytes(16, 16)),
            (bytes(20, 32), vec![bytes(16, 32)], bytes(32, 32)),
            (bytes(129, 133), vec![bytes(128, 133)], bytes(133, 133)),
            (bytes(129, 132), vec![bytes(128, 133)], bytes(133, 133)),
            (bytes(0, 129), vec![bytes(128, 133)], bytes(0, 128)),
        ] {
            let parts = BlockParts::of(&range, Bytes::new(16), Bytes::new(133));
            assert_eq!((parts.edges, parts.inner), (edges, inner), "{range:?}");
        }
    }
}
