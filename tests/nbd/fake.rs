//! A minimal NBD server. A test can change each message before the server sends it.
//!
//! It implements `doc/proto.md` of the NBD project independently and shares no code with the client.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How the server frames its replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// No structured replies, so no block status.
    Simple,
    /// Structured replies.
    Structured,
    /// Extended headers.
    Extended,
}

/// The event that the server replies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The client connects.
    Greeting,
    /// An option, with its number.
    Option(u32),
    /// A read request.
    Read,
    /// A block status request.
    Status,
    /// A flush request.
    Flush,
    /// A write request. The bytes are on the disk.
    Write,
    /// A write zeroes request. The zeros are on the disk.
    WriteZeroes,
    /// A request beyond the end of the disk.
    Outside,
}

/// A request of the client.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    /// The cookie that identifies the request.
    pub cookie: u64,
    /// The offset of the first byte.
    pub offset: u64,
    /// The length in bytes.
    pub len: u64,
    /// The command flags: `NBD_CMD_FLAG_FUA` is 1, `NO_HOLE` 2 and `PAYLOAD_LEN` 32.
    pub flags: u16,
}

/// A message that is about to be sent.
#[derive(Debug)]
pub struct Message {
    /// The number of the connection, counted from zero.
    pub connection: usize,
    /// The number of bytes that were sent before on this connection.
    pub sent: usize,
    /// The event that this message replies to.
    pub step: Step,
    /// The request in the transmission phase, and the default value before it.
    pub request: Request,
    /// The bytes of the message.
    pub bytes: Vec<u8>,
}

/// What the server does after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Handles the next request.
    Continue,
    /// Closes the connection.
    Close,
    /// Sends nothing more and reads until the client closes the connection.
    Stall,
    /// Sends this message byte by byte, with the given pause before each byte.
    SendSlowly(Duration),
    /// Sends replies to reads of the first block for the cookies 1, 2, 3 and so on, and reads no more requests.
    AnswerAhead,
}

/// A function that can change a message before it is sent, and selects what the server does then.
pub type MessageHook = dyn Fn(&mut Message) -> Action + Send + Sync;

/// The metadata context ID of `base:allocation`.
pub const CONTEXT: u32 = 77;
/// The granularity of block status, in bytes.
pub const BLOCK: usize = 4096;

/// A running server. Dropping it stops the server.
pub struct FakeServer {
    /// The URI of its export.
    pub uri: String,
    /// The number of connections accepted so far.
    pub connections: Arc<AtomicUsize>,
    disk: Arc<Mutex<Vec<u8>>>,
    socket: PathBuf,
    stop: Arc<AtomicBool>,
    _directory: tempfile::TempDir,
}

impl FakeServer {
    /// Serves `disk` and calls `hook` for each message.
    pub fn new(dialect: Dialect, disk: &[u8], hook: Arc<MessageHook>) -> Self {
        let directory = crate::common::nbd::directory();
        let socket = directory.path().join("s");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let (stop, connections) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let disk = Arc::new(Mutex::new(disk.to_vec()));
        let (stopped, counted, served) = (Arc::clone(&stop), Arc::clone(&connections), Arc::clone(&disk));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let connection = counted.fetch_add(1, Ordering::Relaxed);
                let (hook, disk) = (Arc::clone(&hook), Arc::clone(&served));
                let stream = stream.expect("a connection");
                std::thread::spawn(move || {
                    // Errors of a connection are ignored, because only the client is tested.
                    let _ = Connection { stream, dialect, agreed: Dialect::Simple, disk, hook, connection, sent: 0 }
                        .serve();
                });
            }
        });
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        Self { uri, connections, disk, socket, stop, _directory: directory }
    }

    /// The disk as it is now.
    pub fn disk(&self) -> MutexGuard<'_, Vec<u8>> {
        lock(&self.disk)
    }
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = UnixStream::connect(&self.socket);
    }
}

fn lock(disk: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection to a client.
struct Connection {
    stream: UnixStream,
    dialect: Dialect,
    agreed: Dialect,
    disk: Arc<Mutex<Vec<u8>>>,
    hook: Arc<MessageHook>,
    connection: usize,
    sent: usize,
}

impl Connection {
    fn serve(mut self) -> io::Result<()> {
        self.send(Step::Greeting, Request::default(), [b"NBDMAGICIHAVEOPT".as_slice(), &[0, 3]].concat())?;
        self.stream.read_exact(&mut [0; 4])?;
        while self.option()? {}
        while self.request()? {}
        Ok(())
    }

    fn send(&mut self, step: Step, request: Request, bytes: Vec<u8>) -> io::Result<()> {
        let mut message = Message { connection: self.connection, sent: self.sent, step, request, bytes };
        let then = (self.hook)(&mut message);
        self.sent += message.bytes.len();
        if let Action::SendSlowly(pause) = then {
            for byte in message.bytes {
                std::thread::sleep(pause);
                self.stream.write_all(&[byte])?;
            }
            return Ok(());
        }
        self.stream.write_all(&message.bytes)?;
        match then {
            Action::Continue | Action::SendSlowly(_) => Ok(()),
            Action::AnswerAhead => {
                let len = u32::try_from(BLOCK).expect("small");
                let zeros = [[0; 8].as_slice(), &len.to_be_bytes()].concat();
                for cookie in 1.. {
                    self.stream.write_all(&chunk(self.agreed, 1, 2, cookie, &zeros))?;
                }
                Ok(())
            }
            Action::Close => Err(io::ErrorKind::ConnectionAborted.into()),
            Action::Stall => {
                io::copy(&mut self.stream, &mut io::sink())?;
                Err(io::ErrorKind::ConnectionAborted.into())
            }
        }
    }

    /// Reads a big-endian number of `N` bytes.
    fn number<const N: usize>(&mut self) -> io::Result<u64> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// Receives the payload of a write. With extended headers, the request must say that it has one.
    fn payload(&mut self, request: Request) -> io::Result<Vec<u8>> {
        if (request.flags & 32 != 0) != (self.agreed == Dialect::Extended) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut payload = vec![0; usize::try_from(request.len).expect("in range")];
        self.stream.read_exact(&mut payload)?;
        Ok(payload)
    }

    /// Answers one option; returns false when the transmission phase begins.
    fn option(&mut self) -> io::Result<bool> {
        self.number::<8>()?;
        let option = u32::try_from(self.number::<4>()?).expect("four bytes");
        let len = usize::try_from(self.number::<4>()?).expect("small");
        self.stream.read_exact(&mut vec![0; len])?;
        let (unsupported, ack) = (option_reply(option, 0x8000_0001, &[]), option_reply(option, 1, &[]));
        let bytes = match option {
            11 if self.dialect == Dialect::Extended => ack,
            8 if self.dialect != Dialect::Simple => ack,
            10 => {
                let context = [CONTEXT.to_be_bytes().as_slice(), b"base:allocation"].concat();
                [option_reply(option, 4, &context), ack].concat()
            }
            7 => {
                let size = (lock(&self.disk).len() as u64).to_be_bytes();
                let export = [[0, 0].as_slice(), &size, &[0, 3]].concat();
                let blocks = [[0, 3, 0, 0, 0, 1].as_slice(), &[0, 0, 0x10, 0], &[0, 0x10, 0, 0]].concat();
                [option_reply(option, 3, &export), option_reply(option, 3, &blocks), ack].concat()
            }
            _ => unsupported,
        };
        match option {
            11 if self.dialect == Dialect::Extended => self.agreed = Dialect::Extended,
            8 if self.dialect == Dialect::Structured => self.agreed = Dialect::Structured,
            _ => {}
        }
        self.send(Step::Option(option), Request::default(), bytes)?;
        Ok(option != 7)
    }

    /// Answers one request; returns false when the client disconnects.
    fn request(&mut self) -> io::Result<bool> {
        self.number::<4>()?;
        let flags = u16::try_from(self.number::<2>()?).expect("two bytes");
        let command = self.number::<2>()?;
        let (cookie, offset) = (self.number::<8>()?, self.number::<8>()?);
        let len = if self.agreed == Dialect::Extended { self.number::<8>()? } else { self.number::<4>()? };
        let request = Request { cookie, offset, len, flags };
        let payload = if command == 1 { self.payload(request)? } else { Vec::new() };
        let mut disk = lock(&self.disk);
        // A test may announce a size that is larger than the disk.
        let known = offset.checked_add(len).is_some_and(|end| end <= disk.len() as u64);
        let (step, bytes) = match command {
            3 => (Step::Flush, success(self.agreed, cookie)),
            0 | 1 | 6 | 7 if !known => (Step::Outside, refusal(self.agreed, cookie)),
            0 => (Step::Read, read_reply(self.agreed, request, &disk)),
            1 => {
                disk[range(request)].copy_from_slice(&payload);
                (Step::Write, success(self.agreed, cookie))
            }
            6 => {
                disk[range(request)].fill(0);
                (Step::WriteZeroes, success(self.agreed, cookie))
            }
            7 => (Step::Status, status_reply(self.agreed, request, CONTEXT, &extents(&disk, request))),
            _ => return Ok(false),
        };
        drop(disk);
        self.send(step, request, bytes)?;
        Ok(true)
    }
}

/// The indices of the bytes of a request that lies within the disk.
fn range(request: Request) -> std::ops::Range<usize> {
    let start = usize::try_from(request.offset).expect("in range");
    start..start + usize::try_from(request.len).expect("in range")
}

/// Encodes one reply to an option.
pub fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).expect("small");
    let words = [0x0003_e889_u32, 0x0455_65a9, option, kind, len].map(u32::to_be_bytes).concat();
    [words, data.to_vec()].concat()
}

/// Sets the size and the transmission flags in the reply to NBD_OPT_GO. `NBD_FLAG_HAS_FLAGS` is 1, `READ_ONLY` 2,
/// `SEND_FLUSH` 4, `SEND_FUA` 8, `SEND_WRITE_ZEROES` 64 and `CAN_MULTI_CONN` 256.
pub fn set_export(message: &mut Message, size: u64, flags: u16) {
    if message.step == Step::Option(7) {
        message.bytes[22..30].copy_from_slice(&size.to_be_bytes());
        message.bytes[30..32].copy_from_slice(&flags.to_be_bytes());
    }
}

/// Sets the minimum block size and the maximum payload size in the reply to NBD_OPT_GO.
pub fn set_blocks(message: &mut Message, minimum: u32, maximum: u32) {
    if message.step == Step::Option(7) {
        message.bytes[54..58].copy_from_slice(&minimum.to_be_bytes());
        message.bytes[62..66].copy_from_slice(&maximum.to_be_bytes());
    }
}

/// Encodes one chunk of a structured reply.
pub fn chunk(dialect: Dialect, flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let kind = [flags.to_be_bytes(), kind.to_be_bytes()].concat();
    let len = payload.len();
    let (magic, len) = if dialect == Dialect::Extended {
        (0x6e8a_278c_u32, [[0; 8], (len as u64).to_be_bytes()].concat())
    } else {
        (0x668e_33ef, u32::try_from(len).expect("small").to_be_bytes().to_vec())
    };
    [magic.to_be_bytes().as_slice(), &kind, &cookie.to_be_bytes(), &len, payload].concat()
}

/// Encodes a successful reply without data.
fn success(dialect: Dialect, cookie: u64) -> Vec<u8> {
    match dialect {
        Dialect::Simple => [[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], cookie.to_be_bytes()].concat(),
        _ => chunk(dialect, 1, 0, cookie, &[]),
    }
}

/// Encodes a reply with the error NBD_EINVAL.
pub fn refusal(dialect: Dialect, cookie: u64) -> Vec<u8> {
    failure(dialect, cookie, 22)
}

/// Encodes a reply with an error.
pub fn failure(dialect: Dialect, cookie: u64, error: u8) -> Vec<u8> {
    match dialect {
        Dialect::Simple => [[0x67, 0x44, 0x66, 0x98, 0, 0, 0, error], cookie.to_be_bytes()].concat(),
        _ => chunk(dialect, 1, 0x8001, cookie, &[0, 0, 0, error, 0, 0]),
    }
}

/// Encodes a whole reply to a read: one chunk for each run of zeros or data, or a simple reply.
fn read_reply(dialect: Dialect, request: Request, disk: &[u8]) -> Vec<u8> {
    if dialect == Dialect::Simple {
        let start = usize::try_from(request.offset).expect("in range");
        let end = start + usize::try_from(request.len).expect("in range");
        let head = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0];
        return [head.as_slice(), &request.cookie.to_be_bytes(), &disk[start..end]].concat();
    }
    let mut reply = Vec::new();
    let mut at = request.offset;
    for (len, zero) in extents(disk, request) {
        let payload = if zero {
            [at.to_be_bytes().as_slice(), &u32::try_from(len).expect("small").to_be_bytes()].concat()
        } else {
            let start = usize::try_from(at).expect("in range");
            [at.to_be_bytes().as_slice(), &disk[start..start + usize::try_from(len).expect("in range")]].concat()
        };
        reply.extend(chunk(dialect, 0, if zero { 2 } else { 1 }, request.cookie, &payload));
        at += len;
    }
    reply.extend(chunk(dialect, 1, 0, request.cookie, &[]));
    reply
}

/// Encodes a reply to a block status request. An extent is its length in bytes and whether it reads as zeros.
pub fn status_reply(dialect: Dialect, request: Request, context: u32, extents: &[(u64, bool)]) -> Vec<u8> {
    let mut payload = context.to_be_bytes().to_vec();
    if dialect == Dialect::Extended {
        payload.extend(u32::try_from(extents.len()).expect("few").to_be_bytes());
    }
    for (len, zero) in extents {
        let flags = if *zero { 3_u32 } else { 0 };
        if dialect == Dialect::Extended {
            payload.extend([len.to_be_bytes(), u64::from(flags).to_be_bytes()].concat());
        } else {
            payload.extend([u32::try_from(*len).expect("small").to_be_bytes(), flags.to_be_bytes()].concat());
        }
    }
    let kind = if dialect == Dialect::Extended { 6 } else { 5 };
    chunk(dialect, 1, kind, request.cookie, &payload)
}

/// Returns the runs in the requested range as their length in bytes and whether they are zeros, in the granularity of
/// [`BLOCK`].
pub fn extents(disk: &[u8], request: Request) -> Vec<(u64, bool)> {
    let mut extents: Vec<(u64, bool)> = Vec::new();
    let mut at = request.offset;
    while at < request.offset + request.len {
        let block = usize::try_from(at).expect("in range") / BLOCK;
        let bytes = &disk[block * BLOCK..disk.len().min((block + 1) * BLOCK)];
        let zero = bytes.iter().all(|byte| *byte == 0);
        let end = (((block + 1) * BLOCK) as u64).min(request.offset + request.len);
        match extents.last_mut() {
            Some(last) if last.1 == zero => last.0 += end - at,
            _ => extents.push((end - at, zero)),
        }
        at = end;
    }
    extents
}
