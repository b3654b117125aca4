//! One socket, with or without TLS, with a deadline for every wait.
//!
//! Reading and writing both take `&self`: one thread may wait for the server while another sends. The socket has a
//! timeout of one [`TICK`] for each system call, after which the deadline is checked; so a normal request costs no
//! extra system call. When less than a tick is left, poll(2) waits for the rest of the time first.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, sendmsg};
use rustls::ClientConnection;

/// The longest wait in one system call on a socket.
pub const TICK: Duration = Duration::from_secs(1);

/// A connected socket.
#[derive(Debug)]
pub enum Socket {
    /// TCP, with TCP_NODELAY.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
}

impl Socket {
    /// Sets the timeout of one [`TICK`] for reads and writes.
    ///
    /// # Errors
    ///
    /// As setsockopt(2).
    pub fn set_timeouts(&self) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => {
                socket.set_nodelay(true)?;
                socket.set_read_timeout(Some(TICK)).and_then(|()| socket.set_write_timeout(Some(TICK)))
            }
            Self::Unix(socket) => {
                socket.set_read_timeout(Some(TICK)).and_then(|()| socket.set_write_timeout(Some(TICK)))
            }
        }
    }

    fn shutdown(&self) {
        // An error means that the socket was not connected any more.
        let _ = match self {
            Self::Tcp(socket) => socket.shutdown(Shutdown::Both),
            Self::Unix(socket) => socket.shutdown(Shutdown::Both),
        };
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match *self {
            Socket::Tcp(socket) => (&*socket).read(buf),
            Socket::Unix(socket) => (&*socket).read(buf),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match *self {
            Socket::Tcp(socket) => (&*socket).write(buf),
            Socket::Unix(socket) => (&*socket).write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket as `Read` and `Write` with a deadline.
struct UntilDeadline<'a> {
    socket: &'a Socket,
    deadline: Instant,
}

impl UntilDeadline<'_> {
    /// Repeats a system call that the timeout or a signal interrupted, until the deadline. Progress does not extend the
    /// deadline: a server that sends a byte now and then must not delay a caller for longer.
    fn retry<T>(&self, ready: PollFlags, mut io: impl FnMut(&Socket) -> io::Result<T>) -> io::Result<T> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left < TICK {
                wait(self.socket, ready, self.deadline)?;
            }
            match io(self.socket) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                result => return result,
            }
        }
    }
}

/// Waits until the socket is ready or the deadline is over.
fn wait(socket: &Socket, ready: PollFlags, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        if !poll_once(socket, ready, left)?.is_empty() {
            return Ok(());
        }
    }
}

/// Waits until the socket is ready, for `left` or one [`TICK`], whichever is shorter. Returns what it is ready for.
fn poll_once(socket: &Socket, ready: PollFlags, left: Duration) -> io::Result<PollFlags> {
    // At least one millisecond, the unit of poll(2).
    let timeout = left.clamp(Duration::from_millis(1), TICK);
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::ZERO);
    let mut sockets = [PollFd::new(socket.as_fd(), ready)];
    match poll(&mut sockets, timeout) {
        Ok(0) | Err(nix::errno::Errno::EINTR) => Ok(PollFlags::empty()),
        Ok(_) => Ok(sockets[0].revents().unwrap_or(ready)),
        Err(error) => Err(error.into()),
    }
}

/// A socket as `Write` without waiting.
struct WithoutWaiting<'a>(&'a Socket);

impl Write for WithoutWaiting<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        Ok(sendmsg::<()>(self.0.as_fd().as_raw_fd(), bufs, &[], flags, None)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The error of a wait that reached its deadline.
fn late() -> io::Error {
    io::Error::new(ErrorKind::TimedOut, "the server does not answer in time")
}

impl Read for UntilDeadline<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.retry(PollFlags::POLLIN, |mut socket| socket.read(buf))
    }
}

impl Write for UntilDeadline<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.retry(PollFlags::POLLOUT, |mut socket| socket.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A byte stream to a server.
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
    tls: Option<Mutex<ClientConnection>>,
}

impl Stream {
    /// A stream without TLS.
    pub fn new(socket: Socket) -> Self {
        Self { socket, tls: None }
    }

    /// Starts TLS on the stream, and completes the TLS handshake.
    ///
    /// # Errors
    ///
    /// The server's certificate is not accepted, the server has no TLS, or it does not answer before `deadline`.
    pub fn encrypt(self, mut tls: ClientConnection, deadline: Instant) -> io::Result<Self> {
        let mut until = UntilDeadline { socket: &self.socket, deadline };
        while tls.is_handshaking() {
            if Instant::now() >= deadline {
                return Err(late());
            }
            tls.complete_io(&mut until)?;
        }
        Ok(Self { socket: self.socket, tls: Some(Mutex::new(tls)) })
    }

    /// Reads up to `buf.len()` bytes. Zero is the end of the stream. Only one thread may read at a time.
    ///
    /// # Errors
    ///
    /// The connection failed, or no byte arrived before `deadline`.
    pub fn read(&self, buf: &mut [u8], deadline: Instant) -> io::Result<usize> {
        match &self.tls {
            None => UntilDeadline { socket: &self.socket, deadline }.read(buf),
            Some(tls) => self.read_tls(tls, buf, deadline),
        }
    }

    /// Reads exactly `buf`.
    ///
    /// # Errors
    ///
    /// As [`Stream::read`], or the stream ended first.
    pub fn read_exact(&self, mut buf: &mut [u8], deadline: Instant) -> io::Result<()> {
        while !buf.is_empty() {
            match self.read(buf, deadline)? {
                0 => return Err(io::Error::new(ErrorKind::UnexpectedEof, "the server closed the connection")),
                count => buf = &mut buf[count..],
            }
        }
        Ok(())
    }

    /// Writes all of `bytes`. The caller makes sure that only one thread writes at a time.
    ///
    /// # Errors
    ///
    /// The connection failed, or not all bytes were sent before `deadline`.
    pub fn write_all(&self, bytes: &[u8], deadline: Instant) -> io::Result<()> {
        let mut until = UntilDeadline { socket: &self.socket, deadline };
        let Some(tls) = &self.tls else { return until.write_all(bytes) };
        let mut tls = lock(tls);
        tls.writer().write_all(bytes)?;
        send(&mut tls, &mut until)
    }

    /// Takes bytes from the front of `parts`, as many as are accepted without waiting, and returns their number. TLS may still
    /// have to send some of them: see [`Stream::send_taken`]. The caller makes sure that only one thread writes at a time.
    ///
    /// No lock is held during a wait, so that another thread, or this one, can receive: a server that cannot send its replies
    /// may receive nothing.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when no byte is accepted now, or the connection failed.
    pub fn take_some(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(tls) = &self.tls else { return WithoutWaiting(&self.socket).write_vectored(parts) };
        let mut tls = lock(tls);
        send(&mut tls, &mut WithoutWaiting(&self.socket))?;
        tls.writer().write_vectored(parts)
    }

    /// Sends what [`Stream::take_some`] has taken.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when not all of it can be sent without waiting, or the connection failed.
    pub fn send_taken(&self) -> io::Result<()> {
        match &self.tls {
            None => Ok(()),
            Some(tls) => send(&mut lock(tls), &mut WithoutWaiting(&self.socket)),
        }
    }

    /// Waits until bytes can be sent or, with `or_read`, received, for `left` or one [`TICK`], whichever is shorter. Returns
    /// whether some can be received.
    ///
    /// # Errors
    ///
    /// As poll(2).
    pub fn wait_to_send(&self, or_read: bool, left: Duration) -> io::Result<bool> {
        let ready = if or_read { PollFlags::POLLOUT | PollFlags::POLLIN } else { PollFlags::POLLOUT };
        Ok(poll_once(&self.socket, ready, left)?.contains(PollFlags::POLLIN))
    }

    /// Whether the server has closed its end. It may have sent bytes before, which were not received yet.
    pub fn is_hung_up(&self) -> bool {
        let hung_up = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let mut sockets = [PollFd::new(self.socket.as_fd(), hung_up)];
        poll(&mut sockets, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Whether a short message can be sent without waiting, if no other thread sends. A Unix socket has room for three times
    /// as much as was sent and not received then (`unix_writable` of `net/unix/af_unix.c`).
    pub fn accepts_more(&self) -> bool {
        let mut sockets = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
        poll(&mut sockets, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Writes the bytes that the socket accepts without waiting, and drops the rest. For the last message of a
    /// connection.
    pub fn write_without_waiting(&self, bytes: &[u8]) {
        let mut now = WithoutWaiting(&self.socket);
        let _ = match &self.tls {
            None => now.write_all(bytes),
            Some(tls) => {
                let mut tls = lock(tls);
                tls.writer().write_all(bytes).and_then(|()| {
                    tls.send_close_notify();
                    send(&mut tls, &mut now)
                })
            }
        };
    }

    /// Ends the connection, and with it every wait for it.
    pub fn shutdown(&self) {
        self.socket.shutdown();
    }

    /// Reads through TLS. The wait for the socket is without the lock, so that other threads can send.
    fn read_tls(&self, tls: &Mutex<ClientConnection>, buf: &mut [u8], deadline: Instant) -> io::Result<usize> {
        let mut until = UntilDeadline { socket: &self.socket, deadline };
        loop {
            {
                let mut tls = lock(tls);
                match tls.reader().read(buf) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    result => return result,
                }
            }
            wait(&self.socket, PollFlags::POLLIN, deadline)?;
            let mut tls = lock(tls);
            // At the end of the stream, the reader above returns zero bytes in the next iteration.
            tls.read_tls(&mut until)?;
            tls.process_new_packets().map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
            match send(&mut tls, &mut WithoutWaiting(&self.socket)) {
                // They are sent before the next message. A wait for the server would be one with the lock.
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                result => result?,
            }
        }
    }
}

/// Sends the records that TLS has ready. The caller holds the lock, since records must be sent in their order.
fn send(tls: &mut ClientConnection, socket: &mut dyn Write) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(socket)?;
    }
    Ok(())
}

fn lock(tls: &Mutex<ClientConnection>) -> MutexGuard<'_, ClientConnection> {
    tls.lock().unwrap_or_else(PoisonError::into_inner)
}
