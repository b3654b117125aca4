//! A read-only client of one export, for many threads.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::connection::{Connection, NbdRequest};
use super::frame::Dialect;
use super::pool::{ConnectionPool, Timeouts};
use super::proto::BASE_ALLOCATION;
use super::reply::{ReplyContent, RequestError};
use super::status::FlushBeforeStatus;
use super::uri::Uri;
use crate::deadline;
use crate::error::Result;
use crate::map::Extent;
use crate::units::Bytes;

/// How often a request is sent over new connections when each breaks before its answer. Those from before the request do
/// not count: all of them break when a server is restarted, and each tells only when it is used.
const TRIES: usize = 3;
/// Requests of one call that are under way together.
const BATCH: usize = 16;
/// A block status that fails after so long was waited for.
const SLOW: Duration = Duration::from_secs(1);
/// `NBD_ESHUTDOWN`: the server is about to leave, and wants us to.
const ESHUTDOWN: u32 = 108;

/// A read-only client of one export.
///
/// Requests of several threads share the connections. A connection that breaks is replaced, and its requests are sent
/// again, within the bounds of [`Timeouts`] and of the request that the thread works on.
#[derive(Debug)]
pub struct Client {
    pool: ConnectionPool,
    no_status: OnceLock<String>,
    rest: Arc<RetryDelay>,
}

/// UntilDeadline when a server is not asked for its block status, because it did not answer in time.
///
/// Otherwise each step of an open, a look at the attributes and an lseek would wait as long as a request may, one after
/// the other, for an answer that is data in the end.
#[derive(Debug, Default)]
pub struct RetryDelay(Mutex<Option<Instant>>);

impl RetryDelay {
    fn is_over(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_none_or(|until| Instant::now() >= until)
    }

    fn begin(&self, long: Duration) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + long);
    }
}

impl Client {
    /// Connects to the server and opens the export. One attempt.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or trusted, has no such export, or does not speak the protocol.
    pub fn open(uri: &Uri) -> Result<Self> {
        Self::open_with_timeouts(uri, Timeouts::default())
    }

    /// As [`Client::open`], with the rest of earlier clients of the same export.
    ///
    /// # Errors
    ///
    /// As [`Client::open`].
    pub fn open_again(uri: &Uri, rest: Arc<RetryDelay>) -> Result<Self> {
        Ok(Self { rest, ..Self::open(uri)? })
    }

    /// As [`Client::open`], with other limits of time.
    ///
    /// # Errors
    ///
    /// As [`Client::open`].
    pub fn open_with_timeouts(uri: &Uri, patience: Timeouts) -> Result<Self> {
        let pool = ConnectionPool::open(uri.clone(), patience)?;
        let no_status = OnceLock::new();
        if pool.first().context.is_none() {
            no_status.get_or_init(|| RequestError::NoContext.to_string());
        }
        Ok(Self { pool, no_status, rest: Arc::default() })
    }

    /// The export's URI.
    pub fn uri(&self) -> &Uri {
        self.pool.uri()
    }

    /// The export's length. It stays the same: a server that comes back with another one is refused.
    pub fn size(&self) -> Bytes {
        self.pool.first().export.size
    }

    /// Whether what was written over another connection is visible on ours, at the latest after [`Client::flush`].
    ///
    /// A server with `NBD_FLAG_CAN_MULTI_CONN` promises that what a flush covers is visible on all connections when it
    /// replies to the flush. An export that takes no writes needs no flush.
    pub fn is_visible_elsewhere(&self) -> bool {
        let export = self.pool.first().export;
        export.multi_conn && (export.flush || export.read_only)
    }

    /// Makes all writes that the server answered before this call, on any connection, visible on all of them.
    ///
    /// # Errors
    ///
    /// EIO when the server cannot do it.
    pub fn flush(&self) -> io::Result<()> {
        let eio = |failure: RequestError| {
            log::debug!("{}: cannot flush: {failure}", self.uri());
            io::Error::from_raw_os_error(libc::EIO)
        };
        self.settle(self.deadline()).map_err(eio)
    }

    fn settle(&self, until: Instant) -> std::result::Result<(), RequestError> {
        if !self.pool.first().export.flush {
            return Ok(());
        }
        match self.ask(&[NbdRequest::Flush], until).pop() {
            Some(Ok(_)) => Ok(()),
            Some(Err(failure)) => Err(failure),
            None => Err(RequestError::Broken("not asked".to_owned())),
        }
    }

    /// When a call that begins now has to end.
    fn deadline(&self) -> Instant {
        deadline::no_later_than(Instant::now() + self.pool.patience().request)
    }

    /// Why the server's block status is not used, if it is not.
    pub fn no_status(&self) -> Option<&str> {
        self.no_status.get().map(String::as_str)
    }

    /// Where holes come from, in a few words.
    pub fn holes_from(&self) -> String {
        match (self.no_status(), self.pool.first().dialect) {
            (Some(_), _) => "none".to_owned(),
            (None, Dialect::Extended) => format!("NBD block status ({BASE_ALLOCATION}, 64 bits)"),
            (None, _) => format!("NBD block status ({BASE_ALLOCATION})"),
        }
    }

    /// The alignment of requests, and with it of block status.
    pub fn minimum_block(&self) -> Bytes {
        self.pool.first().blocks.minimum
    }

    /// The longest range that is worth asking about at once.
    pub fn longest_status(&self) -> Bytes {
        self.pool.first().dialect.longest_status()
    }

    /// Reads up to `buf.len()` bytes at `offset`; fewer only at the end of the export, and none beyond it.
    ///
    /// # Errors
    ///
    /// EIO when the server fails to give the bytes, breaks the protocol, or stays away longer than [`Timeouts`] lasts.
    pub fn read_at(&self, buf: &mut [u8], offset: Bytes) -> io::Result<usize> {
        let left = usize::try_from(self.size().saturating_sub(offset).get()).unwrap_or(usize::MAX);
        let len = buf.len().min(left);
        let end = offset.saturating_add(Bytes::new(len as u64));
        let asks = self.cut(offset..end);
        let answers = self.ask(&asks, self.deadline());
        for (ask, answer) in asks.iter().zip(answers) {
            match (ask, answer) {
                (NbdRequest::Read(range), Ok(ReplyContent::Bytes(bytes))) => {
                    place(&bytes, range.start, buf, offset..end);
                }
                (_, Err(failure)) => {
                    log::debug!("{}: cannot read at {offset}: {failure}", self.uri());
                    return Err(io::Error::from_raw_os_error(libc::EIO));
                }
                (_, Ok(_)) => return Err(io::Error::from_raw_os_error(libc::EIO)),
            }
        }
        Ok(len)
    }

    /// The block status of several ranges, each answered on its own: the runs from its start on, which may end before or
    /// after the range does, or the reason why there are none. With [`FlushBeforeStatus::Yes`], writes over other connections
    /// are made visible first.
    ///
    /// Each answer was given after the call began. A range starts and ends on [`Client::minimum_block`] or at the end
    /// of the export.
    pub fn block_status(
        &self,
        ranges: &[Range<Bytes>],
        flush: FlushBeforeStatus,
    ) -> Vec<std::result::Result<Vec<Extent>, RequestError>> {
        let fail = |failure: RequestError| ranges.iter().map(|_| Err(failure.clone())).collect();
        if self.no_status().is_some() {
            return fail(RequestError::NoContext);
        }
        if !self.rest.is_over() {
            return fail(RequestError::Broken("the server did not tell its holes in time before".to_owned()));
        }
        let (begin, until) = (Instant::now(), self.deadline());
        if flush == FlushBeforeStatus::Yes
            && let Err(failure) = self.settle(until)
        {
            self.rest_after(begin, &failure);
            return fail(failure);
        }
        let asks: Vec<NbdRequest> = ranges.iter().cloned().map(NbdRequest::Status).collect();
        let answers = self.ask(&asks, until).into_iter();
        answers.map(|answer| self.status_answer(answer, begin)).collect()
    }

    /// The runs of an answer that was asked for at `begin`. A server that broke the protocol, or has no answers, is not
    /// asked again; one that was too slow is not for a while.
    fn status_answer(
        &self,
        answer: std::result::Result<ReplyContent, RequestError>,
        begin: Instant,
    ) -> std::result::Result<Vec<Extent>, RequestError> {
        let failure = match answer {
            Ok(ReplyContent::Extents(runs)) => return Ok(runs),
            Ok(ReplyContent::Bytes(_) | ReplyContent::Flushed) => RequestError::NoContext,
            Err(failure) => failure,
        };
        if matches!(failure, RequestError::Violation(_) | RequestError::NoContext) {
            self.no_status.get_or_init(|| {
                log::warn!("{}: no holes from now on: {failure}", self.uri());
                failure.to_string()
            });
        }
        self.rest_after(begin, &failure);
        Err(failure)
    }

    fn rest_after(&self, begin: Instant, failure: &RequestError) {
        if matches!(failure, RequestError::Broken(_)) && begin.elapsed() >= SLOW {
            self.rest.begin(self.pool.patience().request);
        }
    }

    /// Cuts a range into reads that keep to the block sizes; the first and the last may be longer than asked.
    fn cut(&self, range: Range<Bytes>) -> Vec<NbdRequest> {
        let blocks = self.pool.first().blocks;
        let end = range.end.align_up(blocks.minimum).unwrap_or(range.end).min(self.size());
        let mut at = range.start.align_down(blocks.minimum);
        let mut asks = Vec::new();
        while range.start < range.end && at < end {
            let next = at.saturating_add(blocks.maximum).min(end);
            asks.push(NbdRequest::Read(at..next));
            at = next;
        }
        asks
    }

    /// Gets every ask an answer before `until`, over as many connections as it takes.
    fn ask(&self, asks: &[NbdRequest], until: Instant) -> Vec<std::result::Result<ReplyContent, RequestError>> {
        let begin = Instant::now();
        let mut answers: Vec<_> = asks.iter().map(|_| Err(RequestError::Broken("not asked".to_owned()))).collect();
        let mut tries = 0;
        while tries < TRIES {
            let open: Vec<usize> =
                (0..asks.len()).filter(|&index| matches!(answers[index], Err(RequestError::Broken(_)))).collect();
            if open.is_empty() || Instant::now() >= until {
                break;
            }
            match self.pool.connection(until) {
                Ok(connection) => {
                    tries += usize::from(connection.born() >= begin);
                    for batch in open.chunks(BATCH) {
                        self.attempt(&connection, batch, asks, &mut answers, until);
                    }
                }
                Err(reason) => {
                    for index in open {
                        answers[index] = Err(RequestError::Broken(reason.clone()));
                    }
                    break;
                }
            }
        }
        answers
    }

    /// Sends a batch over one connection and waits for its answers.
    fn attempt(
        &self,
        connection: &Connection,
        batch: &[usize],
        asks: &[NbdRequest],
        answers: &mut [std::result::Result<ReplyContent, RequestError>],
        until: Instant,
    ) {
        let tickets: Vec<_> = batch.iter().map(|&index| (index, connection.submit(&asks[index], until))).collect();
        for (index, ticket) in tickets {
            let answer = ticket.and_then(|ticket| connection.wait(ticket, until));
            answers[index] = match answer {
                Err(RequestError::Server(ESHUTDOWN)) => {
                    connection.end("the server is shutting down".to_owned());
                    Err(RequestError::Broken("the server is shutting down".to_owned()))
                }
                answer => answer,
            };
        }
    }
}

/// Copies the part of `bytes`, which begin at `at`, that belongs to `wanted`, which `buf` begins with.
fn place(bytes: &[u8], at: Bytes, buf: &mut [u8], wanted: Range<Bytes>) {
    let index = |bytes: Bytes| usize::try_from(bytes.get()).expect("a piece of a buffer fits into memory");
    let from = index(wanted.start.saturating_sub(at));
    let to = index(at.saturating_sub(wanted.start));
    let end = index(wanted.end.saturating_sub(wanted.start));
    let count = (bytes.len() - from).min(end - to);
    buf[to..to + count].copy_from_slice(&bytes[from..from + count]);
}
