//! The process that takes a pool's metadata snapshot and releases it.
//!
//! A snapshot has no owner in the kernel and survives the process that took it. So the daemon does not take it itself: it
//! starts this program once more, as a keeper. The keeper takes the snapshot, reports it, and waits for the end of its
//! standard input, which is a pipe from the daemon. The pipe ends when the daemon closes it, and also when the daemon is
//! killed at any moment, inside any system call; then the keeper releases the snapshot. A pool whose metadata device is
//! suspended blocks the keeper alone.
//!
//! A new program, not a fork of the daemon: a fork of a process with threads may hardly call anything, would copy the
//! page tables of all maps, and would keep the daemon's FUSE connection open.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;

use log::warn;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;

use super::MetaBlock;
use super::record::{DIRECTORY, Identity, Record, Step, held_root, recover_all, release, tell_leftover};
use crate::error::{Error, ErrorKind, Result, plain};
use crate::sys::device::DeviceId;
use crate::sys::dm::Control;

/// The first word of a keeper's command line. The next one is the pool's number `MAJOR:MINOR`; without it, all that
/// killed keepers left held is released.
pub const COMMAND: &str = "keep-metadata-snapshot";

/// What a keeper reports, a line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The snapshot was taken; its superblock is there.
    Held(MetaBlock),
    /// Somebody else has it.
    Busy,
    /// It cannot be taken.
    Failed(String),
    /// Nothing is held any more.
    Released,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held(root) => write!(f, "held {}", root.get()),
            Self::Busy => f.write_str("busy"),
            Self::Failed(reason) => write!(f, "failed {reason}"),
            Self::Released => f.write_str("released"),
        }
    }
}

impl FromStr for Answer {
    type Err = ();

    fn from_str(line: &str) -> std::result::Result<Self, ()> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "held" => rest.parse().map(|root| Self::Held(MetaBlock::new(root))).map_err(|_| ()),
            "busy" => Ok(Self::Busy),
            "failed" => Ok(Self::Failed(rest.to_owned())),
            "released" => Ok(Self::Released),
            _ => Err(()),
        }
    }
}

/// Runs a keeper, from the words after [`COMMAND`].
///
/// # Errors
/// Of the command line and of the system. What goes wrong with the pool is in the answers.
pub fn main(words: &[OsString]) -> Result<()> {
    let failed = |what: &str, error: io::Error| Error::new(ErrorKind::System, what).because(error);
    // A service manager ends all processes of a service at once, and a terminal all processes of a command: this one ends
    // when its work is done.
    SigSet::all().thread_block().map_err(|error| failed("cannot block signals", error.into()))?;
    std::env::set_current_dir("/").map_err(|error| failed("cannot leave the directory", error))?;
    match words {
        [] => Control::open().map(|control| recover_all(&control)).map_err(|error| failed("cannot recover", error)),
        [pool] => {
            let pool = pool.to_str().and_then(|text| text.parse().ok());
            keep(pool.ok_or_else(|| Error::usage("not a device number"))?);
            Ok(())
        }
        _ => Err(Error::usage("one pool at a time")),
    }
}

fn keep(pool: DeviceId) {
    if is_at_end(&io::stdin()) {
        return;
    }
    let held = match Held::take(pool) {
        Ok(Some(held)) => held,
        Ok(None) => return report(&Answer::Busy),
        Err(error) => return report(&Answer::Failed(plain(&error))),
    };
    report(&Answer::Held(held.root));
    // An error is an end too.
    let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
    if held.release() {
        report(&Answer::Released);
    }
}

/// The daemon may be gone: then nobody reads it.
fn report(answer: &Answer) {
    let _ = writeln!(io::stdout(), "{answer}");
}

/// Whether the other side of the pipe is closed already.
fn is_at_end(orders: &impl std::os::fd::AsFd) -> bool {
    let mut polled = [PollFd::new(orders.as_fd(), PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

/// The metadata snapshot of a pool, held by this process.
struct Held {
    control: Control,
    pool: DeviceId,
    identity: Identity,
    root: MetaBlock,
    record: Record,
}

impl Held {
    /// Takes the metadata snapshot of `pool`, which commits first; `None` when somebody has it.
    fn take(pool: DeviceId) -> io::Result<Option<Self>> {
        let control = Control::open()?;
        let identity = Identity::of(pool)?;
        let Some(mut record) = Record::open(Path::new(DIRECTORY), &identity)? else { return Ok(None) };
        if !record.recover(&control, pool) {
            return Ok(None);
        }
        record.write(Step::Wanted)?;
        if let Err(error) = control.message(pool, "reserve_metadata_snap") {
            record.remove();
            return if error.raw_os_error() == Some(libc::EBUSY) { Ok(None) } else { Err(error) };
        }
        let root = held_root(&control, pool).and_then(|root| root.ok_or_else(|| io::ErrorKind::NotFound.into()));
        let root = root.and_then(|root| record.write(Step::Held(root)).map(|()| root));
        match root {
            Ok(root) => Ok(Some(Self { control, pool, identity, root, record })),
            Err(error) => {
                // It was taken a moment ago, by this process.
                match release(&control, pool) {
                    Ok(()) => record.remove(),
                    Err(error) => tell_leftover(&identity.name, &error),
                }
                Err(error)
            }
        }
    }

    /// Releases it, if it is still this one that is held; answers whether nothing of ours is held any more.
    fn release(self) -> bool {
        let name = &self.identity.name;
        let result = Identity::of(self.pool).and_then(|identity| {
            // Another pool may have got the number: what it holds is not ours.
            let now = if identity == self.identity { held_root(&self.control, self.pool)? } else { None };
            if now == Some(self.root) {
                return release(&self.control, self.pool);
            }
            warn!("{name}: somebody else released the metadata snapshot while it was read");
            Ok(())
        });
        match &result {
            Ok(()) => self.record.remove(),
            Err(error) => tell_leftover(name, error),
        }
        result.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_lines_that_are_read_back() {
        let failed = Answer::Failed("Operation not supported".to_owned());
        for answer in [Answer::Held(MetaBlock::new(112)), Answer::Busy, failed, Answer::Released] {
            assert_eq!(answer.to_string().parse(), Ok(answer));
        }
        for line in ["", "held", "held x", "held -1", "running 0 tests"] {
            assert_eq!(line.parse::<Answer>(), Err(()), "{line:?}");
        }
    }

    #[test]
    fn a_pipe_is_at_its_end_when_its_writer_is_gone() {
        let (reader, writer) = io::pipe().unwrap();
        assert!(!is_at_end(&reader));
        drop(writer);
        assert!(is_at_end(&reader));
    }
}
