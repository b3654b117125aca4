//! The connections to one export: their number, the choice for the next request, and reconnection after an outage.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::connect::{Agreement, connect};
use super::connection::Connection;
use super::tls::TlsSettings;
use super::uri::Uri;
use crate::deadline;
use crate::error::{Error, Result};

/// The largest number of connections to one export that is read-only, where the server allows several
/// (`NBD_FLAG_CAN_MULTI_CONN`).
///
/// An export that can be written has one connection: without a flush, a write of another client may be visible on one
/// connection and not yet on the next one. A hole in the block status of one connection could be data on another. Own writes
/// are visible to the reads that follow them for the same reason.
const MAX_CONNECTIONS: usize = 4;
/// The time that an additional connection may take. A server at its limit of clients may accept it and never answer.
const ADDITIONAL_CONNECT: Duration = Duration::from_secs(1);
/// The first pause between two attempts to connect in an outage. Each pause is twice as long as the last one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The longest waits for a server.
///
/// One call of [`super::Client`] takes at most `request`. That includes lost connections, attempts to connect with
/// their host name lookups, and answers in small pieces. The calls of a FUSE request share its deadline, except that a request
/// of [`super::ExportWriter`] has only its own: `change` or `flush`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a new connection, from the socket to the end of the negotiation.
    pub connect: Duration,
    /// For a call, from its start to its answer.
    pub request: Duration,
    /// For the end of an outage, from the first failed attempt to connect. After that, calls fail at once, except that
    /// one attempt is made each second. Also the pause after an additional connection failed.
    pub outage: Duration,
    /// For the reply to a write, from its start. A write is not repeated, so this is longer than `request`: a server may have to
    /// write back its cache first.
    pub change: Duration,
    /// For the reply to a flush, from its start. A server may have gigabytes in its cache and a slow disk. Writes wait as long
    /// while a flush does, because a server may process requests one after the other.
    pub flush: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            request: Duration::from_secs(30),
            outage: Duration::from_secs(30),
            change: Duration::from_secs(120),
            flush: Duration::from_secs(600),
        }
    }
}

/// The live connections to one export.
#[derive(Debug)]
pub struct ConnectionPool {
    uri: Uri,
    tls: Option<TlsSettings>,
    /// The parameters of the first connection.
    first: Agreement,
    timeouts: Timeouts,
    state: Mutex<PoolState>,
    /// Signals the end of an attempt to connect.
    changed: Condvar,
}

#[derive(Debug)]
struct PoolState {
    live: Vec<Arc<Connection>>,
    /// Whether a connection has ended and was removed.
    lost: bool,
    /// The largest number of connections.
    limit: usize,
    /// The time before which no additional connection is tried, after one failed.
    more_after: Option<Instant>,
    /// Some thread is connecting.
    opening: bool,
    outage: Option<Outage>,
}

/// A time in which the server cannot be reached.
#[derive(Debug)]
struct Outage {
    since: Instant,
    /// The pause after the next failed attempt to connect.
    pause: Duration,
    next_attempt: Instant,
    /// Why the last attempt failed.
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
    /// The server cannot be reached, or the export cannot be opened. There is one attempt.
    pub fn open(uri: Uri, timeouts: Timeouts) -> Result<Self> {
        let tls = TlsSettings::of(&uri)?;
        let (stream, first) =
            connect(&uri, tls.as_ref(), None, deadline::no_later_than(Instant::now() + timeouts.connect))?;
        let several = first.export.multi_conn && first.export.read_only;
        let limit = if several { MAX_CONNECTIONS } else { 1 };
        let live = vec![Arc::new(Connection::new(stream, first))];
        let state = Mutex::new(PoolState { live, lost: false, limit, more_after: None, opening: false, outage: None });
        Ok(Self { uri, tls, first, timeouts, state, changed: Condvar::new() })
    }

    /// The parameters of the first connection. Later connections have the same size, flags and block sizes.
    pub fn first(&self) -> &Agreement {
        &self.first
    }

    /// The URI of the export.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The longest waits for the server.
    pub fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// The connection to use next: an idle one, else a new one, else the one with the fewest requests.
    ///
    /// # Errors
    ///
    /// The reason why there is none, at the latest at `until`.
    pub fn connection(&self, until: Instant) -> std::result::Result<Arc<Connection>, String> {
        let mut state = self.state();
        loop {
            let before = state.live.len();
            state.live.retain(|connection| !connection.is_broken());
            state.lost |= state.live.len() < before;
            let best = state.live.iter().min_by_key(|connection| connection.load()).cloned();
            if let Some(best) = &best
                && (best.load() == 0 || state.opening || !state.may_grow())
            {
                return Ok(Arc::clone(best));
            }
            let now = Instant::now();
            if let Some(wake) = self.wait_until(&state, best.is_some(), now, until)? {
                if now >= until {
                    return Err("the server cannot be reached in time".to_owned());
                }
                let left = wake.saturating_duration_since(now);
                state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            state.opening = true;
            drop(state);
            let limit = if best.is_some() { ADDITIONAL_CONNECT } else { self.timeouts.connect };
            let opened = self.open_another(until.min(now + limit));
            state = self.state();
            state.opening = false;
            self.changed.notify_all();
            match opened {
                Ok(connection) => {
                    self.outage_over(&mut state);
                    state.live.push(Arc::clone(&connection));
                    return Ok(connection);
                }
                Err(error) if best.is_some() => {
                    log::info!("{error}; continuing with {} connections", state.live.len());
                    state.more_after = Some(Instant::now() + self.timeouts.outage);
                }
                Err(error) => self.connect_failed(&mut state, &error)?,
            }
        }
    }

    /// Whether any connection has ended.
    pub fn has_lost_connection(&self) -> bool {
        let state = self.state();
        state.lost || state.live.iter().any(|connection| connection.is_broken())
    }

    /// All live connections.
    pub fn live(&self) -> Vec<Arc<Connection>> {
        self.state().live.clone()
    }

    /// The time to wait until before the next attempt to connect; `None` when it is due. `connected`: there is a
    /// connection.
    ///
    /// # Errors
    ///
    /// The outage has lasted too long.
    fn wait_until(
        &self,
        state: &PoolState,
        connected: bool,
        now: Instant,
        until: Instant,
    ) -> std::result::Result<Option<Instant>, String> {
        match &state.outage {
            _ if state.opening => Ok(Some(until)),
            Some(outage) if !connected && now < outage.next_attempt => {
                if now.duration_since(outage.since) >= self.timeouts.outage {
                    return Err(outage.reason.clone());
                }
                Ok(Some(outage.next_attempt.min(until)))
            }
            _ => Ok(None),
        }
    }

    /// Makes one more connection, with the parameters of the first.
    ///
    /// # Errors
    ///
    /// No connection is made before `deadline`, or the export has changed.
    fn open_another(&self, deadline: Instant) -> Result<Arc<Connection>> {
        let (stream, agreement) = connect(&self.uri, self.tls.as_ref(), None, deadline)?;
        let (now, before) = (agreement.export.size, self.first.export.size);
        if now != before {
            return Err(Error::failed(format!("the export has {now} bytes now, not {before} as before"))
                .on(self.uri.to_string()));
        }
        if agreement.export != self.first.export {
            // The use of flushes and the number of connections depend on the flags of the first connection.
            return Err(Error::failed("the export has other transmission flags than before").on(self.uri.to_string()));
        }
        if agreement.blocks != self.first.blocks {
            return Err(Error::failed("the export has other block sizes than before").on(self.uri.to_string()));
        }
        Ok(Arc::new(Connection::new(stream, agreement)))
    }

    /// Ends an outage after a connection was made.
    fn outage_over(&self, state: &mut PoolState) {
        if state.outage.take().is_some() {
            log::info!("{}: connected again", self.uri);
        }
    }

    /// Begins or continues an outage after an attempt to connect failed.
    ///
    /// # Errors
    ///
    /// The outage has lasted too long.
    fn connect_failed(&self, state: &mut PoolState, error: &Error) -> std::result::Result<(), String> {
        let now = Instant::now();
        let outage = state.outage.get_or_insert_with(|| {
            log::warn!("{error}; retrying");
            Outage { since: now, pause: FIRST_PAUSE, next_attempt: now, reason: String::new() }
        });
        outage.reason = error.to_string();
        outage.next_attempt = now + outage.pause;
        outage.pause = (outage.pause * 2).min(LONGEST_PAUSE);
        if now.duration_since(outage.since) < self.timeouts.outage {
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
