//! Asks daemons for their state, all at the same time.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{SockFlag, connect, getsockopt};
use nix::unistd::geteuid;

use super::message::{self, LONGEST};
use super::{at, new_socket};
use crate::fs::Status;

/// How long all daemons together have for their answers.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// How many daemons are asked at the same time: fewer than a process may have open descriptors by default.
const AT_ONCE: usize = 500;

/// The answers of the daemons with these sockets in `directory`, in their order.
///
/// Only the owner of the directory is asked: the answers of another user are not those of a daemon.
pub fn all(directory: &Path, sockets: &[String], timeout: Duration) -> Vec<io::Result<Status>> {
    let is_own = fs::metadata(directory).is_ok_and(|directory| directory.uid() == geteuid().as_raw());
    let mut answers = Vec::new();
    for sockets in sockets.chunks(AT_ONCE) {
        let mut questions: Vec<_> = sockets
            .iter()
            .map(|name| match is_own {
                true => Question::new(directory, name),
                false => Question::Ended(Err(io::ErrorKind::PermissionDenied.into())),
            })
            .collect();
        wait(&mut questions, Instant::now() + timeout);
        answers.extend(questions.into_iter().map(Question::answer));
    }
    answers
}

/// One daemon that is asked.
enum Question {
    Waiting(UnixStream, Vec<u8>),
    Ended(io::Result<Vec<u8>>),
}

impl Question {
    /// Connects. A daemon whose queue of connections is full is not waited for.
    fn new(directory: &Path, name: &str) -> Self {
        let connected = new_socket(SockFlag::SOCK_NONBLOCK).and_then(|socket| {
            at(directory, name, |address| Ok(connect(socket.as_raw_fd(), address)?))?;
            let peer = getsockopt(&socket, PeerCredentials)?;
            match peer.uid() == geteuid().as_raw() {
                true => Ok(UnixStream::from(socket)),
                false => Err(io::ErrorKind::PermissionDenied.into()),
            }
        });
        connected.map_or_else(|error| Self::Ended(Err(error)), |stream| Self::Waiting(stream, Vec::new()))
    }

    /// Reads what is there, once.
    fn read(&mut self) {
        let Self::Waiting(stream, answer) = self else { return };
        let mut part = [0; 16 << 10];
        match stream.read(&mut part) {
            Ok(0) => *self = Self::Ended(Ok(std::mem::take(answer))),
            Ok(_) if answer.len() > LONGEST => *self = Self::Ended(Err(io::ErrorKind::InvalidData.into())),
            Ok(count) => answer.extend_from_slice(&part[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => *self = Self::Ended(Err(error)),
        }
    }

    /// The answer; that of a daemon that has not ended it is late.
    fn answer(self) -> io::Result<Status> {
        match self {
            Self::Waiting(..) => Err(io::ErrorKind::TimedOut.into()),
            Self::Ended(answer) => match answer? {
                answer if answer.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
                answer => message::parse(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into()),
            },
        }
    }
}

/// Reads until all daemons have answered, or the deadline is reached.
fn wait(questions: &mut [Question], deadline: Instant) {
    loop {
        let waiting: Vec<_> = questions
            .iter()
            .enumerate()
            .filter_map(|(index, question)| match question {
                Question::Waiting(stream, _) => Some((index, PollFd::new(stream.as_fd(), PollFlags::POLLIN))),
                Question::Ended(_) => None,
            })
            .collect();
        let rest = deadline.saturating_duration_since(Instant::now());
        let (indices, mut polled): (Vec<_>, Vec<_>) = waiting.into_iter().unzip();
        if polled.is_empty() || rest.is_zero() {
            return;
        }
        // Rounded up: a rest of less than a millisecond would be none.
        let timeout = PollTimeout::try_from(rest + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let _ = poll(&mut polled, timeout);
        let is_ready = |polled: &PollFd<'_>| polled.any().unwrap_or(false);
        let ready: Vec<_> =
            indices.into_iter().zip(&polled).filter(|(_, polled)| is_ready(polled)).map(|(i, _)| i).collect();
        ready.into_iter().for_each(|index| questions[index].read());
    }
}
