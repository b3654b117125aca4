//! The client of one export, shared by threads: it reads, and queries the block status.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::connect::Agreement;
use super::connection::{Connection, NbdRequest};
use super::frame::Dialect;
use super::pool::{ConnectionPool, Timeouts};
use super::proto::BASE_ALLOCATION;
use super::reply::{ReplyContent, RequestError};
use super::status::FlushBeforeStatus;
use super::uri::Uri;
use super::writer::SharedWrites;
use crate::deadline;
use crate::error::Result;
use crate::map::Extent;
use crate::units::Bytes;

/// How often a request is sent over new connections, when each breaks before its answer. Connections made before the
/// request do not count: all of them break when a server is restarted, and each shows that only when it is used.
pub(super) const TRIES: usize = 3;
/// The number of requests of one call that wait for their answers at the same time.
const BATCH: usize = 16;
/// A block status query that fails after this time, or later, is followed by a [`RetryDelay`].
const SLOW: Duration = Duration::from_secs(1);
/// How long the last close of an export waits for the replies to reads that were given up.
const FINISH: Duration = Duration::from_secs(1);
/// `NBD_ESHUTDOWN`: the server is shutting down, and clients are to disconnect.
pub(super) const ESHUTDOWN: u32 = 108;

/// A client of one export. [`Client::writer`] gives the right to write.
///
/// Requests of several threads share the connections. A connection that breaks is replaced, and its requests are sent
/// again, within the [`Timeouts`] and the deadline of the FUSE request that the thread works on.
#[derive(Debug)]
pub struct Client {
    pool: ConnectionPool,
    /// Why block status is not queried, if it is not.
    no_status: OnceLock<String>,
    retry_delay: Arc<RetryDelay>,
    writes: SharedWrites,
}

/// The time before which a server gets no further block status query, because it did not answer the last one in time.
///
/// Without it, each step of an open, a stat and an lseek would wait for as long as a request may last, one after the
/// other, and the answer would be data in the end.
#[derive(Debug, Default)]
pub struct RetryDelay(Mutex<Option<Instant>>);

impl RetryDelay {
    /// Whether a query may be sent.
    fn is_over(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_none_or(|until| Instant::now() >= until)
    }

    /// Begins a delay.
    fn begin(&self, delay: Duration) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + delay);
    }
}

impl Client {
    /// Connects to the server and opens the export. There is one attempt.
    ///
    /// # Errors
    ///
    /// The server cannot be reached, its certificate is not accepted, it has no such export, or it does not follow the
    /// protocol.
    pub fn open(uri: &Uri) -> Result<Self> {
        Self::open_with_timeouts(uri, Timeouts::default())
    }

    /// As [`Client::open`], with the retry delay of earlier clients of the same export.
    ///
    /// # Errors
    ///
    /// As [`Client::open`].
    pub fn open_again(uri: &Uri, retry_delay: Arc<RetryDelay>) -> Result<Self> {
        Ok(Self { retry_delay, ..Self::open(uri)? })
    }

    /// As [`Client::open`], with other timeouts.
    ///
    /// # Errors
    ///
    /// As [`Client::open`].
    pub fn open_with_timeouts(uri: &Uri, timeouts: Timeouts) -> Result<Self> {
        let pool = ConnectionPool::open(uri.clone(), timeouts)?;
        let no_status = OnceLock::new();
        if pool.first().context.is_none() {
            no_status.get_or_init(|| RequestError::NoContext.to_string());
        }
        Ok(Self { pool, no_status, retry_delay: Arc::default(), writes: SharedWrites::default() })
    }

    /// The export's URI.
    pub fn uri(&self) -> &Uri {
        self.pool.uri()
    }

    /// The length of the export. It stays the same: a reconnection to an export of another length is refused.
    pub fn size(&self) -> Bytes {
        self.pool.first().export.size
    }

    /// Whether writes over other connections are visible on those of this client, at the latest after
    /// [`Client::flush`].
    ///
    /// With `NBD_FLAG_CAN_MULTI_CONN`, the writes that a flush covers are visible on all connections when the server
    /// has replied to the flush. A read-only export needs no flush.
    pub fn is_visible_elsewhere(&self) -> bool {
        let export = self.pool.first().export;
        export.multi_conn && (export.flush || export.read_only)
    }

    /// Makes all writes that the server answered before this call, on any connection, visible on all of them.
    ///
    /// # Errors
    ///
    /// EIO when the server fails to flush.
    pub fn flush(&self) -> io::Result<()> {
        let eio = |failure: RequestError| {
            log::debug!("{}: cannot flush: {failure}", self.uri());
            io::Error::from_raw_os_error(libc::EIO)
        };
        self.flush_until(self.deadline()).map_err(eio)
    }

    /// Flushes before `until`, if the server has that command.
    fn flush_until(&self, until: Instant) -> std::result::Result<(), RequestError> {
        if !self.pool.first().export.flush {
            return Ok(());
        }
        match self.send_all(&[NbdRequest::Flush], until).pop() {
            Some(Ok(_)) => Ok(()),
            Some(Err(failure)) => Err(failure),
            None => Err(RequestError::Broken("the request was not sent in time".to_owned())),
        }
    }

    /// The deadline of a call that begins now.
    fn deadline(&self) -> Instant {
        deadline::no_later_than(Instant::now() + self.pool.timeouts().request)
    }

    /// Whether a connection of this client has ended: the server may have been replaced by another one since.
    pub fn has_lost_connection(&self) -> bool {
        self.pool.has_lost_connection()
    }

    /// Why the server's block status is not used, if it is not.
    pub fn no_status(&self) -> Option<&str> {
        self.no_status.get().map(String::as_str)
    }

    /// The source of holes, for a layer.
    pub fn holes_from(&self) -> String {
        match (self.no_status(), self.pool.first().dialect) {
            (Some(_), _) => "none".to_owned(),
            (None, Dialect::Extended) => format!("NBD block status ({BASE_ALLOCATION}, 64 bits)"),
            (None, _) => format!("NBD block status ({BASE_ALLOCATION})"),
        }
    }

    /// The alignment of reads and block status queries.
    pub fn minimum_block(&self) -> Bytes {
        self.pool.first().blocks.minimum
    }

    /// The longest read of one request.
    pub fn longest_read(&self) -> Bytes {
        self.pool.first().blocks.maximum
    }

    /// The parameters of all connections.
    pub(super) fn agreement(&self) -> &Agreement {
        self.pool.first()
    }

    /// What its writers share.
    pub(super) fn writes(&self) -> &SharedWrites {
        &self.writes
    }

    /// The longest waits for the server.
    pub(super) fn timeouts(&self) -> Timeouts {
        self.pool.timeouts()
    }

    /// The connection for the next request.
    ///
    /// # Errors
    ///
    /// The reason why there is none, at the latest at `until`.
    pub(super) fn connection(&self, until: Instant) -> std::result::Result<Arc<Connection>, String> {
        self.pool.connection(until)
    }

    /// Receives the replies to reads that were given up, for a limited time, before the connections are closed.
    pub fn finish_reads(&self) {
        let until = deadline::no_later_than(Instant::now() + FINISH);
        self.pool.live().iter().for_each(|connection| connection.drain(until));
    }

    /// The longest range of a block status query.
    pub fn longest_status(&self) -> Bytes {
        self.pool.first().dialect.longest_status()
    }

    /// Reads up to `buf.len()` bytes at `offset`; fewer only at the end of the export, and none beyond it.
    ///
    /// # Errors
    ///
    /// EIO when the server fails to read, breaks the protocol, or cannot be reached within the [`Timeouts`].
    pub fn read_at(&self, buf: &mut [u8], offset: Bytes) -> io::Result<usize> {
        let left = usize::try_from(self.size().saturating_sub(offset).get()).unwrap_or(usize::MAX);
        let len = buf.len().min(left);
        let end = offset.saturating_add(Bytes::new(len as u64));
        let requests = self.reads_of(offset..end);
        let answers = self.send_all(&requests, self.deadline());
        for (request, answer) in requests.iter().zip(answers) {
            match (request, answer) {
                (NbdRequest::Read(range), Ok(ReplyContent::Bytes(bytes))) => {
                    copy_part(bytes.bytes(), range.start, buf, offset..end);
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

    /// The block status of several ranges, each with an answer of its own: the extents from its start on, which may end
    /// before or after the range does, or the reason why there are none. With [`FlushBeforeStatus::Yes`], writes over
    /// other connections are made visible first.
    ///
    /// Each query is sent after the call began. A range starts and ends on [`Client::minimum_block`] or at the end of
    /// the export.
    pub fn block_status(
        &self,
        ranges: &[Range<Bytes>],
        flush: FlushBeforeStatus,
    ) -> Vec<std::result::Result<Vec<Extent>, RequestError>> {
        let fail = |failure: RequestError| ranges.iter().map(|_| Err(failure.clone())).collect();
        if self.no_status().is_some() {
            return fail(RequestError::NoContext);
        }
        if !self.retry_delay.is_over() {
            return fail(RequestError::Broken("the last block status query had no answer in time".to_owned()));
        }
        let (begin, until) = (Instant::now(), self.deadline());
        if flush == FlushBeforeStatus::Yes
            && let Err(failure) = self.flush_until(until)
        {
            self.delay_after(begin, &failure);
            return fail(failure);
        }
        let requests: Vec<NbdRequest> = ranges.iter().cloned().map(NbdRequest::Status).collect();
        let answers = self.send_all(&requests, until).into_iter();
        answers.map(|answer| self.status_answer(answer, begin)).collect()
    }

    /// The extents in the answer to a query that was sent at `begin`. A server that broke the protocol, or has no block
    /// status, gets no further query; a server that was too slow gets none for a while.
    fn status_answer(
        &self,
        answer: std::result::Result<ReplyContent, RequestError>,
        begin: Instant,
    ) -> std::result::Result<Vec<Extent>, RequestError> {
        let failure = match answer {
            Ok(ReplyContent::Extents(extents)) => return Ok(extents),
            Ok(_) => RequestError::NoContext,
            Err(failure) => failure,
        };
        if matches!(failure, RequestError::Violation(_) | RequestError::NoContext) {
            self.no_status.get_or_init(|| {
                log::warn!("{}: no holes from now on: {failure}", self.uri());
                failure.to_string()
            });
        }
        self.delay_after(begin, &failure);
        Err(failure)
    }

    /// Begins the retry delay after a query, sent at `begin`, that the server did not answer in time.
    fn delay_after(&self, begin: Instant, failure: &RequestError) {
        if matches!(failure, RequestError::Broken(_)) && begin.elapsed() >= SLOW {
            self.retry_delay.begin(self.pool.timeouts().request);
        }
    }

    /// The reads of a range, within the block sizes. The first may begin before the range, and the last may end after
    /// it.
    fn reads_of(&self, range: Range<Bytes>) -> Vec<NbdRequest> {
        let blocks = self.pool.first().blocks;
        let end = range.end.align_up(blocks.minimum).unwrap_or(range.end).min(self.size());
        let mut at = range.start.align_down(blocks.minimum);
        let mut requests = Vec::new();
        while range.start < range.end && at < end {
            let next = at.saturating_add(blocks.maximum).min(end);
            requests.push(NbdRequest::Read(at..next));
            at = next;
        }
        requests
    }

    /// The answers to requests, each before `until`. Requests of a connection that breaks are sent again over another.
    fn send_all(
        &self,
        requests: &[NbdRequest],
        until: Instant,
    ) -> Vec<std::result::Result<ReplyContent, RequestError>> {
        let begin = Instant::now();
        let mut answers: Vec<_> =
            requests.iter().map(|_| Err(RequestError::Broken("the request was not sent in time".to_owned()))).collect();
        let mut tries = 0;
        while tries < TRIES {
            let open: Vec<usize> =
                (0..requests.len()).filter(|&index| matches!(answers[index], Err(RequestError::Broken(_)))).collect();
            if open.is_empty() || Instant::now() >= until {
                break;
            }
            match self.pool.connection(until) {
                Ok(connection) => {
                    tries += usize::from(connection.opened() >= begin);
                    for batch in open.chunks(BATCH) {
                        self.send_batch(&connection, batch, requests, &mut answers, until);
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

    /// Sends the requests with the indices `batch` over one connection, and waits for their answers.
    fn send_batch(
        &self,
        connection: &Connection,
        batch: &[usize],
        requests: &[NbdRequest],
        answers: &mut [std::result::Result<ReplyContent, RequestError>],
        until: Instant,
    ) {
        let sent: Vec<_> = batch.iter().map(|&index| (index, connection.submit(&requests[index], until))).collect();
        for (index, id) in sent {
            let answer = id.and_then(|id| connection.wait(id, until));
            answers[index] = match answer {
                Err(RequestError::Server(ESHUTDOWN)) => {
                    connection.retire();
                    Err(RequestError::Broken("the server is shutting down".to_owned()))
                }
                answer => answer,
            };
        }
    }
}

/// Copies the bytes of the range `wanted` from `bytes`, which begin at offset `at`, to `buf`, which begins where
/// `wanted` does.
fn copy_part(bytes: &[u8], at: Bytes, buf: &mut [u8], wanted: Range<Bytes>) {
    let index = |bytes: Bytes| usize::try_from(bytes.get()).expect("a piece of a buffer fits into memory");
    let from = index(wanted.start.saturating_sub(at));
    let to = index(at.saturating_sub(wanted.start));
    let end = index(wanted.end.saturating_sub(wanted.start));
    let count = (bytes.len() - from).min(end - to);
    buf[to..to + count].copy_from_slice(&bytes[from..from + count]);
}
