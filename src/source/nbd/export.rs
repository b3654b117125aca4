//! An export of a server, and the client that all its users share.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use super::client::RetryDelay;
use super::{Client, Uri};
use crate::deadline;
use crate::error::{Error, Result};

/// An export by its URI: connected to when it is looked at, by one client for all that have it open.
#[derive(Debug)]
pub struct NbdExport {
    uri: Uri,
    state: Mutex<ExportState>,
    changed: Condvar,
    /// It outlives the clients.
    rest: Arc<RetryDelay>,
}

#[derive(Debug, Default)]
struct ExportState {
    client: Weak<Client>,
    /// Some thread connects.
    connecting: bool,
    /// Attempts to connect that have ended, and why the last of them failed if it did.
    ended: u64,
    failed: Option<String>,
}

/// A thread that connects; however that ends, others may connect afterwards.
struct ConnectAttempt<'a>(&'a NbdExport);

impl Drop for ConnectAttempt<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.connecting = false;
        state.ended += 1;
        self.0.changed.notify_all();
    }
}

impl NbdExport {
    /// The export with that URI.
    pub fn new(uri: Uri) -> Self {
        Self { uri, state: Mutex::default(), changed: Condvar::new(), rest: Arc::default() }
    }

    /// The URI.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// A client that is connected. Those that ask while one connects share what becomes of it, and wait for it no longer
    /// than their own request lasts.
    ///
    /// # Errors
    /// As [`Client::open`].
    pub fn client(&self) -> Result<Arc<Client>> {
        let until = deadline::no_later_than(Instant::now() + deadline::REQUEST);
        let mut state = self.lock();
        let before = state.ended;
        loop {
            if let Some(client) = state.client.upgrade() {
                return Ok(client);
            }
            if let Some(why) = state.failed.as_ref().filter(|_| state.ended > before) {
                return Err(Error::failed(why.clone()));
            }
            if !state.connecting {
                break;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::failed("no connection in time").on(self.uri.to_string()));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.connecting = true;
        drop(state);
        // Without the lock: a connection takes as long as the network, and who has a client needs no other.
        let _attempt = ConnectAttempt(self);
        let opened = Client::open_again(&self.uri, self.rest.clone()).map(Arc::new);
        let mut state = self.lock();
        state.failed = opened.as_ref().err().map(ToString::to_string);
        if let Ok(client) = &opened {
            state.client = Arc::downgrade(client);
        }
        drop(state);
        opened
    }

    fn lock(&self) -> MutexGuard<'_, ExportState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
