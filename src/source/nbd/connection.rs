//! One connection that threads share.
//!
//! There is no reader thread. A thread that waits for a reply while no other thread reads becomes the reader: it
//! receives the replies to all requests until its own is complete; then another waiting thread becomes the reader. A
//! single request thus costs one send and one receive, without a change of threads, and an idle connection costs
//! nothing.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::connect::Agreement;
use super::frame::{Dialect, NbdCommand, REPLY_HEADER, ReplyHeader, encode_request};
use super::reply::{PartialReply, ReplyContent, RequestError, StatusContexts};
use super::stream::Stream;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// The size of the receive buffer. Larger payloads are received directly where they belong.
const READ_AHEAD: usize = 64 << 10;

/// A request to a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdRequest {
    /// The bytes of a range, within the agreed block sizes.
    Read(Range<Bytes>),
    /// The block status of a range that starts and ends on a minimum block or at the end of the export.
    Status(Range<Bytes>),
    /// A flush: all writes that were answered before become visible on all connections. Only for a server with flushes.
    Flush,
}

/// The cookie of a request that was sent, and has neither been waited for nor abandoned.
#[derive(Debug)]
pub struct RequestId(u64);

/// A connection in the transmission phase.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    agreement: Agreement,
    opened: Instant,
    /// Held while a request is sent.
    sending: Mutex<()>,
    read_ahead: Mutex<ReadAhead>,
    pending: Mutex<PendingRequests>,
    /// Signals every change of `pending` that a waiting thread needs.
    changed: Condvar,
    in_flight: AtomicUsize,
}

/// Bytes that were received and not used yet.
#[derive(Debug)]
struct ReadAhead {
    buffer: Box<[u8]>,
    unread: Range<usize>,
}

/// The requests that have been sent, by their cookies.
#[derive(Debug, Default)]
struct PendingRequests {
    next: u64,
    requests: HashMap<u64, PendingRequest>,
    /// Those of the requests that nobody waits for: their replies are dropped.
    abandoned: HashSet<u64>,
    /// Some thread is receiving replies.
    has_reader: bool,
    /// Why the connection has ended, if it has.
    broken: Option<String>,
}

/// The state of a request.
#[derive(Debug)]
enum PendingRequest {
    /// Its reply is not complete.
    Waiting(PartialReply),
    /// The reader has its reply, to add what it receives.
    Receiving,
    /// Its reply is complete, or it failed.
    Done(Result<ReplyContent, RequestError>),
}

impl Connection {
    /// The connection of a stream after its negotiation.
    pub fn new(stream: Stream, agreement: Agreement) -> Self {
        Self {
            stream,
            agreement,
            opened: Instant::now(),
            sending: Mutex::new(()),
            read_ahead: Mutex::new(ReadAhead { buffer: vec![0; READ_AHEAD].into(), unread: 0..0 }),
            pending: Mutex::default(),
            changed: Condvar::new(),
            in_flight: AtomicUsize::new(0),
        }
    }

    /// The time when the connection was made.
    pub fn opened(&self) -> Instant {
        self.opened
    }

    /// The number of requests without an answer.
    pub fn load(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Whether the connection has ended.
    pub fn is_broken(&self) -> bool {
        self.pending().broken.is_some()
    }

    /// Whether a request can be sent without a wait for the server, which may itself wait until its replies are received.
    pub fn accepts_more(&self) -> bool {
        self.stream.accepts_more()
    }

    /// Sends a request.
    ///
    /// # Errors
    ///
    /// [`RequestError::NoContext`] for a status that the server cannot give, [`RequestError::Broken`] when it cannot be
    /// sent.
    pub fn submit(&self, request: &NbdRequest, deadline: Instant) -> Result<RequestId, RequestError> {
        let (command, range, reply) = self.prepare(request)?;
        self.send(command, &range, reply, deadline)
    }

    /// Sends a read from `start` on of as many bytes as `buffer` has, which are received there. They must be within the
    /// agreed block sizes.
    ///
    /// # Errors
    ///
    /// [`RequestError::Broken`] when it cannot be sent.
    pub fn submit_read(
        &self,
        start: Bytes,
        buffer: AlignedBuffer,
        deadline: Instant,
    ) -> Result<RequestId, RequestError> {
        let end = start.saturating_add(Bytes::new(buffer.bytes().len() as u64));
        let too_long = || RequestError::Broken("a read that ends beyond 2^64 cannot be sent".to_owned());
        let reply = PartialReply::read_into(start, buffer).ok_or_else(too_long)?;
        self.send(NbdCommand::Read, &(start..end), reply, deadline)
    }

    fn send(
        &self,
        command: NbdCommand,
        range: &Range<Bytes>,
        reply: PartialReply,
        deadline: Instant,
    ) -> Result<RequestId, RequestError> {
        let cookie = {
            let mut pending = self.pending();
            if let Some(reason) = &pending.broken {
                return Err(RequestError::Broken(reason.clone()));
            }
            pending.next += 1;
            let cookie = pending.next;
            pending.requests.insert(cookie, PendingRequest::Waiting(reply));
            cookie
        };
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = self.stream.write_all(&encode_request(self.agreement.dialect, command, cookie, range), deadline);
        drop(sending);
        if let Err(error) = sent {
            self.end(error.to_string());
        }
        // `wait` returns the error, as for all requests of a broken connection.
        Ok(RequestId(cookie))
    }

    /// Waits for the answer to a request. Each request must be waited for or abandoned, once.
    ///
    /// # Errors
    ///
    /// The server's error, its violation of the protocol, or the end of the connection. A request without an answer at
    /// `deadline` ends the connection.
    pub fn wait(&self, id: RequestId, deadline: Instant) -> Result<ReplyContent, RequestError> {
        let result = self.wait_for(id.0, deadline);
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// Gives up the answer to a request. It is received with the other replies, and dropped.
    pub fn abandon(&self, id: &RequestId) {
        let mut pending = self.pending();
        if matches!(pending.requests.get(&id.0), Some(PendingRequest::Done(_))) {
            pending.requests.remove(&id.0);
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
        } else {
            // The kernel's buffers and the server's limit bound what is in flight until the next reply is received.
            pending.abandoned.insert(id.0);
        }
    }

    /// Waits until all requests have their replies, or until `deadline`. A server may fail when a client disconnects
    /// before that: nbdkit 1.32 ends with a failed assertion.
    pub fn drain(&self, deadline: Instant) {
        let mut pending = self.pending();
        while !pending.requests.is_empty() && pending.broken.is_none() && Instant::now() < deadline {
            pending = self.receive_or_wait(pending, deadline, |_completed| true);
        }
    }

    fn wait_for(&self, cookie: u64, deadline: Instant) -> Result<ReplyContent, RequestError> {
        let mut pending = self.pending();
        loop {
            if let Some(PendingRequest::Done(_)) = pending.requests.get(&cookie)
                && let Some(PendingRequest::Done(result)) = pending.requests.remove(&cookie)
            {
                return result;
            }
            if let Some(reason) = pending.broken.clone() {
                pending.requests.remove(&cookie);
                return Err(RequestError::Broken(reason));
            }
            if pending.has_reader && Instant::now() >= deadline {
                drop(pending);
                self.end("the server does not answer in time".to_owned());
                pending = self.pending();
                continue;
            }
            pending = self.receive_or_wait(pending, deadline, |completed| completed == Some(cookie));
        }
    }

    /// Waits for a change by the thread that receives replies. If there is none, this thread receives them, until
    /// `is_enough`, which gets the cookie of the request that a reply or chunk completed. An error ends the connection.
    fn receive_or_wait<'a>(
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
        if let Err(reason) = self.read_until(is_enough, deadline) {
            self.end(reason);
        }
        pending = self.pending();
        pending.has_reader = false;
        self.changed.notify_all();
        pending
    }

    /// Ends the connection for all threads. The reason of the first call is kept.
    pub fn end(&self, reason: String) {
        self.pending().broken.get_or_insert(reason);
        self.stream.shutdown();
        self.changed.notify_all();
    }

    /// The command and range of a request, and the reply to complete.
    fn prepare(&self, request: &NbdRequest) -> Result<(NbdCommand, Range<Bytes>, PartialReply), RequestError> {
        match request {
            NbdRequest::Flush => Ok((NbdCommand::Flush, Bytes::ZERO..Bytes::ZERO, PartialReply::flush())),
            NbdRequest::Read(range) => {
                let reply = PartialReply::read(range.clone()).expect("a read is a piece of a buffer in memory");
                Ok((NbdCommand::Read, range.clone(), reply))
            }
            NbdRequest::Status(range) => {
                let Agreement { dialect, context, bitmap, export, .. } = self.agreement;
                let contexts = StatusContexts { allocation: context.ok_or(RequestError::NoContext)?, bitmap };
                // The range may have been chosen for a connection with another dialect.
                let end = range.end.min(range.start.saturating_add(dialect.longest_status()));
                let range = range.start..end;
                let reply = PartialReply::status(range.clone(), contexts, dialect, export.size);
                Ok((NbdCommand::BlockStatus, range, reply))
            }
        }
    }

    /// Receives replies and chunks until `is_enough`: see [`Connection::receive_or_wait`].
    fn read_until(&self, is_enough: impl Fn(Option<u64>) -> bool, deadline: Instant) -> Result<(), String> {
        let mut read_ahead = self.read_ahead.lock().unwrap_or_else(PoisonError::into_inner);
        while !is_enough(self.read_reply(&mut read_ahead, deadline)?) {}
        Ok(())
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
            let count = self.stream.read(&mut read_ahead.buffer, deadline).map_err(reason)?;
            if count == 0 {
                return Err("the server closed the connection".to_owned());
            }
            read_ahead.unread = 0..count;
        }
    }

    fn pending(&self) -> MutexGuard<'_, PendingRequests> {
        // Nothing in this module panics while it holds a lock.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Connection {
    /// Sends the request to disconnect, so that the server does not log a lost client. It does not wait, because a
    /// connection may be dropped by a thread that holds a lock.
    fn drop(&mut self) {
        if !self.is_broken() {
            let goodbye =
                encode_request(self.agreement.dialect, NbdCommand::Disconnect, 0, &(Bytes::ZERO..Bytes::ZERO));
            self.stream.write_without_waiting(&goodbye);
        }
        self.stream.shutdown();
    }
}
