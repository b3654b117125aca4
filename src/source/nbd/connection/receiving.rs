//! Receiving replies over a connection that threads share.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use super::super::frame::{Dialect, REPLY_HEADER, ReplyHeader};
use super::super::reply::{PartialReply, RequestError};
use super::{Connection, PendingRequest, PendingRequests};

/// The size of the receive buffer. Larger payloads are received directly where they belong.
const READ_AHEAD: usize = 64 << 10;

/// Bytes that were received and not used yet.
#[derive(Debug)]
pub(super) struct ReadAhead {
    buffer: Box<[u8]>,
    unread: Range<usize>,
}

impl Default for ReadAhead {
    fn default() -> Self {
        Self { buffer: vec![0; READ_AHEAD].into(), unread: 0..0 }
    }
}

/// Why no more replies are received.
pub(super) enum Stop {
    /// None has begun to arrive in time.
    Late,
    /// The connection cannot be used any more.
    Ended(String),
}

impl Connection {
    /// Waits for a change by the thread that receives replies. If there is none, this thread receives them, until
    /// `is_enough`, which gets the cookie of the request that a reply or chunk completed. An error ends the connection.
    pub(super) fn receive_or_wait<'a>(
        &'a self,
        mut pending: MutexGuard<'a, PendingRequests>,
        deadline: Instant,
        is_enough: impl Fn(Option<u64>) -> bool,
    ) -> MutexGuard<'a, PendingRequests> {
        if pending.has_reader {
            let left = deadline.saturating_duration_since(Instant::now());
            return self.changed.wait_timeout(pending, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        pending.has_reader = true;
        drop(pending);
        let received = self.read_until(is_enough, deadline);
        self.stop_receiving(received)
    }

    /// Lets another thread receive replies.
    pub(super) fn stop_receiving(&self, received: Result<(), Stop>) -> MutexGuard<'_, PendingRequests> {
        if let Err(Stop::Ended(reason)) = received {
            self.end(reason);
        }
        let mut pending = self.pending();
        pending.has_reader = false;
        self.changed.notify_all();
        pending
    }

    /// Receives replies and chunks until `is_enough`: see [`Connection::receive_or_wait`].
    pub(super) fn read_until(&self, is_enough: impl Fn(Option<u64>) -> bool, deadline: Instant) -> Result<(), Stop> {
        let mut read_ahead = self.read_ahead.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if read_ahead.unread.is_empty() {
                self.receive(&mut read_ahead, deadline).map_err(|error| match error.kind() {
                    io::ErrorKind::TimedOut => Stop::Late,
                    _ => Stop::Ended(error.to_string()),
                })?;
            }
            if is_enough(self.read_reply(&mut read_ahead, deadline).map_err(Stop::Ended)?) {
                return Ok(());
            }
        }
    }

    /// Receives one simple reply or chunk. Returns the cookie of the request whose reply it completes, if it does.
    fn read_reply(&self, read_ahead: &mut ReadAhead, deadline: Instant) -> Result<Option<u64>, String> {
        let dialect = self.agreement.dialect;
        let mut bytes = [0; REPLY_HEADER];
        self.take(read_ahead, &mut bytes, deadline)?;
        let header = ReplyHeader::decode(&bytes, dialect).map_err(|error| error.to_string())?;
        let cookie = header.cookie();
        let Some(PendingRequest::Waiting(mut reply)) = self
            .pending()
            .requests
            .get_mut(&cookie)
            .map(|request| std::mem::replace(request, PendingRequest::Receiving))
        else {
            return Err(format!("the server replied to request {cookie}, which was not sent"));
        };
        let received = self.read_body(read_ahead, header, dialect, &mut reply, deadline);
        let (request, ended) = match received {
            Ok(()) if !reply.is_done() => (PendingRequest::Waiting(reply), None),
            Ok(()) => {
                let result = reply.finish();
                let ended = match &result {
                    Err(RequestError::Violation(violation)) => Some(violation.clone()),
                    _ => None,
                };
                (PendingRequest::Done(result), ended)
            }
            Err(failure) => {
                let reason = failure.to_string();
                (PendingRequest::Done(Err(failure)), Some(reason))
            }
        };
        let done = matches!(request, PendingRequest::Done(_));
        let mut pending = self.pending();
        if done && pending.abandoned.remove(&cookie) {
            pending.requests.remove(&cookie);
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
        } else {
            pending.requests.insert(cookie, request);
        }
        drop(pending);
        match ended {
            Some(reason) => Err(reason),
            None if done => {
                self.changed.notify_all();
                Ok(Some(cookie))
            }
            None => Ok(None),
        }
    }

    /// Receives the rest of a reply after the first part of its header.
    fn read_body(
        &self,
        read_ahead: &mut ReadAhead,
        header: ReplyHeader,
        dialect: Dialect,
        reply: &mut PartialReply,
        deadline: Instant,
    ) -> Result<(), RequestError> {
        let place = match header {
            ReplyHeader::Simple { error, .. } => reply.simple(error, dialect).map_err(RequestError::violation)?,
            ReplyHeader::Chunk { flags, kind, .. } => {
                let mut rest = [0; 16];
                let rest = &mut rest[..header.rest(dialect)];
                self.take(read_ahead, rest, deadline).map_err(RequestError::Broken)?;
                let chunk = reply.chunk(flags, kind, rest).map_err(RequestError::violation)?;
                let mut payload = vec![0; chunk.to_parse()];
                self.take(read_ahead, &mut payload, deadline).map_err(RequestError::Broken)?;
                reply.payload(chunk, &payload).map_err(RequestError::violation)?
            }
        };
        match place {
            Some(place) => self.take(read_ahead, place, deadline).map_err(RequestError::Broken),
            None => Ok(()),
        }
    }

    /// Reads exactly `out` from the stream.
    fn take(&self, read_ahead: &mut ReadAhead, mut out: &mut [u8], deadline: Instant) -> Result<(), String> {
        let reason = |error: io::Error| error.to_string();
        loop {
            let count = out.len().min(read_ahead.unread.len());
            let from = read_ahead.unread.start;
            out[..count].copy_from_slice(&read_ahead.buffer[from..from + count]);
            read_ahead.unread.start += count;
            out = &mut out[count..];
            if out.len() >= read_ahead.buffer.len() {
                return self.stream.read_exact(out, deadline).map_err(reason);
            }
            if out.is_empty() {
                return Ok(());
            }
            self.receive(read_ahead, deadline).map_err(reason)?;
        }
    }

    /// Receives some bytes into the buffer, which is empty.
    fn receive(&self, read_ahead: &mut ReadAhead, deadline: Instant) -> io::Result<()> {
        match self.stream.read(&mut read_ahead.buffer, deadline)? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")),
            count => {
                read_ahead.unread = 0..count;
                Ok(())
            }
        }
    }
}
