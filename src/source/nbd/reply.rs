//! Transmission: the three sorts of answers, put together from replies. Pure and total.
//!
//! An answer is put together from chunks that may come in any order. It is complete only when the chunks cover what was
//! asked exactly once; anything else is a [`Violation`], never silently zeros.

use std::ops::Range;

use super::frame::Dialect;
use super::proto::{Fields, Violation};
use crate::map::{Extent, ExtentKind};
use crate::units::Bytes;

/// `NBD_REPLY_FLAG_DONE`: the last chunk of its reply.
const FLAG_DONE: u16 = 1;
/// `NBD_REPLY_TYPE_*`.
const NONE: u16 = 0;
const OFFSET_DATA: u16 = 1;
const OFFSET_HOLE: u16 = 2;
const STATUS: u16 = 5;
const STATUS_EXT: u16 = 6;
/// Bytes of the position at the front of `OFFSET_DATA` and `OFFSET_HOLE`.
const POSITION: u64 = 8;
/// Bit of a chunk's type that makes it an error.
const CHUNK_ERROR: u16 = 1 << 15;
/// `NBD_STATE_ZERO`: the extent reads as zeros. `NBD_STATE_HOLE` (bit 0) promises nothing about the content.
const STATE_ZERO: u64 = 1 << 1;

/// The most extents of one answer (`NBD_REPLY_TYPE_BLOCK_STATUS`).
const MAX_EXTENTS: u64 = 1 << 20;
/// The longest error chunk: a string of 4096 bytes and the fixed parts.
const MAX_ERROR: u64 = 4096 + 64;
/// The most separate parts of a read that may be waiting for what lies between them. Servers send in order or split at
/// holes, and what touches is merged; thousands of gaps are an attack on our memory.
const MAX_GAPS: usize = 4096;

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// The server says that it failed, with its errno.
    Server(u32),
    /// The server broke the protocol in this very answer.
    Violation(Violation),
    /// The export has no [`super::proto::BASE_ALLOCATION`].
    NoContext,
    /// The connection ended first; another one may do better.
    Broken(String),
}

impl std::fmt::Display for RequestError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Server(errno) => write!(f, "the server reports error {errno}"),
            Self::Violation(violation) => violation.fmt(f),
            Self::NoContext => f.write_str("the server offers no base:allocation for this export"),
            Self::Broken(reason) => f.write_str(reason),
        }
    }
}

/// A chunk whose type and length fit the request that it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyChunk {
    kind: u16,
    len: u64,
}

impl ReplyChunk {
    /// How many bytes to read and give to [`PartialReply::payload`]: all of them (at most 16 MiB and a little), but of
    /// `OFFSET_DATA` only the position, so that the data goes straight into its place.
    pub fn to_parse(self) -> usize {
        let bytes = if self.kind == OFFSET_DATA { POSITION } else { self.len };
        usize::try_from(bytes).expect("PartialReply::chunk bounds the length")
    }
}

/// An answer that grows by chunks.
#[derive(Debug)]
pub struct PartialReply {
    asked: Range<Bytes>,
    sort: ReplyKind,
    error: Option<u32>,
    done: bool,
}

#[derive(Debug)]
enum ReplyKind {
    Read { bytes: Vec<u8>, covered: CoveredBytes },
    Status { context: u32, dialect: Dialect, limit: Bytes, runs: Option<Vec<Extent>> },
    Flush,
}

/// A finished answer.
#[derive(Debug, PartialEq, Eq)]
pub enum ReplyContent {
    /// All bytes of the range.
    Bytes(Vec<u8>),
    /// The runs from the start of the range on, neighbours of different kinds. They may end before the range does, or
    /// after it.
    Extents(Vec<Extent>),
    /// A flush is done.
    Flushed,
}

impl PartialReply {
    /// The empty answer to a read of `range`, or `None` when it has no memory's size.
    pub fn read(range: Range<Bytes>) -> Option<Self> {
        let len = usize::try_from(range.end.checked_sub(range.start)?.get()).ok()?;
        let sort = ReplyKind::Read { bytes: vec![0; len], covered: CoveredBytes::default() };
        Some(Self { asked: range, sort, error: None, done: false })
    }

    /// The empty answer to a block status request about `range` of an export of `limit` bytes.
    pub fn status(range: Range<Bytes>, context: u32, dialect: Dialect, limit: Bytes) -> Self {
        Self { asked: range, sort: ReplyKind::Status { context, dialect, limit, runs: None }, error: None, done: false }
    }

    /// The empty answer to a flush.
    pub fn flush() -> Self {
        Self { asked: Bytes::ZERO..Bytes::ZERO, sort: ReplyKind::Flush, error: None, done: false }
    }

    /// Whether the last chunk was seen.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Takes a simple reply in, and says where its data has to be read to, if it has any.
    ///
    /// # Errors
    ///
    /// Success by a simple reply where only a structured one can carry the answer.
    pub fn simple(&mut self, error: u32, dialect: Dialect) -> Result<Option<&mut [u8]>, Violation> {
        self.done = true;
        if error != 0 {
            self.error = Some(error);
            return Ok(None);
        }
        match &mut self.sort {
            ReplyKind::Read { bytes, covered } if dialect == Dialect::Simple => {
                covered.claim(0..bytes.len())?;
                Ok(Some(bytes))
            }
            // A reply without data may be simple in the structured dialect too.
            ReplyKind::Flush if dialect != Dialect::Extended => Ok(None),
            _ => Err(Violation::new("sent a simple reply where a structured one is due")),
        }
    }

    /// Takes the rest of a chunk's header in.
    ///
    /// # Errors
    ///
    /// A chunk that does not fit this request or its own type.
    pub fn chunk(&mut self, flags: u16, kind: u16, rest: &[u8]) -> Result<ReplyChunk, Violation> {
        let mut fields = Fields::of(rest);
        let len = match rest.len() {
            4 => fields.u32().map(u64::from),
            _ => fields.u64().and_then(|_offset| fields.u64()),
        };
        let len = len.ok_or_else(|| Violation::new("sent half a header"))?;
        self.done = flags & FLAG_DONE != 0;
        let fits = match (kind, &self.sort) {
            (NONE, _) => len == 0 && self.done,
            (OFFSET_DATA, ReplyKind::Read { bytes, .. }) => {
                len > POSITION && usize::try_from(len - POSITION).is_ok_and(|len| len <= bytes.len())
            }
            (OFFSET_HOLE, ReplyKind::Read { .. }) => len == POSITION + 4,
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
            Err(Violation::new(format!("sent a chunk of type {kind} and {len} bytes")))
        }
    }

    /// Takes [`ReplyChunk::to_parse`] bytes in, and says where the chunk's data has to be read to, if it has any.
    ///
    /// # Errors
    ///
    /// A payload that contradicts the request, itself or an earlier chunk.
    pub fn payload(&mut self, chunk: ReplyChunk, payload: &[u8]) -> Result<Option<&mut [u8]>, Violation> {
        let short = || Violation::new("sent a chunk that ends early");
        let mut fields = Fields::of(payload);
        match (chunk.kind, &mut self.sort) {
            (NONE, _) => {}
            (OFFSET_DATA, ReplyKind::Read { bytes, covered }) => {
                let offset = fields.u64().ok_or_else(short)?;
                let range = within(&self.asked, offset, chunk.len - POSITION)?;
                covered.claim(range.clone())?;
                return Ok(Some(&mut bytes[range]));
            }
            (OFFSET_HOLE, ReplyKind::Read { covered, .. }) => {
                // The bytes are zeros already: nothing else can have been written into a range that is claimed once.
                let (offset, len) = (fields.u64().ok_or_else(short)?, fields.u32().ok_or_else(short)?);
                covered.claim(within(&self.asked, offset, u64::from(len))?)?;
            }
            (STATUS | STATUS_EXT, ReplyKind::Status { context, dialect, limit, runs }) => {
                let extents = extents(payload, *dialect, *context)?;
                if runs.replace(merge(extents, &self.asked, *limit)?).is_some() {
                    return Err(Violation::new("sent two chunks for one metadata context"));
                }
            }
            _ => match fields.u32().ok_or_else(short)? {
                0 => return Err(Violation::new("reports a failure without an error")),
                errno => {
                    self.error.get_or_insert(errno);
                }
            },
        }
        Ok(None)
    }

    /// The answer, when all chunks are in.
    ///
    /// # Errors
    ///
    /// The server's own error; a read that is not covered completely; a status without extents.
    pub fn finish(self) -> Result<ReplyContent, RequestError> {
        if let Some(errno) = self.error {
            return Err(RequestError::Server(errno));
        }
        let missing = |what: &str| Err(RequestError::Violation(Violation::new(what)));
        match self.sort {
            _ if !self.done => missing("did not finish its reply"),
            ReplyKind::Read { bytes, covered } if covered.all(bytes.len()) => Ok(ReplyContent::Bytes(bytes)),
            ReplyKind::Read { .. } => missing("left out a part of a read"),
            ReplyKind::Status { runs: Some(runs), .. } => Ok(ReplyContent::Extents(runs)),
            ReplyKind::Flush => Ok(ReplyContent::Flushed),
            ReplyKind::Status { runs: None, .. } => missing("answered a block status request without extents"),
        }
    }
}

/// The place of `len` bytes at `offset` of the export in the bytes of a read.
fn within(asked: &Range<Bytes>, offset: u64, len: u64) -> Result<Range<usize>, Violation> {
    let place = || {
        let start = Bytes::new(offset).checked_sub(asked.start)?;
        let end = start.checked_add(Bytes::new(len))?;
        let fits = len != 0 && end <= asked.end.checked_sub(asked.start)?;
        Some((fits, usize::try_from(start.get()).ok()?..usize::try_from(end.get()).ok()?))
    };
    match place() {
        Some((true, range)) => Ok(range),
        _ => Err(Violation::new(format!("sent {len} bytes at {offset}, which nobody asked for"))),
    }
}

/// The parts of a read that have arrived: sorted, disjoint, not touching.
#[derive(Debug, Default)]
struct CoveredBytes(Vec<Range<usize>>);

impl CoveredBytes {
    fn claim(&mut self, new: Range<usize>) -> Result<(), Violation> {
        let at = self.0.partition_point(|old| old.end < new.start);
        let touches_before = self.0.get(at).is_some_and(|old| old.end == new.start);
        let next = if touches_before { at + 1 } else { at };
        if self.0.get(next).is_some_and(|old| old.start < new.end) {
            return Err(Violation::new("sent a part of a read twice"));
        }
        let touches_after = self.0.get(next).is_some_and(|old| old.start == new.end);
        match (touches_before, touches_after) {
            (true, true) => {
                let after = self.0.remove(next);
                self.0[at].end = after.end;
            }
            (true, false) => self.0[at].end = new.end,
            (false, true) => self.0[next].start = new.start,
            (false, false) if self.0.len() < MAX_GAPS => self.0.insert(at, new),
            (false, false) => return Err(Violation::new("sent a read in too many pieces")),
        }
        Ok(())
    }

    fn all(&self, len: usize) -> bool {
        len == 0 || matches!(self.0.as_slice(), [whole] if *whole == (0..len))
    }
}

/// Reads a block status chunk: length and kind of each extent, in order.
fn extents(payload: &[u8], dialect: Dialect, context: u32) -> Result<Vec<(Bytes, ExtentKind)>, Violation> {
    let mut fields = Fields::of(payload);
    if fields.u32() != Some(context) {
        return Err(Violation::new("answered for a metadata context that does not exist"));
    }
    let extended = dialect == Dialect::Extended;
    let count = if extended { fields.u32() } else { None };
    let (found, left_over) = (fields.rest().len() / width(extended), fields.rest().len() % width(extended));
    if left_over != 0 || count.is_some_and(|count| usize::try_from(count) != Ok(found)) {
        return Err(Violation::new("sent half an extent"));
    }
    let mut extents = Vec::with_capacity(found);
    for _ in 0..found {
        let (len, flags) = if extended {
            (fields.u64(), fields.u64())
        } else {
            (fields.u32().map(u64::from), fields.u32().map(u64::from))
        };
        let (Some(len @ 1..), Some(flags)) = (len, flags) else {
            return Err(Violation::new("sent an extent without a length"));
        };
        extents.push((Bytes::new(len), if flags & STATE_ZERO != 0 { ExtentKind::Hole } else { ExtentKind::Data }));
    }
    Ok(extents)
}

/// Bytes of one extent on the wire.
fn width(extended: bool) -> usize {
    if extended { 16 } else { 8 }
}

/// Lays extents out from the start of `asked`; only the last may go beyond its end, and none beyond `limit`.
fn merge(extents: Vec<(Bytes, ExtentKind)>, asked: &Range<Bytes>, limit: Bytes) -> Result<Vec<Extent>, Violation> {
    let mut runs: Vec<Extent> = Vec::new();
    let mut at = asked.start;
    for (len, kind) in extents {
        if at >= asked.end {
            return Err(Violation::new("sent extents beyond the range that was asked about"));
        }
        at = at.checked_add(len).ok_or_else(|| Violation::new("sent an extent that ends beyond 2^64"))?;
        let end = at.min(limit);
        match runs.last_mut() {
            Some(last) if last.kind == kind => last.end = end,
            _ => runs.push(Extent { end, kind }),
        }
    }
    if runs.is_empty() { Err(Violation::new("sent no extents")) } else { Ok(runs) }
}

#[cfg(test)]
mod tests;
