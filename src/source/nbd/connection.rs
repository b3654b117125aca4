//! One connection that threads share.
//!
//! There is no reader thread. A thread that waits for a reply while no other thread reads becomes the reader: it
//! receives the replies to all requests until its own is complete; then another waiting thread becomes the reader. A
//! single request thus costs one send and one receive, without a change of threads, and an idle connection costs
//! nothing.

mod pending_changes;
mod receiving;
mod sending;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use self::pending_changes::PendingChanges;
use self::receiving::ReadAhead;
pub use self::sending::NbdChange;
use self::sending::{NbdMessage, SendTurn};
use super::connect::Agreement;
use super::frame::{NbdCommand, ReplyWhen, encode_request};
use super::reply::{PartialReply, ReplyContent, RequestError, StatusContexts};
use super::stream::Stream;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

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

/// The number of the next connection of this process.
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);

/// A connection in the transmission phase.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    agreement: Agreement,
    opened: Instant,
    number: u64,
    /// No further request may be sent.
    retired: AtomicBool,
    turn: SendTurn,
    read_ahead: Mutex<ReadAhead>,
    pending: Mutex<PendingRequests>,
    /// Signals every change of `pending` that a waiting thread needs.
    changed: Condvar,
    in_flight: AtomicUsize,
}

/// The requests that have been sent, by their cookies.
#[derive(Debug, Default)]
struct PendingRequests {
    next: u64,
    requests: HashMap<u64, PendingRequest>,
    /// Those of the requests that nobody waits for: their replies are dropped.
    abandoned: HashSet<u64>,
    changes: PendingChanges,
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
            number: NEXT_NUMBER.fetch_add(1, Ordering::Relaxed),
            retired: AtomicBool::new(false),
            turn: SendTurn::default(),
            read_ahead: Mutex::default(),
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

    /// A number that no other connection of this process has.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether no further request can be sent: the connection has ended, or it was retired.
    pub fn is_broken(&self) -> bool {
        self.retired.load(Ordering::Relaxed) || self.pending().broken.is_some()
    }

    /// Excludes the connection from further requests. The replies to earlier ones are still received. The last user of the
    /// connection closes it with a request to disconnect.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// Whether the server has closed the connection. It may have sent replies before, which were not received yet.
    pub fn is_hung_up(&self) -> bool {
        self.stream.is_hung_up()
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
        self.send(&NbdMessage::new(command, range), reply, deadline, |_cookie| ())
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
        self.send(&NbdMessage::new(NbdCommand::Read, start..end), reply, deadline, |_cookie| ())
    }

    /// Expects a reply to a request that is sent next, and returns the cookie of the request.
    ///
    /// # Errors
    ///
    /// [`RequestError::Broken`] when the connection has ended.
    fn expect(&self, reply: PartialReply) -> Result<u64, RequestError> {
        let mut pending = self.pending();
        if let Some(reason) = &pending.broken {
            return Err(RequestError::Broken(reason.clone()));
        }
        pending.next += 1;
        let cookie = pending.next;
        pending.requests.insert(cookie, PendingRequest::Waiting(reply));
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(cookie)
    }

    /// Expects no reply any more.
    fn forget(&self, cookie: u64) {
        let mut pending = self.pending();
        pending.requests.remove(&cookie);
        pending.changes.remove(cookie, Instant::now());
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// Waits for the answer to a request. Each request must be waited for or abandoned, once.
    ///
    /// # Errors
    ///
    /// The server's error, its violation of the protocol, or the end of the connection. A request without an answer at
    /// `deadline` ends the connection, unless the server still has time for a change ([`PendingChanges`]).
    pub fn wait(&self, id: RequestId, deadline: Instant) -> Result<ReplyContent, RequestError> {
        let mut pending = self.pending();
        let result = loop {
            if let Some(PendingRequest::Done(_)) = pending.requests.get(&id.0)
                && let Some(PendingRequest::Done(result)) = pending.requests.remove(&id.0)
            {
                break result;
            }
            if let Some(reason) = pending.broken.clone() {
                pending.requests.remove(&id.0);
                break Err(RequestError::Broken(reason));
            }
            let (now, until) = (Instant::now(), pending.changes.deadline(id.0, deadline));
            if now < until {
                pending = self.receive_or_wait(pending, until, |completed| completed == Some(id.0));
                continue;
            }
            let late = "the server does not answer in time".to_owned();
            pending.changes.remove(id.0, now);
            let goes_on = pending.changes.have_time(now);
            drop(pending);
            if goes_on {
                self.abandon(&id);
                return Err(RequestError::Broken(late));
            }
            self.end(late);
            pending = self.pending();
        };
        pending.changes.remove(id.0, Instant::now());
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

    /// Ends the connection for all threads. The reason of the first call is kept.
    pub fn end(&self, reason: String) {
        self.pending().broken.get_or_insert(reason);
        self.stream.shutdown();
        self.changed.notify_all();
    }

    /// The command and range of a request, and the reply to complete.
    fn prepare(&self, request: &NbdRequest) -> Result<(NbdCommand, Range<Bytes>, PartialReply), RequestError> {
        match request {
            NbdRequest::Flush => Ok((NbdCommand::Flush, Bytes::ZERO..Bytes::ZERO, PartialReply::without_content())),
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

    fn pending(&self) -> MutexGuard<'_, PendingRequests> {
        // Nothing in this module panics while it holds a lock.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Connection {
    /// Sends the request to disconnect, so that the server does not log a lost client. It does not wait, because a
    /// connection may be dropped by a thread that holds a lock.
    fn drop(&mut self) {
        if self.pending().broken.is_none() {
            let (dialect, none) = (self.agreement.dialect, Bytes::ZERO..Bytes::ZERO);
            let goodbye = encode_request(dialect, NbdCommand::Disconnect, ReplyWhen::Complete, 0, &none);
            self.stream.write_without_waiting(&goodbye);
        }
        self.stream.shutdown();
    }
}
