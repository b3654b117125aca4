//! NBD URIs, as `doc/uri.md` of the NBD project and libnbd's `nbd_connect_uri(3)` define them.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The port that IANA assigned to NBD.
const PORT: u16 = 10809;
/// The most bytes that a string of the protocol has, such as an export name ("Values" in `doc/proto.md`).
const MAX_STRING: usize = 4096;
/// The most bytes that a URI has: enough for an export name and a socket path with each byte written as `%XX`.
const MAX_URI: usize = 32 * 1024;

/// The URI of one export of one server. Its paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    text: String,
    transport: Transport,
    export: String,
    tls: Option<Tls>,
}

/// How the server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP: a name or an address without brackets, and a port.
    Tcp {
        /// Host name, IPv4 or IPv6 address.
        host: String,
        /// TCP port.
        port: u16,
    },
    /// A socket of the file system, or, when it begins with a NUL byte, of the abstract namespace (unix(7)).
    Unix {
        /// Its absolute path, or its abstract name.
        socket: PathBuf,
    },
}

/// The TLS parameters of an `nbds` URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Absolute path of the directory of `ca-cert.pem` and, for a server that requests a client certificate,
    /// `client-cert.pem` and `client-key.pem`.
    pub certificates: Option<PathBuf>,
    /// The name that the server's certificate must have, if that is not the name of the host.
    pub hostname: Option<String>,
    /// Whether the server's certificate is verified. Only `tls-verify-peer=0` switches that off.
    pub verify_peer: bool,
}

impl Uri {
    /// Parses a URI, and makes its paths absolute.
    ///
    /// # Errors
    /// A usage error that names the part that is wrong, missing, unknown or not supported. A failure for a relative path
    /// when the current directory was removed.
    pub fn parse(text: &str) -> Result<Self> {
        let uri = parse(text).map_err(|problem| Error::usage(format!("not a usable NBD URI: {problem}")).on(text))?;
        uri.with_absolute_paths()
    }

    /// How the server is reached.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }

    /// The export's name; an empty name is the server's default export.
    pub fn export(&self) -> &str {
        &self.export
    }

    /// The TLS parameters; `None` for a connection without encryption.
    pub fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// The name of the file that shows this export: the last part of the export's name, or `nbd` where that is no file
    /// name.
    pub fn file_name(&self) -> &str {
        match self.export.rsplit('/').find(|part| !part.is_empty()) {
            None | Some("." | "..") => "nbd",
            Some(name) => name,
        }
    }

    /// Whether the server is reached through a Unix socket.
    pub fn has_unix_socket(&self) -> bool {
        matches!(self.transport, Transport::Unix { .. })
    }

    fn with_absolute_paths(mut self) -> Result<Self> {
        let absolute = |path: &Path| {
            std::path::absolute(path)
                .map_err(|error| Error::failed("cannot make the path absolute").on(path).because(error))
        };
        if let Transport::Unix { socket } = &mut self.transport
            && socket.as_os_str().as_encoded_bytes().first() != Some(&0)
        {
            *socket = absolute(socket)?;
        }
        if let Some(directory) = self.tls.as_mut().and_then(|tls| tls.certificates.as_mut()) {
            *directory = absolute(directory)?;
        }
        Ok(self)
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn parse(text: &str) -> std::result::Result<Uri, String> {
    if text.len() > MAX_URI {
        return Err(format!("longer than {MAX_URI} bytes"));
    }
    let (scheme, rest) = text.split_once("://").ok_or("no scheme")?;
    let (secure, unix) = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        other => return Err(format!("the scheme {other} is not supported")),
    };
    if rest.contains('#') {
        return Err("a fragment (#) is not supported; write %23 in a name".to_owned());
    }
    let (hierarchy, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = hierarchy.split_once('/').unwrap_or((hierarchy, ""));
    let parameters = Parameters::parse(query)?;
    let export = text_of(path, "export name")?;
    if export.len() > MAX_STRING || export.contains('\0') {
        return Err(format!("an export name cannot have a NUL byte, nor more than {MAX_STRING} bytes"));
    }
    let transport = if unix {
        if !authority.is_empty() {
            return Err("a Unix socket has no host: write three slashes before the export name".to_owned());
        }
        Transport::Unix { socket: parameters.socket.clone().ok_or("no socket=PATH")? }
    } else if parameters.socket.is_some() {
        return Err("socket=PATH needs nbd+unix: or nbds+unix:".to_owned());
    } else {
        let (host, port) = parse_authority(authority)?;
        Transport::Tcp { host, port }
    };
    Ok(Uri { text: text.to_owned(), transport, export, tls: parameters.tls(secure)? })
}

/// The host and the TCP port of an authority: `host`, `host:port`, `[v6]` or `[v6]:port`. The port is [`PORT`] by
/// default.
///
/// # Errors
/// What is wrong with it, as the end of an error message.
fn parse_authority(authority: &str) -> std::result::Result<(String, u16), String> {
    if authority.contains('@') {
        return Err("a user name (for TLS with a pre-shared key) is not supported".to_owned());
    }
    let (host, port) = if let Some(literal) = authority.strip_prefix('[') {
        let (literal, after) = literal.split_once(']').ok_or("an IPv6 address without ]")?;
        let literal = text_of(literal, "host")?;
        let address = literal.split('%').next().unwrap_or_default();
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return Err(format!("[{literal}] is not an IPv6 address"));
        }
        match after.strip_prefix(':') {
            Some(port) => (literal, port),
            None if after.is_empty() => (literal, ""),
            None => return Err("only :PORT can follow ]".to_owned()),
        }
    } else if authority.matches(':').count() > 1 {
        return Err("write an IPv6 address in brackets".to_owned());
    } else {
        let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
        (text_of(host, "host")?, port)
    };
    if host.is_empty() || host.contains('\0') {
        return Err("no host".to_owned());
    }
    let port = match port {
        "" => PORT,
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            digits.parse().map_err(|_| format!("port {digits} is too large"))?
        }
        other => return Err(format!("port {other} is not a number")),
    };
    Ok((host, port))
}

/// The parameters of the query. Each may be given once.
#[derive(Default)]
struct Parameters {
    socket: Option<PathBuf>,
    tls_type: Option<String>,
    certificates: Option<PathBuf>,
    hostname: Option<String>,
    verify_peer: Option<bool>,
}

impl Parameters {
    fn parse(query: &str) -> std::result::Result<Self, String> {
        let mut all = Self::default();
        for part in query.split(['&', ';']).filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let key = text_of(key, "parameter")?;
            let twice = match key.as_str() {
                "socket" => all.socket.replace(path_of(value, &key)?).is_some(),
                "tls-type" => all.tls_type.replace(text_of(value, &key)?).is_some(),
                "tls-certificates" => all.certificates.replace(path_of(value, &key)?).is_some(),
                "tls-hostname" => all.hostname.replace(text_of(value, &key)?).is_some(),
                "tls-verify-peer" => all.verify_peer.replace(switch(value)?).is_some(),
                other => return Err(format!("the parameter {other} is not supported")),
            };
            if twice {
                return Err(format!("the parameter {key} is given twice"));
            }
        }
        Ok(all)
    }

    fn tls(self, secure: bool) -> std::result::Result<Option<Tls>, String> {
        let any = self.tls_type.is_some() || self.certificates.is_some() || self.hostname.is_some();
        if !secure {
            let any = any || self.verify_peer.is_some();
            return if any { Err("TLS parameters need nbds: or nbds+unix:".to_owned()) } else { Ok(None) };
        }
        match self.tls_type.as_deref() {
            None | Some("x509") => {}
            Some(other) => return Err(format!("tls-type={other} is not supported, only x509")),
        }
        let verify_peer = self.verify_peer.unwrap_or(true);
        if verify_peer && self.certificates.is_none() {
            return Err(
                "TLS needs tls-certificates=DIR, where DIR/ca-cert.pem has the certificates of the trusted authorities"
                    .to_owned(),
            );
        }
        Ok(Some(Tls { certificates: self.certificates, hostname: self.hostname, verify_peer }))
    }
}

fn switch(value: &str) -> std::result::Result<bool, String> {
    match value {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        other => Err(format!("tls-verify-peer={other} is neither 0 nor 1")),
    }
}

/// The path in the value of the parameter `what`. A `socket` can also be a name in the abstract namespace (unix(7)): a
/// NUL byte, and at least one more byte.
///
/// # Errors
/// What is wrong with it, as the end of an error message.
fn path_of(encoded: &str, what: &str) -> std::result::Result<PathBuf, String> {
    let bytes = decode(encoded, what)?;
    let abstract_socket = what == "socket" && bytes.len() > 1 && bytes[0] == 0;
    if bytes.is_empty() || (bytes.contains(&0) && !abstract_socket) {
        return Err(format!("{what} is not a path"));
    }
    Ok(Path::new(&OsString::from_vec(bytes)).to_owned())
}

/// The text in the part `what` of a URI.
///
/// # Errors
/// As [`path_of`].
fn text_of(encoded: &str, what: &str) -> std::result::Result<String, String> {
    String::from_utf8(decode(encoded, what)?).map_err(|_| format!("the {what} is not UTF-8"))
}

/// Decodes `%XX` (RFC 3986, section 2.1).
fn decode(encoded: &str, what: &str) -> std::result::Result<Vec<u8>, String> {
    let digit =
        |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16)).and_then(|d| u8::try_from(d).ok());
    let mut bytes = encoded.bytes();
    let mut decoded = Vec::with_capacity(encoded.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        match (digit(bytes.next()), digit(bytes.next())) {
            (Some(high), Some(low)) => decoded.push(high * 16 + low),
            _ => return Err(format!("the {what} has a % without two hexadecimal digits")),
        }
    }
    Ok(decoded)
}

#[cfg(test)]
mod tests;
