//! Reads of which many are in progress at the same time, without a thread for each.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::client::Client;
use super::connection::{Connection, RequestId};
use super::reply::ReplyContent;
use crate::deadline;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// How long the beginning of reads may wait for a connection. Reads that are not begun are made later, when their bytes
/// are needed.
const CONNECT: Duration = Duration::from_secs(1);

/// How long a request may take to be sent, from the beginning of all reads on. It does not wait where the connection
/// [accepts more](Connection::accepts_more), except that several threads may send at once.
const SEND: Duration = Duration::from_secs(5);

/// A read that was sent to the server. Dropping it gives its bytes up.
#[derive(Debug)]
pub struct BegunRead {
    connection: Arc<Connection>,
    /// `None` after it was waited for.
    id: Option<RequestId>,
    /// The longest wait for the reply.
    timeout: Duration,
}

impl BegunRead {
    /// Waits until all bytes were received.
    ///
    /// # Errors
    /// EIO when the server fails to read or the connection ends. Another attempt may have another result.
    pub fn wait(mut self) -> io::Result<AlignedBuffer> {
        let failed = || io::Error::from_raw_os_error(libc::EIO);
        let id = self.id.take().ok_or_else(failed)?;
        match self.connection.wait(id, deadline::no_later_than(Instant::now() + self.timeout)) {
            Ok(ReplyContent::Bytes(bytes)) => Ok(bytes),
            Ok(_) | Err(_) => Err(failed()),
        }
    }
}

impl Drop for BegunRead {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            self.connection.abandon(&id);
        }
    }
}

impl Client {
    /// Sends reads, each from its offset on and as long as its buffer: at most [`Client::longest_read`], aligned to
    /// [`Client::minimum_block`], and before the end of the export. The results are in the same order; after the first
    /// one that cannot be sent without a wait there are no more.
    pub fn begin_reads(&self, reads: Vec<(Bytes, AlignedBuffer)>) -> Vec<BegunRead> {
        let until = deadline::no_later_than(Instant::now() + CONNECT);
        let sent_by = deadline::no_later_than(Instant::now() + SEND);
        let timeout = self.timeouts().request;
        let send = |(offset, buffer)| {
            let connection = self.connection(until)?;
            // While this thread sends, it receives no replies. A server that cannot send them may receive no requests.
            if !connection.accepts_more() {
                return Err("the server receives no more requests".to_owned());
            }
            let id = connection.submit_read(offset, buffer, sent_by).map_err(|failure| failure.to_string())?;
            Ok::<_, String>(BegunRead { connection, id: Some(id), timeout })
        };
        reads.into_iter().map_while(|read| send(read).ok()).collect()
    }
}
