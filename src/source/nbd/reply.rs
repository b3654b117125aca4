//! The transmission phase: replies to requests, assembled without I/O. Every input gives a value or
//! an error.
//!
//! The chunks of a reply may arrive in any order. The reply is complete only when the chunks cover the request exactly
//! once. Anything else is a violation of the protocol, and never zeros.

use std::ops::Range;

use super::frame::Dialect;
use super::proto::{Fields, violation};
use crate::error::{Error, Result};
use crate::map::{Extent, ExtentKind};
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// `NBD_REPLY_FLAG_DONE`: the last chunk of its reply.
const FLAG_DONE: u16 = 1;
/// `NBD_REPLY_TYPE_*`.
const NONE: u16 = 0;
const OFFSET_DATA: u16 = 1;
const OFFSET_HOLE: u16 = 2;
const STATUS: u16 = 5;
const STATUS_EXT: u16 = 6;
/// The length of the offset at the start of `OFFSET_DATA` and `OFFSET_HOLE`, in bytes.
const OFFSET_LEN: u64 = 8;
/// Bit of a chunk's type that makes it an error.
const CHUNK_ERROR: u16 = 1 << 15;
/// `NBD_STATE_ZERO`: the extent reads as zeros. `NBD_STATE_HOLE` (bit 0) has no meaning for the content.
const STATE_ZERO: u64 = 1 << 1;
/// The flags of an extent that a dirty bitmap does not mark. Bit 0 (`NBD_STATE_DIRTY` of QEMU) is that it is dirty; the
/// others have no meaning yet, so that an extent which has one of them counts as dirty too.
const STATE_CLEAN: u64 = 0;

/// The largest number of extents in one reply (`NBD_REPLY_TYPE_BLOCK_STATUS`).
const MAX_EXTENTS: u64 = 1 << 20;
/// The length of the longest error chunk, in bytes: a string of 4096 bytes and the fixed parts.
const MAX_ERROR: u64 = 4096 + 64;
/// The largest number of separate parts of an incomplete read. Servers send in order or split at holes, and adjacent
/// parts are merged; a server that sends thousands of separate parts is filling the memory of the client.
const MAX_PARTS: usize = 4096;

/// Why a request has no content in reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// The server reports an error, with this errno.
    Server(u32),
    /// The reply to this request violates the protocol.
    Violation(String),
    /// The export has no [`super::proto::BASE_ALLOCATION`].
    NoContext,
    /// The connection ended first. The request can be sent again over another one.
    Broken(String),
}

impl RequestError {
    /// The error of a reply that violates the protocol.
    pub fn violation(error: Error) -> Self {
        Self::Violation(error.to_string())
    }
}

impl std::fmt::Display for RequestError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Server(errno) => write!(f, "the server reports error {errno}"),
            Self::NoContext => f.write_str("the server offers no base:allocation for this export"),
            Self::Violation(reason) | Self::Broken(reason) => f.write_str(reason),
        }
    }
}

/// The header of a chunk whose type and length fit its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyChunk {
    kind: u16,
    len: u64,
}

impl ReplyChunk {
    /// The number of bytes to receive for [`PartialReply::payload`]: the whole payload (at most 16 MiB and a few
    /// bytes), but only the offset of `OFFSET_DATA`, so that the data is received directly where it belongs.
    pub fn to_parse(self) -> usize {
        let bytes = if self.kind == OFFSET_DATA { OFFSET_LEN } else { self.len };
        usize::try_from(bytes).expect("PartialReply::chunk bounds the length")
    }
}

/// A reply that is being received.
#[derive(Debug)]
pub struct PartialReply {
    range: Range<Bytes>,
    kind: ReplyKind,
    error: Option<u32>,
    done: bool,
}

/// The numbers of the metadata contexts that a block status request is answered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusContexts {
    /// That of [`super::proto::BASE_ALLOCATION`].
    pub allocation: u32,
    /// That of a dirty bitmap, if the connection has one.
    pub bitmap: Option<u32>,
}

/// The extents of one metadata context, once its chunk was received.
type Extents = Option<Vec<Extent>>;

/// The content so far, for each kind of request.
#[derive(Debug)]
enum ReplyKind {
    Read { bytes: AlignedBuffer, covered: CoveredBytes },
    Status { contexts: StatusContexts, dialect: Dialect, limit: Bytes, allocation: Extents, bitmap: Extents },
    NoContent,
}

/// The content of a complete reply.
#[derive(Debug, PartialEq, Eq)]
pub enum ReplyContent {
    /// All bytes of the range.
    Bytes(AlignedBuffer),
    /// Consecutive extents from the start of the range on, neighbours of different kinds. They may end before the range
    /// does, or after it.
    Extents(Vec<Extent>),
    /// The same for a connection with a dirty bitmap: the extents of both contexts, each with ends of its own.
    Bitmap {
        /// Those of [`super::proto::BASE_ALLOCATION`].
        allocation: Vec<Extent>,
        /// Those of the bitmap: data where it is dirty, unchanged where it is not.
        bitmap: Vec<Extent>,
    },
    /// There is none: the flush or the write is complete.
    Done,
}

impl PartialReply {
    /// The empty reply to a read of `range`; `None` when the range is longer than memory can be.
    pub fn read(range: Range<Bytes>) -> Option<Self> {
        let len = usize::try_from(range.end.checked_sub(range.start)?.get()).ok()?;
        let mut bytes = AlignedBuffer::new();
        bytes.resize(len);
        Self::read_into(range.start, bytes)
    }

    /// The empty reply to a read from `start` on of as many bytes as `bytes` has, which are received there. `None` when
    /// the range ends beyond 2^64.
    pub fn read_into(start: Bytes, bytes: AlignedBuffer) -> Option<Self> {
        let end = start.checked_add(Bytes::new(u64::try_from(bytes.bytes().len()).ok()?))?;
        let reply = ReplyKind::Read { bytes, covered: CoveredBytes::default() };
        Some(Self { range: start..end, kind: reply, error: None, done: false })
    }

    /// The empty reply to a block status request for `range` of an export of `limit` bytes.
    pub fn status(range: Range<Bytes>, contexts: StatusContexts, dialect: Dialect, limit: Bytes) -> Self {
        let kind = ReplyKind::Status { contexts, dialect, limit, allocation: None, bitmap: None };
        Self { range, kind, error: None, done: false }
    }

    /// The empty reply to a flush, a write, or a write of zeros.
    pub fn without_content() -> Self {
        Self { range: Bytes::ZERO..Bytes::ZERO, kind: ReplyKind::NoContent, error: None, done: false }
    }

    /// Whether the last chunk was received.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Adds a simple reply. Returns the buffer to receive its data into, if it has data.
    ///
    /// # Errors
    ///
    /// A simple reply without an error to a request that needs a structured reply.
    pub fn simple(&mut self, error: u32, dialect: Dialect) -> Result<Option<&mut [u8]>> {
        self.done = true;
        if error != 0 {
            self.error = Some(error);
            return Ok(None);
        }
        match &mut self.kind {
            ReplyKind::Read { bytes, covered } if dialect == Dialect::Simple => {
                let bytes = bytes.bytes_mut();
                covered.add(0..bytes.len())?;
                Ok(Some(bytes))
            }
            // A reply without data may be simple in the structured dialect too.
            ReplyKind::NoContent if dialect != Dialect::Extended => Ok(None),
            _ => Err(violation("sent a simple reply where a structured one is due")),
        }
    }

    /// Adds the rest of the header of a chunk.
    ///
    /// # Errors
    ///
    /// A chunk that does not fit this request or its own type.
    pub fn chunk(&mut self, flags: u16, kind: u16, rest: &[u8]) -> Result<ReplyChunk> {
        let mut fields = Fields::of(rest);
        let len = match rest.len() {
            4 => fields.u32().map(u64::from),
            _ => fields.u64().and_then(|_offset| fields.u64()),
        };
        let len = len.ok_or_else(|| violation("sent an incomplete header"))?;
        self.done = flags & FLAG_DONE != 0;
        let fits = match (kind, &self.kind) {
            (NONE, _) => len == 0 && self.done,
            (OFFSET_DATA, ReplyKind::Read { bytes, .. }) => {
                len > OFFSET_LEN && usize::try_from(len - OFFSET_LEN).is_ok_and(|len| len <= bytes.bytes().len())
            }
            (OFFSET_HOLE, ReplyKind::Read { .. }) => len == OFFSET_LEN + 4,
            (STATUS, ReplyKind::Status { dialect: Dialect::Structured, .. }) => {
                len >= 12 && (len - 4) / 8 <= MAX_EXTENTS
            }
            (STATUS_EXT, ReplyKind::Status { dialect: Dialect::Extended, .. }) => {
                len >= 24 && (len - 8) / 16 <= MAX_EXTENTS
            }
            (error, _) if error & CHUNK_ERROR != 0 => (4..=MAX_ERROR).contains(&len),
            _ => false,
        };
        if fits {
            Ok(ReplyChunk { kind, len })
        } else {
            Err(violation(format!("sent a chunk of type {kind} and {len} bytes")))
        }
    }

    /// Adds the first [`ReplyChunk::to_parse`] bytes of the payload. Returns the buffer to receive the rest into, if
    /// any.
    ///
    /// # Errors
    ///
    /// A payload that is malformed, or does not fit the request or an earlier chunk.
    pub fn payload(&mut self, chunk: ReplyChunk, payload: &[u8]) -> Result<Option<&mut [u8]>> {
        let short = || violation("sent a chunk that ends early");
        let mut fields = Fields::of(payload);
        match (chunk.kind, &mut self.kind) {
            (NONE, _) => {}
            (OFFSET_DATA, ReplyKind::Read { bytes, covered }) => {
                let offset = fields.u64().ok_or_else(short)?;
                let place = within(&self.range, offset, chunk.len - OFFSET_LEN)?;
                covered.add(place.clone())?;
                return Ok(Some(&mut bytes.bytes_mut()[place]));
            }
            (OFFSET_HOLE, ReplyKind::Read { bytes, covered }) => {
                let (offset, len) = (fields.u64().ok_or_else(short)?, fields.u32().ok_or_else(short)?);
                let place = within(&self.range, offset, u64::from(len))?;
                covered.add(place.clone())?;
                bytes.bytes_mut()[place].fill(0);
            }
            (STATUS | STATUS_EXT, ReplyKind::Status { contexts, dialect, limit, allocation, bitmap }) => {
                let (extents, kind_of): (_, fn(u64) -> ExtentKind) = match fields.u32() {
                    Some(number) if number == contexts.allocation => (allocation, allocation_kind),
                    Some(number) if Some(number) == contexts.bitmap => (bitmap, bitmap_kind),
                    _ => return Err(violation("answered for a metadata context that was not chosen")),
                };
                let list = read_extents(fields, *dialect, kind_of)?;
                if extents.replace(merge(list, &self.range, *limit)?).is_some() {
                    return Err(violation("sent two chunks for one metadata context"));
                }
            }
            _ => match fields.u32().ok_or_else(short)? {
                0 => return Err(violation("reports a failure without an error")),
                errno => {
                    self.error.get_or_insert(errno);
                }
            },
        }
        Ok(None)
    }

    /// The content of the reply, after its last chunk.
    ///
    /// # Errors
    ///
    /// The error that the server reports; a read that is not covered completely; a block status without extents.
    pub fn finish(self) -> std::result::Result<ReplyContent, RequestError> {
        if let Some(errno) = self.error {
            return Err(RequestError::Server(errno));
        }
        let missing = |what: &str| Err(RequestError::violation(violation(what)));
        match self.kind {
            _ if !self.done => missing("did not finish its reply"),
            ReplyKind::Read { bytes, covered } if covered.all(bytes.bytes().len()) => Ok(ReplyContent::Bytes(bytes)),
            ReplyKind::Read { .. } => missing("left out a part of a read"),
            ReplyKind::NoContent => Ok(ReplyContent::Done),
            ReplyKind::Status { contexts, allocation, bitmap, .. } => match (allocation, contexts.bitmap, bitmap) {
                (Some(extents), None, _) => Ok(ReplyContent::Extents(extents)),
                (Some(allocation), Some(_), Some(bitmap)) => Ok(ReplyContent::Bitmap { allocation, bitmap }),
                _ => missing("answered a block status request without extents"),
            },
        }
    }
}

/// The indices of the `len` bytes at `offset` of the export in the buffer of a read of `requested`.
fn within(requested: &Range<Bytes>, offset: u64, len: u64) -> Result<Range<usize>> {
    let place = || {
        let start = Bytes::new(offset).checked_sub(requested.start)?;
        let end = start.checked_add(Bytes::new(len))?;
        let fits = len != 0 && end <= requested.end.checked_sub(requested.start)?;
        Some((fits, usize::try_from(start.get()).ok()?..usize::try_from(end.get()).ok()?))
    };
    match place() {
        Some((true, range)) => Ok(range),
        _ => Err(violation(format!("sent {len} bytes at {offset}, which were not requested"))),
    }
}

/// The parts of a read that were received: sorted and disjoint, adjacent ones merged.
#[derive(Debug, Default)]
struct CoveredBytes(Vec<Range<usize>>);

impl CoveredBytes {
    fn add(&mut self, new: Range<usize>) -> Result<()> {
        let at = self.0.partition_point(|old| old.end < new.start);
        let touches_before = self.0.get(at).is_some_and(|old| old.end == new.start);
        let next = if touches_before { at + 1 } else { at };
        if self.0.get(next).is_some_and(|old| old.start < new.end) {
            return Err(violation("sent a part of a read twice"));
        }
        let touches_after = self.0.get(next).is_some_and(|old| old.start == new.end);
        match (touches_before, touches_after) {
            (true, true) => {
                let after = self.0.remove(next);
                self.0[at].end = after.end;
            }
            (true, false) => self.0[at].end = new.end,
            (false, true) => self.0[next].start = new.start,
            (false, false) if self.0.len() < MAX_PARTS => self.0.insert(at, new),
            (false, false) => return Err(violation("sent a read in too many pieces")),
        }
        Ok(())
    }

    fn all(&self, len: usize) -> bool {
        len == 0 || matches!(self.0.as_slice(), [whole] if *whole == (0..len))
    }
}

/// What the flags of an extent of [`super::proto::BASE_ALLOCATION`] mean.
fn allocation_kind(flags: u64) -> ExtentKind {
    if flags & STATE_ZERO != 0 { ExtentKind::Hole } else { ExtentKind::Data }
}

/// What the flags of an extent of a dirty bitmap mean.
fn bitmap_kind(flags: u64) -> ExtentKind {
    if flags == STATE_CLEAN { ExtentKind::Unchanged } else { ExtentKind::Data }
}

/// Reads the payload of a block status chunk behind the number of its context: the length and kind of each extent, in
/// order.
fn read_extents(
    mut fields: Fields<'_>,
    dialect: Dialect,
    kind_of: fn(u64) -> ExtentKind,
) -> Result<Vec<(Bytes, ExtentKind)>> {
    let extended = dialect == Dialect::Extended;
    let count = if extended { fields.u32() } else { None };
    let (found, left_over) = (fields.rest().len() / width(extended), fields.rest().len() % width(extended));
    if left_over != 0 || count.is_some_and(|count| usize::try_from(count) != Ok(found)) {
        return Err(violation("sent an incomplete extent"));
    }
    let mut extents = Vec::with_capacity(found);
    for _ in 0..found {
        let (len, flags) = if extended {
            (fields.u64(), fields.u64())
        } else {
            (fields.u32().map(u64::from), fields.u32().map(u64::from))
        };
        let (Some(len @ 1..), Some(flags)) = (len, flags) else {
            return Err(violation("sent an extent without a length"));
        };
        extents.push((Bytes::new(len), kind_of(flags)));
    }
    Ok(extents)
}

/// The length of one extent in a chunk, in bytes.
fn width(extended: bool) -> usize {
    if extended { 16 } else { 8 }
}

/// The ends of extents that begin at the start of `requested`, neighbours of one kind merged. Only the last extent may
/// end after `requested`; it is cut at `limit`, the end of the export.
fn merge(extents: Vec<(Bytes, ExtentKind)>, requested: &Range<Bytes>, limit: Bytes) -> Result<Vec<Extent>> {
    let mut merged: Vec<Extent> = Vec::new();
    let mut at = requested.start;
    for (len, kind) in extents {
        if at >= requested.end {
            return Err(violation("sent extents beyond the requested range"));
        }
        at = at.checked_add(len).ok_or_else(|| violation("sent an extent that ends beyond 2^64"))?;
        let end = at.min(limit);
        match merged.last_mut() {
            Some(last) if last.kind == kind => last.end = end,
            _ => merged.push(Extent { end, kind }),
        }
    }
    if merged.is_empty() { Err(violation("sent no extents")) } else { Ok(merged) }
}

#[cfg(test)]
mod tests;
