//! An export as a file, and a kernel device's export on the side.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Instant, SystemTime};

use nix::unistd::{getegid, geteuid};

use super::{Client, Uri};
use crate::error::{Error, Result};
use crate::source::backing::{MIN_ALIGN, Medium, Node};
use crate::source::{Context, Stack};
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// An export by its URI: connected to when it is looked at, by one client for all that have it open.
#[derive(Debug)]
pub struct Export {
    uri: Uri,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    client: Weak<Client>,
    /// When the last attempt failed, and why.
    failed: Option<(Instant, String)>,
}

impl Export {
    /// The export with that URI.
    pub fn new(uri: Uri) -> Self {
        Self { uri, state: Mutex::default() }
    }

    /// The URI.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// A client that is connected. Those that ask while one connects share what becomes of it.
    ///
    /// # Errors
    /// As [`Client::open`].
    pub fn client(&self) -> Result<Arc<Client>> {
        let asked = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = state.client.upgrade() {
            return Ok(client);
        }
        if let Some((_, why)) = state.failed.as_ref().filter(|(when, _)| *when >= asked) {
            return Err(Error::failed(why.clone()));
        }
        match Client::open(&self.uri) {
            Ok(client) => {
                let client = Arc::new(client);
                state.client = Arc::downgrade(&client);
                Ok(client)
            }
            Err(error) => {
                state.failed = Some((Instant::now(), error.to_string()));
                Err(error)
            }
        }
    }

    /// The export as a file.
    ///
    /// # Errors
    /// As [`Client::open`].
    pub fn open(&self) -> Result<ExportMedium> {
        Ok(ExportMedium { client: self.client()?, opened: SystemTime::now() })
    }
}

/// An open export.
pub struct ExportMedium {
    client: Arc<Client>,
    /// A server tells no time of change: each open may be of other contents.
    opened: SystemTime,
}

impl Medium for ExportMedium {
    fn size(&self) -> io::Result<Bytes> {
        Ok(self.client.size())
    }

    fn align(&self) -> Bytes {
        self.client.minimum_block().max(MIN_ALIGN)
    }

    fn read(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
        Ok(0..self.client.read_at(buffer.resize(size), offset)?)
    }

    fn resolve(&self, context: &Context) -> Stack {
        Stack::build(context, |_| Arc::new(super::layer(self.client.clone())))
    }

    fn node(&self) -> io::Result<Node> {
        // Nobody but who mounted it has shown a right to read it.
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let mode = libc::S_IFREG | 0o400;
        Ok(Node { identity: None, uid, gid, mode, mtime: self.opened, ctime: self.opened })
    }
}
