//! From a URI to a connection that takes requests: socket, TLS, options, export.

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
    self, BlockSizes, ExportInfo, GREETING, Greeting, NbdInfo, NbdOption, OPTION_HEADER, OptionReply, Violation,
    option_reply,
};
use super::stream::{Socket, Stream, TICK};
use super::tls::TlsSettings;
use super::uri::{Transport, Uri};
use crate::error::{Error, Result};

/// The most replies to one option; a server sends one per piece of information and one to end them.
const MAX_REPLIES: usize = 64;

/// The most addresses of a host that are tried.
const MAX_ADDRESSES: usize = 8;

/// What a connection agreed on with its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Size and abilities of the export.
    pub export: ExportInfo,
    /// How requests must be cut.
    pub blocks: BlockSizes,
    /// How requests and replies are framed.
    pub dialect: Dialect,
    /// The number that stands for `base:allocation`, if the server offers it.
    pub context: Option<u32>,
}

/// Connects to the server of `uri` and opens its export.
///
/// All of it ends by `deadline`: looking the host name up, the connection, TLS and the negotiation.
///
/// # Errors
///
/// No server, no TLS where it is demanded, no such export, no NBD.
pub fn connect(uri: &Uri, identity: Option<&TlsSettings>, deadline: Instant) -> Result<(Stream, Agreement)> {
    let failed = |error: io::Error| Error::failed("cannot connect").on(uri.to_string()).because(error);
    let socket = open_socket(uri.transport(), deadline).and_then(|socket| socket.tick().map(|()| socket));
    let stream = Stream::new(socket.map_err(failed)?);
    let mut talk = Negotiation { stream, deadline };
    let greeting = talk.greet().map_err(|problem| problem.on(uri))?;
    if let Some(identity) = identity {
        talk = talk.encrypt(greeting, identity, uri)?;
    }
    let agreement = talk.negotiate(greeting, uri.export()).map_err(|problem| problem.on(uri))?;
    Ok((talk.stream, agreement))
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
        // One that does not answer leaves the others their share of the time.
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

/// The addresses of a host. The system's resolver knows no deadline, so it is asked in a thread, which is left alone when it
/// takes too long.
fn look_up(host: &str, port: u16, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
    let resolve = move |host: &str| (host, port).to_socket_addrs().map(|all| all.take(MAX_ADDRESSES).collect());
    if host.parse::<IpAddr>().is_ok() {
        return resolve(host);
    }
    let (sender, answer) = mpsc::channel();
    let name = host.to_owned();
    // Nobody waits any more for an answer that comes too late.
    let resolver = thread::Builder::new().name("resolver".to_owned());
    let resolver = resolver.spawn(move || drop(sender.send(resolve(&name))))?;
    match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(addresses) => {
            // It has nothing left to do. A daemon is forked only when no other thread runs.
            let _ = resolver.join();
            addresses
        }
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the host name is not resolved in time")),
    }
}

/// Connects with the send timeout set first: a server that does not accept, with a full queue, would hold us for ever
/// (unix(7), `SO_SNDTIMEO`).
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

/// Why a negotiation failed.
#[derive(Debug)]
enum Problem {
    Io(io::Error),
    Violation(Violation),
    Refused { option: NbdOption, code: u32, message: String },
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Violation> for Problem {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

impl Problem {
    fn on(self, uri: &Uri) -> Error {
        let error = match self {
            Self::Io(error) => Error::failed("cannot negotiate with the NBD server").because(error),
            Self::Violation(violation) => Error::failed(format!("cannot negotiate: {violation}")),
            Self::Refused { option, code, message } => {
                let said = if message.is_empty() { String::new() } else { format!(" ({message})") };
                let what = if option == NbdOption::StartTls { "start TLS" } else { "open the export" };
                Error::failed(format!("cannot {what}: {}{said}", OptionReply::error_text(code)))
                    .hint(format!("the server's reply to the option {} was error {code}", option.name()))
            }
        };
        error.on(uri.to_string())
    }
}

/// The end of the replies to one option, and the data of those before it.
struct OptionReplies {
    end: OptionReply,
    information: Vec<(OptionReply, Vec<u8>)>,
    /// What an error reply says to people.
    message: String,
}

/// A negotiation.
struct Negotiation {
    stream: Stream,
    deadline: Instant,
}

impl Negotiation {
    fn read<const N: usize>(&self) -> std::result::Result<[u8; N], Problem> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes, self.deadline)?;
        Ok(bytes)
    }

    fn greet(&self) -> std::result::Result<Greeting, Problem> {
        let greeting = Greeting::decode(&self.read::<GREETING>()?)?;
        self.stream.write_all(&greeting.answer(), self.deadline)?;
        Ok(greeting)
    }

    /// Sends an option and reads its replies up to the one that ends them.
    fn ask(&self, option: NbdOption, data: &[u8]) -> std::result::Result<OptionReplies, Problem> {
        self.stream.write_all(&option.encode(data), self.deadline)?;
        let mut information = Vec::new();
        for _ in 0..MAX_REPLIES {
            let (reply, len) = option_reply(&self.read::<OPTION_HEADER>()?, option)?;
            let len = usize::try_from(len).expect("option_reply bounds the length");
            let mut payload = vec![0; len];
            self.stream.read_exact(&mut payload, self.deadline)?;
            match reply {
                OptionReply::Ack => return Ok(OptionReplies { end: reply, information, message: String::new() }),
                OptionReply::Error(_) => {
                    return Ok(OptionReplies { end: reply, information, message: printable(&payload) });
                }
                OptionReply::Info | OptionReply::MetaContext => information.push((reply, payload)),
            }
        }
        Err(Violation::new(format!("does not end its reply to {}", option.name())).into())
    }

    /// Starts TLS. Never falls back: everything else than TLS is an error. Nothing that the server said before counts
    /// afterwards, and nothing was read ahead that could be taken for a part of the encrypted stream.
    fn encrypt(self, greeting: Greeting, identity: &TlsSettings, uri: &Uri) -> Result<Self> {
        if !greeting.fixed {
            return Err(Problem::from(Violation::new("is too old for TLS")).on(uri));
        }
        match self.ask(NbdOption::StartTls, &[]).map_err(|problem| problem.on(uri))? {
            OptionReplies { end: OptionReply::Error(code), message, .. } => {
                Err(Problem::Refused { option: NbdOption::StartTls, code, message }.on(uri))
            }
            _ => {
                let stream = self
                    .stream
                    .encrypt(identity.connection()?, self.deadline)
                    .map_err(|error| Error::failed("cannot start TLS").on(uri.to_string()).because(error))?;
                Ok(Self { stream, deadline: self.deadline })
            }
        }
    }

    fn negotiate(&self, greeting: Greeting, export: &str) -> std::result::Result<Agreement, Problem> {
        let mut agreement = Agreement {
            export: ExportInfo { size: crate::units::Bytes::ZERO, read_only: true, multi_conn: false, flush: false },
            blocks: BlockSizes::default(),
            dialect: Dialect::Simple,
            context: None,
        };
        if !greeting.fixed {
            agreement.export = self.export_name(greeting, export)?;
            return Ok(agreement);
        }
        agreement.dialect = self.dialect()?;
        if agreement.dialect != Dialect::Simple {
            agreement.context = self.context(export)?;
        }
        let replies = self.ask(NbdOption::Go, &proto::go(export))?;
        match replies.end {
            // NBD_REP_ERR_UNSUP: an option that is younger than the server.
            OptionReply::Error(1) => agreement.export = self.export_name(greeting, export)?,
            OptionReply::Error(code) => {
                return Err(Problem::Refused { option: NbdOption::Go, code, message: replies.message });
            }
            _ => {
                let mut size_known = false;
                for (_, payload) in &replies.information {
                    match NbdInfo::decode(payload)? {
                        NbdInfo::Export(export) => {
                            agreement.export = export;
                            size_known = true;
                        }
                        NbdInfo::BlockSizes(blocks) => agreement.blocks = blocks,
                        NbdInfo::Other => {}
                    }
                }
                if !size_known {
                    return Err(Violation::new("does not say how big the export is").into());
                }
            }
        }
        Ok(agreement)
    }

    /// The best dialect that the server speaks.
    fn dialect(&self) -> std::result::Result<Dialect, Problem> {
        for (option, dialect) in
            [(NbdOption::ExtendedHeaders, Dialect::Extended), (NbdOption::StructuredReply, Dialect::Structured)]
        {
            match self.ask(option, &[])? {
                OptionReplies { end: OptionReply::Ack, .. } => return Ok(dialect),
                // NBD_REP_ERR_TLS_REQD: it would come back for every other option.
                OptionReplies { end: OptionReply::Error(code @ 5), message, .. } => {
                    return Err(Problem::Refused { option, code, message });
                }
                _ => {}
            }
        }
        Ok(Dialect::Simple)
    }

    /// The number of `base:allocation`. A refusal is no error here: GO will say what is wrong with the export.
    fn context(&self, export: &str) -> std::result::Result<Option<u32>, Problem> {
        let replies = self.ask(NbdOption::SetMetaContext, &proto::set_meta_context(export))?;
        match (replies.end, replies.information.as_slice()) {
            (OptionReply::Ack, [(OptionReply::MetaContext, payload)]) => Ok(Some(proto::meta_context(payload)?)),
            (OptionReply::Ack, []) | (OptionReply::Error(_), _) => Ok(None),
            _ => Err(Violation::new("chose more than one metadata context").into()),
        }
    }

    /// `NBD_OPT_EXPORT_NAME`: the answer has no header, and a server that does not like it hangs up.
    fn export_name(&self, greeting: Greeting, export: &str) -> std::result::Result<ExportInfo, Problem> {
        self.stream.write_all(&NbdOption::ExportName.encode(export.as_bytes()), self.deadline)?;
        let info = ExportInfo::decode(&self.read::<10>()?)?;
        if !greeting.no_zeroes {
            self.read::<124>()?;
        }
        Ok(info)
    }
}

/// A server's words for a log line: short, and without control characters.
fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).take(200).collect()
}
