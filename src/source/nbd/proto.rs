//! The handshake: the bytes of the greeting, of options and of their replies, without I/O. Every input gives a value or
//! an error.
//!
//! Everything here and in [`super::reply`] follows `doc/proto.md` of the NBD project ("fixed newstyle"). All numbers
//! are big-endian.

use std::fmt::Display;

use crate::error::{Error, Result};
use crate::units::Bytes;

/// First word of a server's greeting: `NBDMAGIC`.
const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of a newstyle greeting, and first of every option: `IHAVEOPT`.
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// First word of every option reply.
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

/// `NBD_FLAG_FIXED_NEWSTYLE`, both ways.
const FIXED_NEWSTYLE: u16 = 1;
/// `NBD_FLAG_NO_ZEROES`, both ways.
const NO_ZEROES: u16 = 1 << 1;

/// Transmission flags that this client uses.
const FLAG_HAS_FLAGS: u16 = 1;
const FLAG_READ_ONLY: u16 = 1 << 1;
const FLAG_SEND_FLUSH: u16 = 1 << 2;
const FLAG_SEND_FUA: u16 = 1 << 3;
const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

/// Bit of an option reply's type that makes it an error.
const REPLY_ERROR: u32 = 1 << 31;
/// The longest option reply that is read: a string of 4096 bytes and the fixed parts around it.
pub const MAX_OPTION_REPLY: u32 = 4096 + 64;

/// The metadata context whose extents have a bit for ranges that read as zeros.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The start of the name of a metadata context whose extents have a bit for ranges that a dirty bitmap of QEMU marks. The
/// bitmap's name follows (`docs/interop/nbd.rst` of QEMU).
pub const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// The longest read or write that a server without block size constraints must accept ("Block size constraints").
pub const DEFAULT_MAX_PAYLOAD: Bytes = Bytes::new(32 << 20);
/// The alignment that such a server must accept.
const DEFAULT_MIN_BLOCK: Bytes = Bytes::new(512);
/// The largest minimum block size that the protocol allows.
const LARGEST_MIN_BLOCK: u32 = 64 << 10;

/// The error of a message that the protocol forbids. `what` completes a sentence that begins with "the server".
pub(super) fn violation(what: impl Display) -> Error {
    Error::failed(format!("the server {what}"))
}

/// Reads numbers from the front of a slice.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.0
    }
}

/// The length of a greeting, in bytes.
pub const GREETING: usize = 18;

/// The greeting of a newstyle server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Whether options other than [`NbdOption::ExportName`] may be sent.
    pub fixed: bool,
    /// Whether the answer to [`NbdOption::ExportName`] ends without 124 zero bytes.
    pub no_zeroes: bool,
}

impl Greeting {
    /// Reads the server's first bytes.
    ///
    /// # Errors
    ///
    /// Not an NBD server, or one of the oldstyle protocol, which has no export names.
    pub fn decode(bytes: &[u8; GREETING]) -> Result<Self> {
        let mut fields = Fields::of(bytes);
        if fields.u64() != Some(NBDMAGIC) {
            return Err(violation("is not an NBD server"));
        }
        if fields.u64() != Some(IHAVEOPT) {
            return Err(violation("supports only the oldstyle protocol"));
        }
        let flags = fields.u16().unwrap_or_default();
        Ok(Self { fixed: flags & FIXED_NEWSTYLE != 0, no_zeroes: flags & NO_ZEROES != 0 })
    }

    /// The client flags that answer it: the same flags.
    pub fn answer(self) -> [u8; 4] {
        let fixed = if self.fixed { FIXED_NEWSTYLE } else { 0 };
        let no_zeroes = if self.no_zeroes { NO_ZEROES } else { 0 };
        u32::from(fixed | no_zeroes).to_be_bytes()
    }
}

/// An option that this client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NbdOption {
    /// `NBD_OPT_EXPORT_NAME`: chooses an export, for old servers. There is no error reply; the server disconnects
    /// instead.
    ExportName = 1,
    /// `NBD_OPT_ABORT`: the client disconnects.
    Abort = 2,
    /// `NBD_OPT_STARTTLS`.
    StartTls = 5,
    /// `NBD_OPT_GO`.
    Go = 7,
    /// `NBD_OPT_STRUCTURED_REPLY`.
    StructuredReply = 8,
    /// `NBD_OPT_SET_META_CONTEXT`.
    SetMetaContext = 10,
    /// `NBD_OPT_EXTENDED_HEADERS`.
    ExtendedHeaders = 11,
}

impl NbdOption {
    /// The option's name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::ExportName => "EXPORT_NAME",
            Self::Abort => "ABORT",
            Self::StartTls => "STARTTLS",
            Self::Go => "GO",
            Self::StructuredReply => "STRUCTURED_REPLY",
            Self::SetMetaContext => "SET_META_CONTEXT",
            Self::ExtendedHeaders => "EXTENDED_HEADERS",
        }
    }

    /// The option with its data.
    pub fn encode(self, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16 + data.len());
        bytes.extend(IHAVEOPT.to_be_bytes());
        bytes.extend((self as u32).to_be_bytes());
        bytes.extend(length(data));
        bytes.extend(data);
        bytes
    }
}

/// A length field. All strings of this client are parts of a [`super::Uri`], which limits their length, or names of
/// metadata contexts, which are as short.
fn length(data: &[u8]) -> [u8; 4] {
    u32::try_from(data.len()).expect("option data is a few KiB").to_be_bytes()
}

/// Data of [`NbdOption::Go`]: the export, and a request for its block sizes (`NBD_INFO_BLOCK_SIZE`, 3).
pub fn go(export: &str) -> Vec<u8> {
    let mut data = length(export.as_bytes()).to_vec();
    data.extend(export.as_bytes());
    data.extend([0, 1, 0, 3]);
    data
}

/// Data of [`NbdOption::SetMetaContext`]: the export, and one query for each of the contexts `names`.
pub fn set_meta_context(export: &str, names: &[&str]) -> Vec<u8> {
    let mut data = length(export.as_bytes()).to_vec();
    data.extend(export.as_bytes());
    data.extend(u32::try_from(names.len()).expect("a few queries").to_be_bytes());
    for name in names {
        data.extend(length(name.as_bytes()));
        data.extend(name.as_bytes());
    }
    data
}

/// The length of the header of an option reply, in bytes.
pub const OPTION_HEADER: usize = 20;

/// The type of an option reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionReply {
    /// `NBD_REP_ACK`: the last reply to an option that the server accepted.
    Ack,
    /// `NBD_REP_INFO`.
    Info,
    /// `NBD_REP_META_CONTEXT`.
    MetaContext,
    /// An error: its number without bit 31.
    Error(u32),
}

impl OptionReply {
    /// The text of an error reply.
    pub fn error_text(code: u32) -> &'static str {
        match code {
            1 => "the server does not support it",
            2 => "the server's policy forbids it",
            3 => "the server considers it invalid",
            4 => "the server's platform does not support it",
            5 => "the server demands TLS (nbds: or nbds+unix:)",
            6 => "there is no such export",
            7 => "the server is shutting down",
            8 => "the server demands block size constraints",
            9 => "the server considers it too big",
            10 => "the server demands extended headers",
            _ => "the server refuses it",
        }
    }
}

/// Reads the header of a reply to `option`: the type of the reply, and the number of bytes of data that follow.
///
/// # Errors
///
/// Anything that is not a reply to `option`, or is longer than [`MAX_OPTION_REPLY`].
pub fn option_reply(bytes: &[u8; OPTION_HEADER], option: NbdOption) -> Result<(OptionReply, u32)> {
    let mut fields = Fields::of(bytes);
    let (magic, number) = (fields.u64(), fields.u32());
    let (kind, len) = (fields.u32().unwrap_or_default(), fields.u32().unwrap_or_default());
    if magic != Some(OPTION_REPLY) {
        return Err(violation("sent something that is not an option reply"));
    }
    if number != Some(option as u32) {
        return Err(violation(format!("replied to another option than {}", option.name())));
    }
    if len > MAX_OPTION_REPLY {
        return Err(violation(format!("sent an option reply of {len} bytes")));
    }
    match kind {
        1 if len == 0 => Ok((OptionReply::Ack, 0)),
        3 => Ok((OptionReply::Info, len)),
        4 => Ok((OptionReply::MetaContext, len)),
        error if error & REPLY_ERROR != 0 => Ok((OptionReply::Error(error & !REPLY_ERROR), len)),
        other => Err(violation(format!("sent option reply {other} of {len} bytes"))),
    }
}

/// The size and the transmission flags of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The length of the export.
    pub size: Bytes,
    /// The export is read-only (`NBD_FLAG_READ_ONLY`).
    pub read_only: bool,
    /// The server has no cache, or one for all connections, and flushed writes are visible on all of them
    /// (`NBD_FLAG_CAN_MULTI_CONN`).
    pub multi_conn: bool,
    /// The server accepts [`super::frame::NbdCommand::Flush`] (`NBD_FLAG_SEND_FLUSH`).
    pub flush: bool,
    /// The server accepts requests that it answers when their writes are permanent (`NBD_FLAG_SEND_FUA`).
    pub fua: bool,
    /// The server accepts [`super::frame::NbdCommand::WriteZeroes`] (`NBD_FLAG_SEND_WRITE_ZEROES`).
    pub write_zeroes: bool,
}

impl ExportInfo {
    /// Reads the size and the transmission flags: all of the answer to [`NbdOption::ExportName`] except its zeroes.
    ///
    /// # Errors
    ///
    /// A size beyond the largest file offset of Linux, or missing flags.
    pub fn decode(bytes: &[u8; 10]) -> Result<Self> {
        let mut fields = Fields::of(bytes);
        let (size, flags) = (fields.u64().unwrap_or_default(), fields.u16().unwrap_or_default());
        if i64::try_from(size).is_err() {
            return Err(violation(format!("reports a size of the export of {size} bytes")));
        }
        if flags & FLAG_HAS_FLAGS == 0 {
            return Err(violation("sent no transmission flags"));
        }
        Ok(Self {
            size: Bytes::new(size),
            read_only: flags & FLAG_READ_ONLY != 0,
            multi_conn: flags & FLAG_CAN_MULTI_CONN != 0,
            flush: flags & FLAG_SEND_FLUSH != 0,
            fua: flags & FLAG_SEND_FUA != 0,
            write_zeroes: flags & FLAG_SEND_WRITE_ZEROES != 0,
        })
    }
}

/// The block sizes that requests must keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this power of two, except at the end of the export.
    pub minimum: Bytes,
    /// The longest read or write; a multiple of `minimum`, at most [`DEFAULT_MAX_PAYLOAD`].
    pub maximum: Bytes,
}

impl Default for BlockSizes {
    fn default() -> Self {
        Self { minimum: DEFAULT_MIN_BLOCK, maximum: DEFAULT_MAX_PAYLOAD }
    }
}

/// The data of a [`OptionReply::Info`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NbdInfo {
    /// `NBD_INFO_EXPORT`.
    Export(ExportInfo),
    /// `NBD_INFO_BLOCK_SIZE`.
    BlockSizes(BlockSizes),
    /// Information that was not requested.
    Other,
}

impl NbdInfo {
    /// Reads the data of a [`OptionReply::Info`].
    ///
    /// # Errors
    ///
    /// A length that does not fit its type, or block sizes that the protocol forbids.
    pub fn decode(payload: &[u8]) -> Result<Self> {
        let wrong = || violation(format!("sent an information reply of {} bytes", payload.len()));
        let mut fields = Fields::of(payload);
        match fields.u16().ok_or_else(wrong)? {
            0 => {
                let bytes: &[u8; 10] = fields.rest().try_into().map_err(|_| wrong())?;
                ExportInfo::decode(bytes).map(Self::Export)
            }
            3 => {
                let (Some(minimum), Some(_preferred), Some(maximum), []) =
                    (fields.u32(), fields.u32(), fields.u32(), fields.rest())
                else {
                    return Err(wrong());
                };
                block_sizes(minimum, maximum).map(Self::BlockSizes)
            }
            _ => Ok(Self::Other),
        }
    }
}

fn block_sizes(minimum: u32, maximum: u32) -> Result<BlockSizes> {
    let sane = minimum.is_power_of_two() && minimum <= LARGEST_MIN_BLOCK && maximum >= minimum;
    if !sane {
        return Err(violation(format!("demands blocks of at least {minimum} and at most {maximum} bytes")));
    }
    let minimum = Bytes::new(u64::from(minimum));
    let maximum = Bytes::new(u64::from(maximum)).min(DEFAULT_MAX_PAYLOAD).align_down(minimum);
    Ok(BlockSizes { minimum, maximum })
}

/// Reads the data of the [`OptionReply::MetaContext`] replies to one option: the number that stands for each of the
/// contexts `names`, which were requested. A context that the server does not offer has none.
///
/// # Errors
///
/// A context that was not requested, or was chosen twice, or two contexts with the same number.
pub fn meta_contexts<'a>(payloads: impl Iterator<Item = &'a [u8]>, names: &[&str]) -> Result<Vec<Option<u32>>> {
    let mut numbers = vec![None; names.len()];
    for payload in payloads {
        let mut fields = Fields::of(payload);
        let number = fields.u32();
        let place = names.iter().position(|name| fields.rest() == name.as_bytes());
        let (Some(number), Some(place)) = (number, place) else {
            return Err(violation("chose a metadata context that was not requested"));
        };
        if numbers[place].is_some() || numbers.contains(&Some(number)) {
            return Err(violation("chose a metadata context twice"));
        }
        numbers[place] = Some(number);
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests;
