//! An export of a server, and the client that all its users share.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use super::client::RetryDelay;
use super::{Client, Uri};
use crate::deadline;
use crate::error::{Error, Result};

/// An export by its URI. It is connected to when it is used, by one client for all its users.
#[derive(Debug)]
pub struct NbdExport {
    uri: Uri,
    state: Mutex<ExportState>,
    changed: Condvar,
    /// Shared by all clients of the export, one after the other.
    retry_delay: Arc<RetryDelay>,
}

#[derive(Debug, Default)]
struct ExportState {
    client: Weak<Client>,
    /// Some thread is connecting.
    connecting: bool,
    /// The number of attempts to connect that have ended.
    ended: u64,
    /// Why the last attempt failed, if it did.
    failed: Option<String>,
}

/// An attempt to connect. When it ends, even by a panic, other threads may connect.
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
        Self { uri, state: Mutex::default(), changed: Condvar::new(), retry_delay: Arc::default() }
    }

    /// The URI.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// A client that is connected. Threads that call this while another one connects share its result, and wait for it
    /// no longer than their own request lasts.
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
            if let Some(reason) = state.failed.as_ref().filter(|_| state.ended > before) {
                return Err(Error::failed(reason.clone()));
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
        // The lock is not held while connecting, which may take long: a thread that has a client does not need to wait.
        let _attempt = ConnectAttempt(self);
        let opened = Client::open_again(&self.uri, self.retry_delay.clone()).map(Arc::new);
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
