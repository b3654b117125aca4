//! Sending requests over a connection that threads share.
//!
//! A request with a payload may take long to be sent, because the server receives it only as fast as it writes. So nothing here
//! waits without a deadline, and a thread that cannot send receives replies: a server that handles one request at a time
//! receives nothing while it sends a reply.

use std::io::{self, ErrorKind, IoSlice};
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::super::frame::{NbdCommand, ReplyWhen, encode_request};
use super::super::reply::{PartialReply, RequestError};
use super::{Connection, RequestId};
use crate::units::Bytes;

/// A request that changes the export, or makes its changes permanent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdChange<'a> {
    /// Writes bytes from an offset on, within the agreed block sizes.
    Write(Bytes, &'a [u8]),
    /// Makes a range read as zeros: whole minimum blocks, or up to the end of the export, and less than 4 GiB. Only for a
    /// server that has this command.
    WriteZeroes(Range<Bytes>),
    /// Makes all writes permanent that were answered before. Only for a server that has this command.
    Flush,
}

/// A message to a server.
pub(super) struct NbdMessage<'a> {
    pub(super) command: NbdCommand,
    pub(super) when: ReplyWhen,
    pub(super) range: Range<Bytes>,
    /// What follows the header.
    pub(super) payload: &'a [u8],
}

impl NbdMessage<'_> {
    /// A message without payload.
    pub(super) fn new(command: NbdCommand, range: Range<Bytes>) -> Self {
        Self { command, when: ReplyWhen::Complete, range, payload: &[] }
    }
}

/// Why a message was not sent.
enum Unsent {
    /// No byte of it was sent. The connection can be used, if it has not ended.
    All(String),
    /// Some of it may have been sent, so nothing else can be sent any more.
    Part(String),
}

/// The turn to send. Only one thread has it.
#[derive(Debug, Default)]
pub(super) struct SendTurn {
    taken: Mutex<bool>,
    given_back: Condvar,
}

impl SendTurn {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the turn. `until` gives the deadline, which may move. `None` when it is over.
    fn take(&self, until: impl Fn() -> Instant) -> Option<TakenTurn<'_>> {
        let mut taken = self.lock();
        while *taken {
            let left = until().saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            taken = self.given_back.wait_timeout(taken, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *taken = true;
        Some(TakenTurn(self))
    }
}

/// The turn of this thread, given back when it is dropped.
struct TakenTurn<'a>(&'a SendTurn);

impl Drop for TakenTurn<'_> {
    fn drop(&mut self) {
        *self.0.lock() = false;
        self.0.given_back.notify_one();
    }
}

impl Connection {
    /// Sends a change.
    ///
    /// # Errors
    ///
    /// [`RequestError::Broken`] when it cannot be sent before `deadline`. No byte of it was sent then. An error of
    /// [`Connection::wait`] says that the server may have received it.
    pub fn submit_change(
        &self,
        change: &NbdChange<'_>,
        when: ReplyWhen,
        deadline: Instant,
    ) -> Result<RequestId, RequestError> {
        let (command, range, payload): (_, _, &[u8]) = match change {
            NbdChange::Write(start, bytes) => {
                (NbdCommand::Write, *start..start.saturating_add(Bytes::new(bytes.len() as u64)), bytes)
            }
            NbdChange::WriteZeroes(range) => (NbdCommand::WriteZeroes, range.clone(), &[]),
            NbdChange::Flush => (NbdCommand::Flush, Bytes::ZERO..Bytes::ZERO, &[]),
        };
        let is_flush = *change == NbdChange::Flush;
        self.send(&NbdMessage { command, when, range, payload }, PartialReply::without_content(), deadline, |cookie| {
            self.pending().changes.add(cookie, is_flush, Instant::now(), deadline);
        })
    }

    /// Sends a message, and expects a reply. `register` gets the cookie before anything is sent.
    ///
    /// # Errors
    ///
    /// [`RequestError::Broken`] when no byte of it could be sent.
    pub(super) fn send(
        &self,
        message: &NbdMessage<'_>,
        reply: PartialReply,
        deadline: Instant,
        register: impl FnOnce(u64),
    ) -> Result<RequestId, RequestError> {
        let cookie = self.expect(reply)?;
        register(cookie);
        let NbdMessage { command, when, range, payload } = message;
        let header = encode_request(self.agreement.dialect, *command, *when, cookie, range);
        match self.transmit(cookie, &header, payload, deadline) {
            Ok(()) => Ok(RequestId(cookie)),
            Err(Unsent::All(reason)) => {
                self.forget(cookie);
                Err(RequestError::Broken(reason))
            }
            Err(Unsent::Part(reason)) => {
                self.end(reason);
                // `wait` returns the error, as for all requests of a broken connection.
                Ok(RequestId(cookie))
            }
        }
    }

    /// Sends a header and its payload.
    fn transmit(&self, cookie: u64, header: &[u8], payload: &[u8], deadline: Instant) -> Result<(), Unsent> {
        let until = || self.pending().changes.deadline(cookie, deadline);
        let turn = self.turn.take(until);
        let _turn = turn.ok_or_else(|| Unsent::All("the server receives no more requests".to_owned()))?;
        let mut parts = [IoSlice::new(header), IoSlice::new(payload)];
        let mut left = &mut parts[..];
        let mut begun = false;
        loop {
            let taken = match left.is_empty() {
                true => self.stream.send_taken().map(|()| 0),
                false => self.stream.take_some(left),
            };
            let result = match taken {
                Ok(_) if left.is_empty() => return Ok(()),
                Ok(count) => {
                    begun = true;
                    IoSlice::advance_slices(&mut left, count);
                    Ok(())
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait_to_send(until(), begun),
                Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
                Err(error) => {
                    self.end(error.to_string());
                    Err(error)
                }
            };
            result.map_err(
                |error| if begun { Unsent::Part(error.to_string()) } else { Unsent::All(error.to_string()) },
            )?;
        }
    }

    /// Waits until bytes can be sent. If no other thread receives replies, this one does.
    ///
    /// # Errors
    ///
    /// The connection has ended, or the deadline is over. Then the connection ends, unless no byte of the message was sent
    /// (`begun`) and the server still has time for a change.
    fn wait_to_send(&self, deadline: Instant, begun: bool) -> io::Result<()> {
        let mut pending = self.pending();
        if let Some(reason) = &pending.broken {
            return Err(io::Error::other(reason.clone()));
        }
        let now = Instant::now();
        let left = deadline.saturating_duration_since(now);
        if left.is_zero() {
            let goes_on = !begun && pending.changes.have_time(now);
            drop(pending);
            let reason = "the server receives no more requests";
            if !goes_on {
                self.end(reason.to_owned());
            }
            return Err(io::Error::new(ErrorKind::TimedOut, reason));
        }
        let receives = !pending.has_reader;
        pending.has_reader = true;
        drop(pending);
        let readable = self.stream.wait_to_send(receives, left);
        if receives {
            let received = match readable {
                Ok(true) => self.read_until(|_completed| true, deadline),
                _ => Ok(()),
            };
            drop(self.stop_receiving(received));
        }
        readable.map(drop)
    }
}
