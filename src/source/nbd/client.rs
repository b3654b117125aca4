//! A read-only client of one export, for many threads.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::Instant;

use super::connection::{Ask, Connection};
use super::frame::Dialect;
use super::pool::{Patience, Pool};
use super::proto::BASE_ALLOCATION;
use super::reply::{Content, Failure};
use super::uri::Uri;
use crate::error::Result;
use crate::map::Run;
use crate::units::Bytes;

/// How often a request is sent over new connections when each breaks before its answer. Those from before the request do
/// not count: all of them break when a server is restarted, and each tells only when it is used.
const TRIES: usize = 3;
/// Requests of one call that are under way together.
const BATCH: usize = 16;
/// `NBD_ESHUTDOWN`: the server is about to leave, and wants us to.
const ESHUTDOWN: u32 = 108;

/// A read-only client of one export.
///
/// Requests of several threads share the connections. A connection that breaks is replaced, and its requests are sent
/// again, within the bounds of [`Patience`].
#[derive(Debug)]
pub struct Client {
    pool: Pool,
    no_status: OnceLock<String>,
}

impl Client {
    /// Connects to the server and opens the export. One attempt.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or trusted, has no such export, or does not speak the protocol.
    pub fn open(uri: &Uri) -> Result<Self> {
        Self::open_patiently(uri, Patience::default())
    }

    /// As [`Client::open`], with other limits of time.
    ///
    /// # Errors
    ///
    /// As [`Client::open`].
    pub fn open_patiently(uri: &Uri, patience: Patience) -> Result<Self> {
        let pool = Pool::open(uri.clone().absolute()?, patience)?;
        let no_status = OnceLock::new();
        if pool.first().context.is_none() {
            no_status.get_or_init(|| Failure::NoContext.to_string());
        }
        Ok(Self { pool, no_status })
    }

    /// The export's URI.
    pub fn uri(&self) -> &Uri {
        self.pool.uri()
    }

    /// The export's length. It stays the same: a server that comes back with another one is refused.
    pub fn size(&self) -> Bytes {
        self.pool.first().export.size
    }

    /// Whether the server says that all connections see the same state of the export at any time.
    pub fn is_multi_conn(&self) -> bool {
        self.pool.first().export.multi_conn
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
    /// EIO when the server fails to give the bytes, breaks the protocol, or stays away longer than [`Patience`] lasts.
    pub fn read_at(&self, buf: &mut [u8], offset: Bytes) -> io::Result<usize> {
        let left = usize::try_from(self.size().saturating_sub(offset).get()).unwrap_or(usize::MAX);
        let len = buf.len().min(left);
        let end = offset.saturating_add(Bytes::new(len as u64));
        let asks = self.cut(offset..end);
        let answers = self.ask(&asks);
        for (ask, answer) in asks.iter().zip(answers) {
            match (ask, answer) {
                (Ask::Read(range), Ok(Content::Bytes(bytes))) => place(&bytes, range.start, buf, offset..end),
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
    /// after the range does, or the reason why there are none.
    ///
    /// Each answer was given after the call began. A range starts and ends on [`Client::minimum_block`] or at the end
    /// of the export.
    pub fn block_status(&self, ranges: &[Range<Bytes>]) -> Vec<std::result::Result<Vec<Run>, Failure>> {
        if self.no_status().is_some() {
            return ranges.iter().map(|_| Err(Failure::NoContext)).collect();
        }
        let asks: Vec<Ask> = ranges.iter().cloned().map(Ask::Status).collect();
        let answers = self.ask(&asks).into_iter();
        answers
            .map(|answer| match answer {
                Ok(Content::Runs(runs)) => Ok(runs),
                Ok(Content::Bytes(_)) => Err(Failure::NoContext),
                Err(failure) => {
                    // Who broke the protocol once, or has no answers, is not asked again.
                    if matches!(failure, Failure::Violation(_) | Failure::NoContext) {
                        self.no_status.get_or_init(|| {
                            log::warn!("{}: no holes from now on: {failure}", self.uri());
                            failure.to_string()
                        });
                    }
                    Err(failure)
                }
            })
            .collect()
    }

    /// Cuts a range into reads that keep to the block sizes; the first and the last may be longer than asked.
    fn cut(&self, range: Range<Bytes>) -> Vec<Ask> {
        let blocks = self.pool.first().blocks;
        let end = range.end.align_up(blocks.minimum).unwrap_or(range.end).min(self.size());
        let mut at = range.start.align_down(blocks.minimum);
        let mut asks = Vec::new();
        while range.start < range.end && at < end {
            let next = at.saturating_add(blocks.maximum).min(end);
            asks.push(Ask::Read(at..next));
            at = next;
        }
        asks
    }

    /// Gets every ask an answer, over as many connections as it takes.
    fn ask(&self, asks: &[Ask]) -> Vec<std::result::Result<Content, Failure>> {
        let patience = self.pool.patience();
        let begin = Instant::now();
        let until = begin + patience.outage + patience.request;
        let mut answers: Vec<_> = asks.iter().map(|_| Err(Failure::Broken("not asked".to_owned()))).collect();
        let mut tries = 0;
        while tries < TRIES {
            let open: Vec<usize> =
                (0..asks.len()).filter(|&index| matches!(answers[index], Err(Failure::Broken(_)))).collect();
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
                        answers[index] = Err(Failure::Broken(reason.clone()));
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
        asks: &[Ask],
        answers: &mut [std::result::Result<Content, Failure>],
        until: Instant,
    ) {
        let deadline = until.min(Instant::now() + self.pool.patience().request);
        let tickets: Vec<_> = batch.iter().map(|&index| (index, connection.submit(&asks[index], deadline))).collect();
        for (index, ticket) in tickets {
            let answer = ticket.and_then(|ticket| connection.wait(ticket, deadline));
            answers[index] = match answer {
                Err(Failure::Server(ESHUTDOWN)) => {
                    connection.end("the server is shutting down".to_owned());
                    Err(Failure::Broken("the server is shutting down".to_owned()))
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
