//! Connecting to the export of a URI: socket, TLS, negotiation of options.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_socket, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::frame::Dialect;
use super::proto::{
    self, BlockSizes, ExportInfo, GREETING, Greeting, NbdInfo, NbdOption, OPTION_HEADER, OptionReply, option_reply,
    violation,
};
use super::stream::{Socket, Stream, TICK};
use super::tls::TlsSettings;
use super::uri::{Transport, Uri};
use crate::error::{Error, Result};

/// The largest number of replies to one option. A server sends one for each piece of information, and a last one.
const MAX_REPLIES: usize = 64;

/// The largest number of addresses of a host that are tried.
const MAX_ADDRESSES: usize = 8;

/// The parameters of a connection, as negotiated with the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// The size and the flags of the export.
    pub export: ExportInfo,
    /// The block sizes that requests must keep to.
    pub blocks: BlockSizes,
    /// How requests and replies are framed.
    pub dialect: Dialect,
    /// The number of the metadata context `base:allocation`, if the server offers it.
    pub context: Option<u32>,
    /// The number of the metadata context of the dirty bitmap, if one was requested and the server offers it.
    pub bitmap: Option<u32>,
}

/// Connects to the server of `uri` and opens its export. `bitmap` is the name of the metadata context of a dirty bitmap,
/// which is requested beside `base:allocation`.
///
/// The host name lookup, the connection, TLS and the negotiation all end by `deadline`.
///
/// # Errors
///
/// The server cannot be reached, has no TLS where the URI demands it, has no such export, or does not follow the
/// protocol.
pub fn connect(
    uri: &Uri,
    tls: Option<&TlsSettings>,
    bitmap: Option<&str>,
    deadline: Instant,
) -> Result<(Stream, Agreement)> {
    let failed = |error: io::Error| Error::failed("cannot connect").on(uri.to_string()).because(error);
    let socket = open_socket(uri.transport(), deadline).and_then(|socket| socket.set_timeouts().map(|()| socket));
    let stream = Stream::new(socket.map_err(failed)?);
    let mut negotiation = Negotiation { stream, deadline };
    let greeting = negotiation.greet().map_err(|error| error.on(uri.to_string()))?;
    if let Some(tls) = tls {
        negotiation = negotiation.encrypt(greeting, tls, uri)?;
    }
    let agreement = negotiation.negotiate(greeting, uri.export(), bitmap).map_err(|error| error.on(uri.to_string()))?;
    Ok((negotiation.stream, agreement))
}

fn open_socket(transport: &Transport, deadline: Instant) -> io::Result<Socket> {
    match transport {
        Transport::Tcp { host, port } => open_tcp(host, *port, deadline).map(Socket::Tcp),
        Transport::Unix { socket } => open_unix(socket).map(Socket::Unix),
    }
}

fn open_tcp(host: &str, port: u16, deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    let addresses = look_up(host, port, deadline)?;
    for (index, address) in addresses.iter().enumerate() {
        // Each address gets an equal share of the time that is left.
        let to_try = u32::try_from(addresses.len() - index).expect("a few addresses");
        let left = deadline.saturating_duration_since(Instant::now()) / to_try;
        if left.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(address, left) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The addresses of a host. The resolver of the system has no deadline, so it runs in a thread, which is not joined
/// when it takes too long.
fn look_up(host: &str, port: u16, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
    let resolve = move |host: &str| (host, port).to_socket_addrs().map(|all| all.take(MAX_ADDRESSES).collect());
    if host.parse::<IpAddr>().is_ok() {
        return resolve(host);
    }
    let (sender, answer) = mpsc::channel();
    let name = host.to_owned();
    // The send fails when the answer comes after the deadline.
    let resolver = thread::Builder::new().name("resolver".to_owned());
    let resolver = resolver.spawn(move || drop(sender.send(resolve(&name))))?;
    match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(addresses) => {
            // Joined because the daemon is forked only while no other thread runs.
            let _ = resolver.join();
            addresses
        }
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the host name was not resolved in time")),
    }
}

/// Connects, with the send timeout set first: otherwise connect(2) blocks for ever on a server that does not accept and
/// has a full queue (unix(7), `SO_SNDTIMEO`).
fn open_unix(path: &Path) -> io::Result<UnixStream> {
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let tick = i64::try_from(TICK.as_secs()).expect("a tick is short");
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::new(tick, 0))?;
    let address = match path.as_os_str().as_bytes() {
        [0, name @ ..] => UnixAddr::new_abstract(name)?,
        _ => UnixAddr::new(path)?,
    };
    connect_socket(socket.as_raw_fd(), &address)?;
    Ok(socket.into())
}

/// The error of a handshake in which the server violates the protocol.
fn bad_handshake(violation: Error) -> Error {
    Error::failed(format!("cannot negotiate: {violation}"))
}

/// The error of a handshake that failed because of the connection.
fn cannot_exchange(error: io::Error) -> Error {
    Error::failed("cannot negotiate with the NBD server").because(error)
}

/// The error of an option that the server refused with the error `code` and a text for users.
fn refused(option: NbdOption, code: u32, message: &str) -> Error {
    let text = if message.is_empty() { String::new() } else { format!(" ({message})") };
    let what = if option == NbdOption::StartTls { "start TLS" } else { "open the export" };
    Error::failed(format!("cannot {what}: {}{text}", OptionReply::error_text(code)))
        .hint(format!("the server's reply to the option {} was error {code}", option.name()))
}

/// The replies to one option.
struct OptionReplies {
    /// The last reply.
    end: OptionReply,
    /// The replies before the last one, with their data.
    information: Vec<(OptionReply, Vec<u8>)>,
    /// The text of an error reply, for users.
    message: String,
}

/// A connection in the handshake phase.
struct Negotiation {
    stream: Stream,
    deadline: Instant,
}

impl Negotiation {
    fn read<const N: usize>(&self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn read_exact(&self, bytes: &mut [u8]) -> Result<()> {
        self.stream.read_exact(bytes, self.deadline).map_err(cannot_exchange)
    }

    fn write_all(&self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes, self.deadline).map_err(cannot_exchange)
    }

    /// Receives the greeting of the server, and answers it.
    fn greet(&self) -> Result<Greeting> {
        let greeting = Greeting::decode(&self.read::<GREETING>()?).map_err(bad_handshake)?;
        self.write_all(&greeting.answer())?;
        Ok(greeting)
    }

    /// Sends an option, and receives its replies.
    fn send(&self, option: NbdOption, data: &[u8]) -> Result<OptionReplies> {
        self.write_all(&option.encode(data))?;
        let mut information = Vec::new();
        for _ in 0..MAX_REPLIES {
            let (reply, len) = option_reply(&self.read::<OPTION_HEADER>()?, option).map_err(bad_handshake)?;
            let len = usize::try_from(len).expect("option_reply bounds the length");
            let mut payload = vec![0; len];
            self.read_exact(&mut payload)?;
            match reply {
                OptionReply::Ack => return Ok(OptionReplies { end: reply, information, message: String::new() }),
                OptionReply::Error(_) => {
                    return Ok(OptionReplies { end: reply, information, message: printable(&payload) });
                }
                OptionReply::Info | OptionReply::MetaContext => information.push((reply, payload)),
            }
        }
        Err(bad_handshake(violation(format!("does not end its reply to {}", option.name()))))
    }

    /// Starts TLS. Never falls back: every other outcome is an error. No reply from before TLS is used afterwards, and
    /// no bytes were read ahead that could be taken as part of the encrypted stream.
    fn encrypt(self, greeting: Greeting, tls: &TlsSettings, uri: &Uri) -> Result<Self> {
        if !greeting.fixed {
            return Err(bad_handshake(violation("is too old for TLS")).on(uri.to_string()));
        }
        match self.send(NbdOption::StartTls, &[]).map_err(|error| error.on(uri.to_string()))? {
            OptionReplies { end: OptionReply::Error(code), message, .. } => {
                Err(refused(NbdOption::StartTls, code, &message).on(uri.to_string()))
            }
            _ => {
                let stream = self
                    .stream
                    .encrypt(tls.connection()?, self.deadline)
                    .map_err(|error| Error::failed("cannot start TLS").on(uri.to_string()).because(error))?;
                Ok(Self { stream, deadline: self.deadline })
            }
        }
    }

    /// Negotiates the options, and opens the export.
    fn negotiate(&self, greeting: Greeting, export: &str, bitmap: Option<&str>) -> Result<Agreement> {
        let mut agreement = Agreement {
            export: ExportInfo {
                size: crate::units::Bytes::ZERO,
                read_only: true,
                multi_conn: false,
                flush: false,
                fua: false,
                write_zeroes: false,
            },
            blocks: BlockSizes::default(),
            dialect: Dialect::Simple,
            context: None,
            bitmap: None,
        };
        if !greeting.fixed {
            agreement.export = self.export_name(greeting, export)?;
            return Ok(agreement);
        }
        agreement.dialect = self.dialect()?;
        if agreement.dialect != Dialect::Simple {
            (agreement.context, agreement.bitmap) = self.contexts(export, bitmap)?;
        }
        let replies = self.send(NbdOption::Go, &proto::go(export))?;
        match replies.end {
            // NBD_REP_ERR_UNSUP: the server is older than the option.
            OptionReply::Error(1) => agreement.export = self.export_name(greeting, export)?,
            OptionReply::Error(code) => {
                return Err(refused(NbdOption::Go, code, &replies.message));
            }
            _ => {
                let mut size_known = false;
                for (_, payload) in &replies.information {
                    match NbdInfo::decode(payload).map_err(bad_handshake)? {
                        NbdInfo::Export(export) => {
                            agreement.export = export;
                            size_known = true;
                        }
                        NbdInfo::BlockSizes(blocks) => agreement.blocks = blocks,
                        NbdInfo::Other => {}
                    }
                }
                if !size_known {
                    return Err(bad_handshake(violation("does not report the size of the export")));
                }
            }
        }
        Ok(agreement)
    }

    /// The best dialect that the server supports.
    fn dialect(&self) -> Result<Dialect> {
        for (option, dialect) in
            [(NbdOption::ExtendedHeaders, Dialect::Extended), (NbdOption::StructuredReply, Dialect::Structured)]
        {
            match self.send(option, &[])? {
                OptionReplies { end: OptionReply::Ack, .. } => return Ok(dialect),
                // NBD_REP_ERR_TLS_REQD: every other option would get the same reply.
                OptionReplies { end: OptionReply::Error(code @ 5), message, .. } => {
                    return Err(refused(option, code, &message));
                }
                _ => {}
            }
        }
        Ok(Dialect::Simple)
    }

    /// The numbers of `base:allocation` and of the context `bitmap`. A refusal is no error here: the reply to GO has the
    /// reason if the export is unusable.
    fn contexts(&self, export: &str, bitmap: Option<&str>) -> Result<(Option<u32>, Option<u32>)> {
        let names: Vec<&str> = [proto::BASE_ALLOCATION].into_iter().chain(bitmap).collect();
        let replies = self.send(NbdOption::SetMetaContext, &proto::set_meta_context(export, &names))?;
        if matches!(replies.end, OptionReply::Error(_)) {
            return Ok((None, None));
        }
        if replies.information.iter().any(|(kind, _)| *kind != OptionReply::MetaContext) {
            return Err(bad_handshake(violation("sent information that is not about metadata contexts")));
        }
        let payloads = replies.information.iter().map(|(_, payload)| payload.as_slice());
        let numbers = proto::meta_contexts(payloads, &names).map_err(bad_handshake)?;
        Ok((numbers[0], numbers.get(1).copied().flatten()))
    }

    /// `NBD_OPT_EXPORT_NAME`: the answer has no header, and a server that refuses it disconnects.
    fn export_name(&self, greeting: Greeting, export: &str) -> Result<ExportInfo> {
        self.write_all(&NbdOption::ExportName.encode(export.as_bytes()))?;
        let info = ExportInfo::decode(&self.read::<10>()?).map_err(bad_handshake)?;
        if !greeting.no_zeroes {
            self.read::<124>()?;
        }
        Ok(info)
    }
}

/// A text of the server for a log line: at most 200 characters, none of them control characters.
fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).take(200).collect()
}
