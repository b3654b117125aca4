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
use nix::unistd::{Pid, geteuid};

use super::message::{self, LONGEST};
use super::{at, new_socket};
use crate::fs::Status;

/// How long all daemons together have for their answers.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// How many daemons are asked at the same time: fewer than a process may have open descriptors by default.
const AT_ONCE: usize = 500;

/// A daemon that was asked.
pub struct Asked {
    /// What it answered.
    pub answer: io::Result<Status>,
    /// Its process id in the namespace of this process; the record has that in the namespace of the daemon. `Some(None)` if it
    /// has none here, and `None` if there was no connection.
    pub process: Option<Option<Pid>>,
}

/// The answers of the daemons with these sockets in `directory`, in their order.
///
/// Only the owner of the directory is asked: the answers of another user are not those of a daemon.
pub fn all(directory: &Path, sockets: &[String], timeout: Duration) -> Vec<Asked> {
    let is_own = fs::metadata(directory).is_ok_and(|directory| directory.uid() == geteuid().as_raw());
    let mut answers = Vec::new();
    for sockets in sockets.chunks(AT_ONCE) {
        let mut questions: Vec<_> = sockets
            .iter()
            .map(|name| match is_own {
                true => Question::new(directory, name),
                false => Question::ended(io::ErrorKind::PermissionDenied.into()),
            })
            .collect();
        wait(&mut questions, Instant::now() + timeout);
        answers.extend(questions.into_iter().map(Question::answer));
    }
    answers
}

/// The process id of a daemon in the namespace of this process, as [`Asked::process`]. It is not waited for.
pub fn process(directory: &Path, socket: &str) -> Option<Option<Pid>> {
    Question::new(directory, socket).process
}

/// One daemon that is asked.
struct Question {
    state: State,
    process: Option<Option<Pid>>,
}

enum State {
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
                true => Ok((UnixStream::from(socket), Some(peer.pid()).filter(|pid| *pid > 0).map(Pid::from_raw))),
                false => Err(io::ErrorKind::PermissionDenied.into()),
            }
        });
        match connected {
            Ok((stream, process)) => Self { state: State::Waiting(stream, Vec::new()), process: Some(process) },
            Err(error) => Self::ended(error),
        }
    }

    /// One that was not asked.
    fn ended(error: io::Error) -> Self {
        Self { state: State::Ended(Err(error)), process: None }
    }

    /// Reads what is there, once.
    fn read(&mut self) {
        let State::Waiting(stream, answer) = &mut self.state else { return };
        let mut part = [0; 16 << 10];
        match stream.read(&mut part) {
            Ok(0) => self.state = State::Ended(Ok(std::mem::take(answer))),
            Ok(_) if answer.len() > LONGEST => self.state = State::Ended(Err(io::ErrorKind::InvalidData.into())),
            Ok(count) => answer.extend_from_slice(&part[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => self.state = State::Ended(Err(error)),
        }
    }

    /// The answer; that of a daemon that has not ended it is late.
    fn answer(self) -> Asked {
        let answer = match self.state {
            State::Waiting(..) => Err(io::ErrorKind::TimedOut.into()),
            State::Ended(answer) => answer.and_then(|answer| match answer.is_empty() {
                true => Err(io::ErrorKind::UnexpectedEof.into()),
                false => message::parse(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into()),
            }),
        };
        Asked { answer, process: self.process }
    }
}

/// Reads until all daemons have answered, or the deadline is reached.
fn wait(questions: &mut [Question], deadline: Instant) {
    loop {
        let waiting: Vec<_> = questions
            .iter()
            .enumerate()
            .filter_map(|(index, question)| match &question.state {
                State::Waiting(stream, _) => Some((index, PollFd::new(stream.as_fd(), PollFlags::POLLIN))),
                State::Ended(_) => None,
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
