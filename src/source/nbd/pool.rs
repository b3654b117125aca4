//! The connections to one export: how many, which one next, and what happens when the server is away.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::connect::{Agreement, connect};
use super::connection::Connection;
use super::tls::TlsSettings;
use super::uri::Uri;
use crate::deadline;
use crate::error::{Error, Result};

/// The most connections to one export that is read-only, where the server allows several (`NBD_FLAG_CAN_MULTI_CONN`).
///
/// An export that can be written has one connection: what another client has written may be visible on one connection
/// before it is on the next one, unless it is flushed. A hole by the block status of one connection could be data on another.
const MAX_CONNECTIONS: usize = 4;
/// How long an additional connection may take. A server at the limit of its clients may accept and then say nothing.
const EXTRA: Duration = Duration::from_secs(1);
/// The first and the longest pause between two attempts to reach a server that is away.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How long a server is waited for.
///
/// One call of [`super::Client`] takes at most `request`, whatever happens in it: lost connections, attempts to connect and
/// their host names, answers in small pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a new connection, from the socket to the end of the negotiation.
    pub connect: Duration,
    /// For a call, from its begin to its answer.
    pub request: Duration,
    /// For a server that is away to come back. Counted from when it was missed first: after that, calls fail at once,
    /// but for one attempt each second. Also the pause after an additional connection failed.
    pub outage: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: Duration::from_secs(10), request: Duration::from_secs(30), outage: Duration::from_secs(30) }
    }
}

/// The live connections to one export.
#[derive(Debug)]
pub struct ConnectionPool {
    uri: Uri,
    identity: Option<TlsSettings>,
    first: Agreement,
    patience: Timeouts,
    state: Mutex<PoolState>,
    changed: Condvar,
}

#[derive(Debug)]
struct PoolState {
    live: Vec<Arc<Connection>>,
    limit: usize,
    /// When an additional connection may be tried, after one failed.
    more_after: Option<Instant>,
    /// A thread is connecting.
    opening: bool,
    outage: Option<Outage>,
}

/// The server cannot be reached.
#[derive(Debug)]
struct Outage {
    since: Instant,
    pause: Duration,
    next_attempt: Instant,
    reason: String,
}

impl PoolState {
    /// Whether one more connection may be tried now.
    fn may_grow(&self) -> bool {
        self.live.len() < self.limit && self.more_after.is_none_or(|after| Instant::now() >= after)
    }
}

impl ConnectionPool {
    /// Makes the first connection.
    ///
    /// # Errors
    ///
    /// Whatever keeps the export from being opened. Nothing is tried twice.
    pub fn open(uri: Uri, patience: Timeouts) -> Result<Self> {
        let identity = TlsSettings::of(&uri)?;
        let (stream, first) =
            connect(&uri, identity.as_ref(), deadline::no_later_than(Instant::now() + patience.connect))?;
        let several = first.export.multi_conn && first.export.read_only;
        let limit = if several { MAX_CONNECTIONS } else { 1 };
        let live = vec![Arc::new(Connection::new(stream, first))];
        let state = Mutex::new(PoolState { live, limit, more_after: None, opening: false, outage: None });
        Ok(Self { uri, identity, first, patience, state, changed: Condvar::new() })
    }

    /// What the first connection agreed on. Later ones have the same size and block sizes.
    pub fn first(&self) -> &Agreement {
        &self.first
    }

    /// The export.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// How long a server is waited for.
    pub fn patience(&self) -> Timeouts {
        self.patience
    }

    /// The connection to use next: an idle one, else a new one, else the one with the fewest requests.
    ///
    /// # Errors
    ///
    /// Why there is none, at the latest at `until`.
    pub fn connection(&self, until: Instant) -> std::result::Result<Arc<Connection>, String> {
        let mut state = self.state();
        loop {
            state.live.retain(|connection| !connection.is_broken());
            let best = state.live.iter().min_by_key(|connection| connection.load()).cloned();
            if let Some(best) = &best
                && (best.load() == 0 || state.opening || !state.may_grow())
            {
                return Ok(Arc::clone(best));
            }
            let now = Instant::now();
            let wake = match &state.outage {
                _ if state.opening => Some(until),
                Some(outage) if best.is_none() && now < outage.next_attempt => {
                    if now.duration_since(outage.since) >= self.patience.outage {
                        return Err(outage.reason.clone());
                    }
                    Some(outage.next_attempt.min(until))
                }
                _ => None,
            };
            if let Some(wake) = wake {
                if now >= until {
                    return Err("the server does not come back in time".to_owned());
                }
                let left = wake.saturating_duration_since(now);
                state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            state.opening = true;
            drop(state);
            let patience = if best.is_some() { EXTRA } else { self.patience.connect };
            let opened = self.open_another(until.min(now + patience));
            state = self.state();
            state.opening = false;
            self.changed.notify_all();
            match opened {
                Ok(connection) => {
                    self.back(&mut state);
                    state.live.push(Arc::clone(&connection));
                    return Ok(connection);
                }
                Err(error) if best.is_some() => {
                    log::info!("{error}; going on with {} connections", state.live.len());
                    state.more_after = Some(Instant::now() + self.patience.outage);
                }
                Err(error) => self.away(&mut state, &error)?,
            }
        }
    }

    fn open_another(&self, deadline: Instant) -> Result<Arc<Connection>> {
        let (stream, agreement) = connect(&self.uri, self.identity.as_ref(), deadline)?;
        let (now, before) = (agreement.export.size, self.first.export.size);
        if now != before {
            return Err(Error::failed(format!("the export has {now} bytes now, not {before} as before"))
                .on(self.uri.to_string()));
        }
        if agreement.export != self.first.export {
            // What was concluded from its abilities no longer holds.
            return Err(Error::failed("the server has other abilities than before (transmission flags)")
                .on(self.uri.to_string()));
        }
        if agreement.blocks != self.first.blocks {
            return Err(Error::failed("the server wants other block sizes than before").on(self.uri.to_string()));
        }
        Ok(Arc::new(Connection::new(stream, agreement)))
    }

    /// Notes that the server is there.
    fn back(&self, state: &mut PoolState) {
        if state.outage.take().is_some() {
            log::info!("{}: connected again", self.uri);
        }
    }

    /// Notes that the server is away; an error when that lasts too long.
    fn away(&self, state: &mut PoolState, error: &Error) -> std::result::Result<(), String> {
        let now = Instant::now();
        let outage = state.outage.get_or_insert_with(|| {
            log::warn!("{error}; trying again");
            Outage { since: now, pause: FIRST_PAUSE, next_attempt: now, reason: String::new() }
        });
        outage.reason = error.to_string();
        outage.next_attempt = now + outage.pause;
        outage.pause = (outage.pause * 2).min(LONGEST_PAUSE);
        if now.duration_since(outage.since) < self.patience.outage {
            return Ok(());
        }
        log::error!("{error}");
        Err(outage.reason.clone())
    }

    fn state(&self) -> MutexGuard<'_, PoolState> {
        // Nothing in this module panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
