//! An export of an NBD server, as an export of a mount.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use nix::unistd::{getegid, geteuid};

use super::read_queue::ReadQueue;
use super::{Export, HostNode, MIN_ALIGN, Writer, Zeroed};
use crate::error::Result;
use crate::source::nbd::{self, Client, ExportWriter, NbdExport};
use crate::source::{Context, Stack};
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// An open export.
pub struct NbdExportFile {
    name: PathBuf,
    client: Arc<Client>,
    /// The time of the open. A server reports no time of its last write, so the contents may differ at each open.
    opened: SystemTime,
}

impl NbdExportFile {
    /// Connects to the server of an export.
    ///
    /// # Errors
    /// As [`Client::open`].
    pub fn open(export: &NbdExport) -> Result<Self> {
        let name = PathBuf::from(export.uri().to_string());
        Ok(Self { name, client: export.client()?, opened: SystemTime::now() })
    }
}

impl Export for NbdExportFile {
    fn name(&self) -> &Path {
        &self.name
    }

    fn size(&self) -> io::Result<Bytes> {
        Ok(self.client.size())
    }

    fn align(&self) -> Bytes {
        self.client.minimum_block().max(MIN_ALIGN)
    }

    fn read_at(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
        Ok(0..self.client.read_at(buffer.resize(size), offset)?)
    }

    fn read_queue(&self) -> Option<&dyn ReadQueue> {
        Some(&*self.client)
    }

    fn writer(&self) -> io::Result<Arc<dyn Writer>> {
        Ok(Arc::new(self.client.writer()?))
    }

    fn resolve(&self, context: &Context) -> Stack {
        Stack::build(context, |_| Arc::new(nbd::layer(self.client.clone(), context)))
    }

    fn host_node(&self) -> io::Result<HostNode> {
        Ok(host_node(self.opened))
    }
}

impl Writer for ExportWriter {
    fn write_at(&self, bytes: &[u8], offset: Bytes) -> io::Result<()> {
        self.write_at(bytes, offset)
    }

    fn make_zero(&self, range: &Range<Bytes>) -> io::Result<Zeroed> {
        Ok(if self.make_zero(range)? { Zeroed::Proven } else { Zeroed::Unproven })
    }

    fn flush(&self) -> io::Result<()> {
        self.flush()
    }

    fn has_ended(&self) -> bool {
        self.has_ended()
    }
}

/// The owner, permissions and times of an export that was opened at that time.
pub(super) fn host_node(opened: SystemTime) -> HostNode {
    // Only the user who made the mount is known to have the right to read the export.
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let mode = libc::S_IFREG | 0o600;
    HostNode { identity: None, uid, gid, mode, mtime: opened, ctime: opened }
}
