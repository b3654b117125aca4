//! An export together with a dirty bitmap of it, which QEMU keeps: the ranges that were written since the bitmap was made.
//!
//! The bitmap is a metadata context of the export, `qemu:dirty-bitmap:NAME`, beside `base:allocation`. Both are read over
//! one connection, and over no other one: after a reconnection, the server may have another disk.

use std::time::Instant;

use super::Timeouts;
use super::connect::{Agreement, connect};
use super::connection::{Connection, NbdRequest};
use super::proto::DIRTY_BITMAP;
use super::reply::{ReplyContent, RequestError};
use super::tls::TlsSettings;
use super::uri::Uri;
use crate::deadline;
use crate::error::{Error, Result};
use crate::map::Extent;
use crate::units::Bytes;

/// The longest name of a bitmap, in bytes (`BDRV_BITMAP_MAX_NAME_SIZE` of QEMU, `include/block/dirty-bitmap.h`).
const MAX_NAME: usize = 1023;

/// A read-only export whose server has a dirty bitmap of it.
#[derive(Debug)]
pub struct BitmapExport {
    connection: Connection,
    agreement: Agreement,
    uri: Uri,
}

/// The status of an export from one offset on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapStatus {
    /// Data and holes. Consecutive, the first one begins at the offset.
    pub allocation: Vec<Extent>,
    /// Data where the bitmap is dirty, and else unchanged. As above, with ends of its own.
    pub bitmap: Vec<Extent>,
}

impl BitmapExport {
    /// Connects to the server and opens the export with the bitmap of that name.
    ///
    /// The export must be read-only. QEMU exports a bitmap read-only only if nothing can add to it: if it is disabled, or
    /// its disk cannot be written (`nbd_export_create` of `nbd/server.c`).
    ///
    /// # Errors
    ///
    /// As [`super::Client::open`]; a name that no bitmap has; an export that is not read-only; a server that does not offer
    /// the bitmap or `base:allocation`.
    pub fn open(uri: &Uri, bitmap: &str) -> Result<Self> {
        if bitmap.is_empty() || bitmap.len() > MAX_NAME {
            return Err(Error::usage(format!("the name of a bitmap has 1 to {MAX_NAME} bytes, not {}", bitmap.len())));
        }
        let tls = TlsSettings::of(uri)?;
        let until = deadline::no_later_than(Instant::now() + Timeouts::default().connect);
        let (stream, agreement) = connect(uri, tls.as_ref(), Some(&format!("{DIRTY_BITMAP}{bitmap}")), until)?;
        let connection = Connection::new(stream, agreement);
        let refused = |why: String| Err(Error::failed(why).on(uri.to_string()));
        if agreement.bitmap.is_none() {
            return refused(format!("the server offers no bitmap '{bitmap}' for this export ({DIRTY_BITMAP}{bitmap})"));
        }
        if agreement.context.is_none() {
            return refused(RequestError::NoContext.to_string());
        }
        if !agreement.export.read_only {
            return refused(format!("the export is not read-only, so that the bitmap '{bitmap}' may change"));
        }
        Ok(Self { connection, agreement, uri: uri.clone() })
    }

    /// The length of the export.
    pub fn size(&self) -> Bytes {
        self.agreement.export.size
    }

    /// The status from `at` on, as far as the server answers. `at` is a multiple of [`BitmapExport::minimum_block`] and
    /// below the size.
    ///
    /// # Errors
    ///
    /// The server reports an error, breaks the protocol, or does not answer in time.
    pub fn status(&self, at: Bytes) -> Result<BitmapStatus> {
        let end = at.saturating_add(self.agreement.dialect.longest_status()).min(self.size());
        let until = deadline::no_later_than(Instant::now() + Timeouts::default().request);
        let request = self.connection.submit(&NbdRequest::Status(at..end), until);
        match request.and_then(|request| self.connection.wait(request, until)) {
            Ok(ReplyContent::Bitmap { allocation, bitmap }) => Ok(BitmapStatus { allocation, bitmap }),
            Ok(_) => Err(self.cannot_read(&RequestError::NoContext, at)),
            Err(failure) => Err(self.cannot_read(&failure, at)),
        }
    }

    /// The alignment of offsets in queries.
    pub fn minimum_block(&self) -> Bytes {
        self.agreement.blocks.minimum
    }

    /// The URI of the export.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    fn cannot_read(&self, failure: &RequestError, at: Bytes) -> Error {
        Error::failed(format!("cannot read the bitmap at byte {at}: {failure}")).on(self.uri.to_string())
    }
}
