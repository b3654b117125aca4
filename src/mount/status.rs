//! How a mount does: the socket at which a daemon answers, and the list of all mounts of this machine.
//!
//! The socket is beside the record of the daemon, and only the owner of the directory can connect. The daemon answers each
//! connection with its state at that moment (`message`) and closes it. It reads nothing. `ask` is the other side.

mod ask;
mod message;
mod mounts;

pub use message::{format, parse};
pub use mounts::{MountState, MountStatus, Mounts, list};

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::Pid;

use crate::error::plain;
use crate::fs::FileSystem;
use crate::mount::record;
use crate::sys::device::DeviceId;

/// How long one connection may take. Longer answers than the buffer of a socket wait for the reader.
const LONGEST_ANSWER: Duration = Duration::from_secs(1);

/// The pause after a connection could not be accepted, for lack of descriptors or memory.
const PAUSE: Duration = Duration::from_secs(1);

/// The socket of a daemon. Dropping it removes the file; a thread that answers there ends with the process.
#[derive(Debug)]
pub struct StatusSocket {
    path: PathBuf,
    listener: Arc<UnixListener>,
}

impl StatusSocket {
    /// Makes the socket of this process, the daemon of the mount with `device`, in the directory of its record.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn new(directory: &Path, device: DeviceId) -> io::Result<Self> {
        let name = record::socket_name(device, Pid::this());
        let socket = new_socket(SockFlag::empty())?;
        // bind(2) makes the file with the permissions of the socket (net/unix/af_unix.c: unix_bind_bsd), so that it never has
        // others, whatever the file mode creation mask is.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let listener = at(directory, &name, |address| {
            bind(socket.as_raw_fd(), address)?;
            Ok(UnixListener::from(socket))
        })?;
        let created = Self { path: directory.join(name), listener: Arc::new(listener) };
        listen(&created.listener, Backlog::new(128)?)?;
        Ok(created)
    }

    /// Starts a thread that answers with the state of `fs`, until the process ends.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn answer(&self, fs: &Arc<FileSystem>) -> io::Result<()> {
        // The thread must not keep the devices open after the unmount.
        let (listener, fs) = (self.listener.clone(), Arc::downgrade(fs));
        thread::Builder::new().name("status".to_owned()).spawn(move || answer_all(&listener, &fs)).map(drop)
    }
}

impl Drop for StatusSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::debug!("{}: cannot remove: {error}", self.path.display());
        }
    }
}

/// The process id in the namespace of this process of the daemon that serves the mount with `device`. `recorded` is that in its
/// own namespace, and the result where there is no connection. `None` if it has none here: it runs in a namespace that this
/// process is not in, such as that of another container.
pub fn process_of(directory: &Path, device: DeviceId, recorded: Pid) -> Option<Pid> {
    ask::process(directory, &record::socket_name(device, recorded)).unwrap_or(Some(recorded))
}

/// A socket that no child inherits.
fn new_socket(flags: SockFlag) -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::Stream, flags | SockFlag::SOCK_CLOEXEC, None)?)
}

/// Calls `work` with the address of the socket `name` in `directory`. The path of a directory may be longer than an address.
fn at<T>(directory: &Path, name: &str, work: impl FnOnce(&UnixAddr) -> io::Result<T>) -> io::Result<T> {
    let directory = File::open(directory)?;
    work(&UnixAddr::new(&*PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd())))?)
}

fn answer_all(listener: &UnixListener, fs: &Weak<FileSystem>) {
    for connection in listener.incoming() {
        let sent = connection.and_then(|connection| {
            let Some(fs) = fs.upgrade() else { return Ok(()) };
            let answer = format(&fs.status());
            drop(fs);
            send(connection, &answer)
                .inspect_err(|error| log::debug!("cannot send the status: {}", plain(error)))
                .or(Ok(()))
        });
        if let Err(error) = sent {
            log::debug!("cannot accept a connection: {}", plain(&error));
            thread::sleep(PAUSE);
        }
    }
}

/// Sends an answer, within [`LONGEST_ANSWER`].
fn send(mut connection: UnixStream, mut answer: &[u8]) -> io::Result<()> {
    let deadline = Instant::now() + LONGEST_ANSWER;
    while !answer.is_empty() {
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        connection.set_write_timeout(Some(rest))?;
        match connection.write(answer) {
            Ok(sent) => answer = &answer[sent..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
