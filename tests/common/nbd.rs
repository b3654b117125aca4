//! NBD servers, each on its own socket, and their images.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blkholefs::testing::map::ExtentKind as Kind;

use super::{run, wait_until};

/// A directory for sockets and images.
pub fn directory() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("blkholefs-nbd-").tempdir().expect("a temporary directory")
}

/// A running server. Dropping this value kills it.
pub struct Server {
    child: Child,
    command: Vec<String>,
    address: Address,
}

enum Address {
    Socket(PathBuf),
    Port(u16),
}

impl Address {
    fn answers(&self) -> bool {
        match self {
            Self::Socket(path) => UnixStream::connect(path).is_ok(),
            Self::Port(port) => TcpStream::connect(("127.0.0.1", *port)).is_ok(),
        }
    }
}

impl Server {
    /// nbdkit on a Unix socket.
    pub fn nbdkit(socket: &Path, words: &[&str]) -> Self {
        let socket_text = socket.to_str().expect("temporary paths are text");
        let mut command = vec!["nbdkit", "--foreground", "--unix", socket_text];
        command.extend(words);
        Self::start(&command, Address::Socket(socket.to_owned()))
    }

    /// nbdkit on a free port of 127.0.0.1, and that port.
    pub fn nbdkit_tcp(words: &[&str]) -> (Self, u16) {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let port = free.expect("a free port").port();
        let port_text = port.to_string();
        let mut command = vec!["nbdkit", "--foreground", "--ipaddr", "127.0.0.1", "--port", &port_text];
        command.extend(words);
        (Self::start(&command, Address::Port(port)), port)
    }

    /// qemu-nbd on a Unix socket, for up to eight clients, which may reconnect.
    pub fn qemu(socket: &Path, words: &[&str]) -> Self {
        let socket_text = socket.to_str().expect("temporary paths are text");
        let mut command = vec!["qemu-nbd", "--persistent", "--shared=8", "--socket", socket_text];
        command.extend(words);
        Self::start(&command, Address::Socket(socket.to_owned()))
    }

    fn start(command: &[&str], address: Address) -> Self {
        let command: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
        let child = Self::spawn(&command);
        let mut server = Self { child, command, address };
        server.wait();
        server
    }

    fn spawn(command: &[String]) -> Child {
        let mut child = Command::new(&command[0]);
        child.args(&command[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        child.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"))
    }

    fn wait(&mut self) {
        let up = wait_until(|| self.address.answers() || !matches!(self.child.try_wait(), Ok(None)));
        let running = matches!(self.child.try_wait(), Ok(None));
        assert!(up && running, "{:?} does not come up", self.command);
    }

    /// Kills the server; its socket stays where it is.
    pub fn kill(&mut self) {
        self.child.kill().expect("the server is our child");
        self.child.wait().expect("the server is our child");
    }

    /// Starts the killed server again, with another word in place of `old`.
    pub fn restart_with(&mut self, old: &str, new: &str) {
        for word in self.command.iter_mut().filter(|word| *word == old) {
            new.clone_into(word);
        }
        self.restart();
    }

    /// Starts the killed server again.
    pub fn restart(&mut self) {
        if let Address::Socket(path) = &self.address {
            // nbdkit does not bind to the socket file that a killed server left.
            let _ = fs::remove_file(path);
        }
        self.child = Self::spawn(&self.command);
        self.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A sparse image with data in `data`, ranges of 4 KiB blocks; the bytes depend on their position.
pub fn image(path: &Path, size: u64, data: &[std::ops::Range<u64>]) {
    let file = File::create(path).expect("a file");
    file.set_len(size).expect("a sparse file");
    for range in data {
        for block in range.clone() {
            let bytes: Vec<u8> =
                (0..4096_u64).map(|at| u8::try_from((block * 31 + at) % 255 + 1).expect("a byte")).collect();
            file.write_all_at(&bytes, block * 4096).expect("a write");
        }
    }
}

/// The map that nbdinfo prints, with adjacent extents of one kind merged: the end and the kind of each extent.
pub fn nbdinfo_map(uri: &str) -> Vec<(u64, Kind)> {
    let text = run("nbdinfo", ["--map", "--json", uri]);
    let extents: serde_json::Value = serde_json::from_str(&text).expect("nbdinfo prints JSON");
    let mut runs: Vec<(u64, Kind)> = Vec::new();
    for extent in extents.as_array().expect("a list") {
        let number = |key: &str| extent[key].as_u64().expect("a number");
        let kind = if number("type") & 2 == 0 { Kind::Data } else { Kind::Hole };
        let end = number("offset") + number("length");
        match runs.last_mut() {
            Some(last) if last.1 == kind => last.0 = end,
            _ => runs.push((end, kind)),
        }
    }
    runs
}
