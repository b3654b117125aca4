//! One connection that many threads share.
//!
//! There is no reader thread. Whoever waits for a reply while nobody reads becomes the reader: it takes in whatever
//! comes, for all, until its own reply is there; then the next waiter takes over. A single request thus costs one send
//! and one receive, without a change of threads, and an idle connection costs nothing.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::connect::Agreement;
use super::frame::{Dialect, NbdCommand, REPLY_HEADER, ReplyHeader, request};
use super::reply::{PartialReply, ReplyContent, RequestError};
use super::stream::Stream;
use crate::units::Bytes;

/// Bytes that are read ahead. Larger payloads go straight into their place.
const READ_AHEAD: usize = 64 << 10;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdRequest {
    /// The bytes of a range, within the agreed block sizes.
    Read(Range<Bytes>),
    /// The block status of a range that starts and ends on a minimum block or at the end of the export.
    Status(Range<Bytes>),
    /// That what was written before becomes visible on all connections. Only for a server that can flush.
    Flush,
}

/// A request under way.
#[derive(Debug)]
pub struct RequestId(u64);

/// A connection in transmission.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    agreement: Agreement,
    born: Instant,
    sending: Mutex<()>,
    input: Mutex<ReadAhead>,
    table: Mutex<PendingRequests>,
    changed: Condvar,
    in_flight: AtomicUsize,
}

/// Bytes of the stream that nobody has taken yet.
#[derive(Debug)]
struct ReadAhead {
    buffer: Box<[u8]>,
    unread: Range<usize>,
}

#[derive(Debug, Default)]
struct PendingRequests {
    next: u64,
    requests: HashMap<u64, PendingRequest>,
    has_reader: bool,
    broken: Option<String>,
}

#[derive(Debug)]
enum PendingRequest {
    Waiting(PartialReply),
    /// The reader has its answer in hand.
    Arriving,
    Done(Result<ReplyContent, RequestError>),
}

impl Connection {
    /// Takes over a stream after its negotiation.
    pub fn new(stream: Stream, agreement: Agreement) -> Self {
        Self {
            stream,
            agreement,
            born: Instant::now(),
            sending: Mutex::new(()),
            input: Mutex::new(ReadAhead { buffer: vec![0; READ_AHEAD].into(), unread: 0..0 }),
            table: Mutex::default(),
            changed: Condvar::new(),
            in_flight: AtomicUsize::new(0),
        }
    }

    /// When it was made.
    pub fn born(&self) -> Instant {
        self.born
    }

    /// Requests under way.
    pub fn load(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Whether the connection has ended.
    pub fn is_broken(&self) -> bool {
        self.table().broken.is_some()
    }

    /// Sends a request.
    ///
    /// # Errors
    ///
    /// [`RequestError::NoContext`] for a status that the server cannot give, [`RequestError::Broken`] when it cannot be sent.
    pub fn submit(&self, ask: &NbdRequest, deadline: Instant) -> Result<RequestId, RequestError> {
        let (command, range, answer) = self.prepare(ask)?;
        let cookie = {
            let mut table = self.table();
            if let Some(reason) = &table.broken {
                return Err(RequestError::Broken(reason.clone()));
            }
            table.next += 1;
            let cookie = table.next;
            table.requests.insert(cookie, PendingRequest::Waiting(answer));
            cookie
        };
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = self.stream.write_all(&request(self.agreement.dialect, command, cookie, &range), deadline);
        drop(sending);
        if let Err(error) = sent {
            self.end(error.to_string());
        }
        // A request that was not sent finds out in `wait`, as all others of a broken connection do.
        Ok(RequestId(cookie))
    }

    /// Waits for the answer to a request. Every ticket is to be waited for, once.
    ///
    /// # Errors
    ///
    /// The server's error, its violation of the protocol, or the end of the connection, which is also what becomes of a
    /// request without an answer at `deadline`.
    pub fn wait(&self, ticket: RequestId, deadline: Instant) -> Result<ReplyContent, RequestError> {
        let result = self.wait_for(ticket.0, deadline);
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        result
    }

    fn wait_for(&self, cookie: u64, deadline: Instant) -> Result<ReplyContent, RequestError> {
        let mut table = self.table();
        loop {
            if let Some(PendingRequest::Done(_)) = table.requests.get(&cookie)
                && let Some(PendingRequest::Done(result)) = table.requests.remove(&cookie)
            {
                return result;
            }
            if let Some(reason) = table.broken.clone() {
                table.requests.remove(&cookie);
                return Err(RequestError::Broken(reason));
            }
            if table.has_reader {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    drop(table);
                    self.end("the server does not answer in time".to_owned());
                    table = self.table();
                } else {
                    table = self.changed.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
                }
                continue;
            }
            table.has_reader = true;
            drop(table);
            let read = self.read_until(cookie, deadline);
            if let Err(reason) = read {
                self.end(reason);
            }
            table = self.table();
            table.has_reader = false;
            self.changed.notify_all();
        }
    }

    /// Ends the connection for all; the first reason is the one that counts.
    pub fn end(&self, reason: String) {
        self.table().broken.get_or_insert(reason);
        self.stream.shutdown();
        self.changed.notify_all();
    }

    fn prepare(&self, ask: &NbdRequest) -> Result<(NbdCommand, Range<Bytes>, PartialReply), RequestError> {
        match ask {
            NbdRequest::Flush => Ok((NbdCommand::Flush, Bytes::ZERO..Bytes::ZERO, PartialReply::flush())),
            NbdRequest::Read(range) => {
                let answer = PartialReply::read(range.clone()).expect("a read is a piece of a buffer in memory");
                Ok((NbdCommand::Read, range.clone(), answer))
            }
            NbdRequest::Status(range) => {
                let Agreement { dialect, context, export, .. } = self.agreement;
                let context = context.ok_or(RequestError::NoContext)?;
                // Another connection may have spoken another dialect when the range was chosen.
                let end = range.end.min(range.start.saturating_add(dialect.longest_status()));
                let range = range.start..end;
                Ok((NbdCommand::BlockStatus, range.clone(), PartialReply::status(range, context, dialect, export.size)))
            }
        }
    }

    /// Takes replies in until the one to `cookie` is whole. An error ends the connection.
    fn read_until(&self, cookie: u64, deadline: Instant) -> Result<(), String> {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        while self.read_reply(&mut input, deadline)? != Some(cookie) {}
        Ok(())
    }

    /// Takes one reply or chunk in; says whose request it finished.
    fn read_reply(&self, input: &mut ReadAhead, deadline: Instant) -> Result<Option<u64>, String> {
        let dialect = self.agreement.dialect;
        let mut bytes = [0; REPLY_HEADER];
        self.take(input, &mut bytes, deadline)?;
        let head = ReplyHeader::decode(&bytes, dialect).map_err(|violation| violation.to_string())?;
        let cookie = head.cookie();
        let Some(PendingRequest::Waiting(mut answer)) =
            self.table().requests.get_mut(&cookie).map(|request| std::mem::replace(request, PendingRequest::Arriving))
        else {
            return Err(format!("the server replied to the request {cookie}, which does not exist"));
        };
        let arrived = self.read_body(input, head, dialect, &mut answer, deadline);
        let (request, ended) = match arrived {
            Ok(()) if !answer.is_done() => (PendingRequest::Waiting(answer), None),
            Ok(()) => {
                let result = answer.finish();
                let ended = match &result {
                    Err(RequestError::Violation(violation)) => Some(violation.to_string()),
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
        self.table().requests.insert(cookie, request);
        match ended {
            Some(reason) => Err(reason),
            None if done => {
                self.changed.notify_all();
                Ok(Some(cookie))
            }
            None => Ok(None),
        }
    }

    /// Takes in what follows the first part of a header.
    fn read_body(
        &self,
        input: &mut ReadAhead,
        head: ReplyHeader,
        dialect: Dialect,
        answer: &mut PartialReply,
        deadline: Instant,
    ) -> Result<(), RequestError> {
        let place = match head {
            ReplyHeader::Simple { error, .. } => answer.simple(error, dialect).map_err(RequestError::Violation)?,
            ReplyHeader::Chunk { flags, kind, .. } => {
                let mut rest = [0; 16];
                let rest = &mut rest[..head.rest(dialect)];
                self.take(input, rest, deadline).map_err(RequestError::Broken)?;
                let chunk = answer.chunk(flags, kind, rest).map_err(RequestError::Violation)?;
                let mut payload = vec![0; chunk.to_parse()];
                self.take(input, &mut payload, deadline).map_err(RequestError::Broken)?;
                answer.payload(chunk, &payload).map_err(RequestError::Violation)?
            }
        };
        match place {
            Some(place) => self.take(input, place, deadline).map_err(RequestError::Broken),
            None => Ok(()),
        }
    }

    /// Reads exactly `out` from the stream.
    fn take(&self, input: &mut ReadAhead, mut out: &mut [u8], deadline: Instant) -> Result<(), String> {
        let reason = |error: io::Error| error.to_string();
        loop {
            let count = out.len().min(input.unread.len());
            let from = input.unread.start;
            out[..count].copy_from_slice(&input.buffer[from..from + count]);
            input.unread.start += count;
            out = &mut out[count..];
            if out.len() >= input.buffer.len() {
                return self.stream.read_exact(out, deadline).map_err(reason);
            }
            if out.is_empty() {
                return Ok(());
            }
            let count = self.stream.read(&mut input.buffer, deadline).map_err(reason)?;
            if count == 0 {
                return Err("the server closed the connection".to_owned());
            }
            input.unread = 0..count;
        }
    }

    fn table(&self) -> MutexGuard<'_, PendingRequests> {
        // Nothing in this module panics while it holds a lock.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Connection {
    /// Sends the request to disconnect, so that the server does not log a lost client. It waits for nothing: a connection
    /// may be dropped where others wait for a lock.
    fn drop(&mut self) {
        if !self.is_broken() {
            let goodbye = request(self.agreement.dialect, NbdCommand::Disconnect, 0, &(Bytes::ZERO..Bytes::ZERO));
            self.stream.write_at_once(&goodbye);
        }
        self.stream.shutdown();
    }
}
