//! The transmission phase: the headers of requests and replies in all three dialects, without I/O. Every input gives a
//! value or an error.

use std::ops::Range;

use super::proto::{Fields, violation};
use crate::error::Result;
use crate::units::Bytes;

const REQUEST: u32 = 0x2560_9513;
const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const CHUNK: u32 = 0x668e_33ef;
const EXTENDED_CHUNK: u32 = 0x6e8a_278c;

/// The longest block status request of 32 bits: below 4 GiB, and a multiple of every minimum block size.
const LONGEST_32: Bytes = Bytes::new((1 << 32) - (64 << 10));

/// How requests and replies are framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// 32-bit requests, simple replies; no block status.
    Simple,
    /// 32-bit requests, structured replies.
    Structured,
    /// 64-bit requests and replies (`NBD_OPT_EXTENDED_HEADERS`).
    Extended,
}

impl Dialect {
    /// The longest block status request.
    pub fn longest_status(self) -> Bytes {
        match self {
            Self::Simple | Self::Structured => LONGEST_32,
            Self::Extended => Bytes::MAX,
        }
    }
}

/// A command of this client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum NbdCommand {
    /// `NBD_CMD_READ`.
    Read = 0,
    /// `NBD_CMD_WRITE`. Its payload follows the header.
    Write = 1,
    /// `NBD_CMD_DISC`: the client disconnects; there is no reply.
    Disconnect = 2,
    /// `NBD_CMD_FLUSH`: all writes that were answered before, on any connection, become visible and permanent.
    Flush = 3,
    /// `NBD_CMD_WRITE_ZEROES`: the range reads as zeros from then on. The server may deallocate it.
    WriteZeroes = 6,
    /// `NBD_CMD_BLOCK_STATUS`.
    BlockStatus = 7,
}

/// When the server replies to a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyWhen {
    /// When the write is complete.
    Complete,
    /// When the write is permanent too (`NBD_CMD_FLAG_FUA`). Only for a server that accepts it.
    Permanent,
}

/// `NBD_CMD_FLAG_FUA`.
const FLAG_FUA: u16 = 1;
/// `NBD_CMD_FLAG_PAYLOAD_LEN`: the length is that of the payload. Writes have it in the extended dialect, and only there.
const FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// The header of a request. A length beyond the limit of the dialect is reduced to the limit.
pub fn encode_request(
    dialect: Dialect,
    command: NbdCommand,
    when: ReplyWhen,
    cookie: u64,
    range: &Range<Bytes>,
) -> Vec<u8> {
    let payload = if command == NbdCommand::Write && dialect == Dialect::Extended { FLAG_PAYLOAD_LEN } else { 0 };
    let fua = if when == ReplyWhen::Permanent { FLAG_FUA } else { 0 };
    let len = range.end.saturating_sub(range.start).get();
    let mut bytes = Vec::with_capacity(32);
    let magic = if dialect == Dialect::Extended { EXTENDED_REQUEST } else { REQUEST };
    bytes.extend(magic.to_be_bytes());
    bytes.extend((payload | fua).to_be_bytes());
    bytes.extend((command as u16).to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(range.start.get().to_be_bytes());
    match dialect {
        Dialect::Extended => bytes.extend(len.to_be_bytes()),
        _ => bytes.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes()),
    }
    bytes
}

/// The length of the shortest reply header, in bytes.
pub const REPLY_HEADER: usize = 16;

/// The first [`REPLY_HEADER`] bytes of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A complete simple reply. After that of a successful read, all its bytes follow.
    Simple {
        /// Zero, or the server's errno.
        error: u32,
        /// The cookie of the request.
        cookie: u64,
    },
    /// A chunk; [`ReplyHeader::rest`] bytes of its header follow.
    Chunk {
        /// `NBD_REPLY_FLAG_*`.
        flags: u16,
        /// `NBD_REPLY_TYPE_*`.
        kind: u16,
        /// The cookie of the request.
        cookie: u64,
    },
}

impl ReplyHeader {
    /// Reads the first part of a reply header.
    ///
    /// # Errors
    ///
    /// Bytes that are no reply of this dialect. The connection cannot be used any more.
    pub fn decode(bytes: &[u8; REPLY_HEADER], dialect: Dialect) -> Result<Self> {
        let mut fields = Fields::of(bytes);
        let magic = fields.u32().unwrap_or_default();
        match (magic, dialect) {
            (SIMPLE_REPLY, Dialect::Simple | Dialect::Structured) => {
                let (error, cookie) = (fields.u32().unwrap_or_default(), fields.u64().unwrap_or_default());
                Ok(Self::Simple { error, cookie })
            }
            (CHUNK, Dialect::Structured) | (EXTENDED_CHUNK, Dialect::Extended) => {
                let (flags, kind) = (fields.u16().unwrap_or_default(), fields.u16().unwrap_or_default());
                Ok(Self::Chunk { flags, kind, cookie: fields.u64().unwrap_or_default() })
            }
            _ => Err(violation(format!("sent {magic:#010x} where a reply should begin"))),
        }
    }

    /// The cookie of the request.
    pub fn cookie(self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => cookie,
        }
    }

    /// The number of bytes of the header that follow.
    pub fn rest(self, dialect: Dialect) -> usize {
        match (self, dialect) {
            (Self::Simple { .. }, _) => 0,
            (Self::Chunk { .. }, Dialect::Extended) => 16,
            (Self::Chunk { .. }, _) => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(start: u64, end: u64) -> Range<Bytes> {
        Bytes::new(start)..Bytes::new(end)
    }

    fn encode(dialect: Dialect, command: NbdCommand, cookie: u64, range: Range<Bytes>) -> Vec<u8> {
        encode_request(dialect, command, ReplyWhen::Complete, cookie, &range)
    }

    #[test]
    fn encoded_requests() {
        let plain = encode(Dialect::Structured, NbdCommand::BlockStatus, 7, bytes(512, 1536));
        assert_eq!(plain, b"\x25\x60\x95\x13\0\0\0\x07\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x02\0\0\0\x04\0");
        let extended = encode(Dialect::Extended, NbdCommand::Read, 1, bytes(0, 1 << 32));
        assert_eq!(extended, b"\x21\xe4\x1c\x71\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0");
    }

    /// NBD_CMD_FLAG_FUA is bit 0, NBD_CMD_FLAG_NO_HOLE bit 1, NBD_CMD_FLAG_PAYLOAD_LEN bit 5.
    #[test]
    fn encoded_writes() {
        let plain = encode(Dialect::Simple, NbdCommand::Write, 2, bytes(512, 1024));
        assert_eq!(plain, b"\x25\x60\x95\x13\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\x02\0\0\0\x02\0");
        let flags = |dialect, command, when| {
            let bytes = encode_request(dialect, command, when, 1, &bytes(0, 512));
            (bytes[5], bytes[7])
        };
        use ReplyWhen::{Complete, Permanent};
        for dialect in [Dialect::Simple, Dialect::Structured] {
            assert_eq!(flags(dialect, NbdCommand::Write, Complete), (0, 1));
            assert_eq!(flags(dialect, NbdCommand::Write, Permanent), (1, 1));
        }
        assert_eq!(flags(Dialect::Extended, NbdCommand::Write, Complete), (0x20, 1));
        assert_eq!(flags(Dialect::Extended, NbdCommand::Write, Permanent), (0x21, 1));
        assert_eq!(flags(Dialect::Extended, NbdCommand::WriteZeroes, Complete), (0, 6));
        assert_eq!(flags(Dialect::Structured, NbdCommand::WriteZeroes, Permanent), (1, 6));
        assert_eq!(flags(Dialect::Extended, NbdCommand::Flush, Complete), (0, 3));
    }

    #[test]
    fn reply_headers() {
        let rest = |magic: u32, dialect| {
            let mut bytes = [1; REPLY_HEADER];
            bytes[..4].copy_from_slice(&magic.to_be_bytes());
            ReplyHeader::decode(&bytes, dialect).map(|header| header.rest(dialect)).ok()
        };
        assert_eq!(rest(SIMPLE_REPLY, Dialect::Simple), Some(0));
        assert_eq!(rest(SIMPLE_REPLY, Dialect::Structured), Some(0));
        assert_eq!(rest(CHUNK, Dialect::Structured), Some(4));
        assert_eq!(rest(EXTENDED_CHUNK, Dialect::Extended), Some(16));
        assert!(rest(SIMPLE_REPLY, Dialect::Extended).is_none());
        assert!(rest(CHUNK, Dialect::Simple).is_none());
        assert!(rest(CHUNK, Dialect::Extended).is_none());
        assert!(rest(EXTENDED_CHUNK, Dialect::Structured).is_none());
        assert!(rest(0, Dialect::Structured).is_none());
    }
}
