//! The keeper: a process that takes the metadata snapshot of a pool and releases it.
//!
//! A metadata snapshot has no owner in the kernel and survives the process that took it. So the daemon does not take it
//! itself: it starts this program once more, as a keeper. The keeper takes the snapshot, reports that, and waits for
//! the end of its standard input, which is a pipe from the daemon. The pipe ends when the daemon closes it, and also
//! when the daemon is killed at any moment, inside any system call. Then the keeper releases the snapshot. A pool whose
//! metadata device is suspended blocks only the keeper.
//!
//! The keeper is a new program and not a fork of the daemon. A fork of a process with threads may call only
//! async-signal-safe functions, copies the page tables of all maps, and keeps the daemon's FUSE connection open.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use log::warn;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;

use super::MetaBlock;
use super::record::{
    DIRECTORY, PoolIdentity, RecordedStep, SnapshotRecord, held_root, log_leftover, recover_all, release,
};
use crate::error::{Error, ErrorKind, Result, plain};
use crate::sys::device::DeviceId;
use crate::sys::dm::Control;

/// The first argument of a keeper. The second one is the device number of the pool, `MAJOR:MINOR`. Without a second
/// one, the keeper releases what killed keepers left held in all pools, and ends.
pub const COMMAND: &str = "keep-metadata-snapshot";

/// What a keeper reports on its standard output, one line for each report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeeperReport {
    /// It took the snapshot, whose superblock is at this block: `held BLOCK`.
    Held(MetaBlock),
    /// Another process holds the snapshot: `busy`.
    Busy,
    /// It cannot take the snapshot: `failed REASON`.
    Failed(String),
    /// It no longer holds a snapshot: `released`.
    Released,
}

impl fmt::Display for KeeperReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held(root) => write!(f, "held {}", root.get()),
            Self::Busy => f.write_str("busy"),
            Self::Failed(reason) => write!(f, "failed {reason}"),
            Self::Released => f.write_str("released"),
        }
    }
}

impl KeeperReport {
    /// Parses a line without its newline.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "held" => rest.parse().ok().map(|root| Self::Held(MetaBlock::new(root))),
            "busy" => Some(Self::Busy),
            "failed" => Some(Self::Failed(rest.to_owned())),
            "released" => Some(Self::Released),
            _ => None,
        }
    }
}

/// Runs a keeper with the arguments after [`COMMAND`].
///
/// # Errors
/// When the arguments are not valid, or the system refuses what a keeper needs. Failures of the pool are reported as
/// [`KeeperReport::Failed`].
pub fn main(arguments: &[OsString]) -> Result<()> {
    let failed = |what: &str, error: io::Error| Error::new(ErrorKind::System, what).because(error);
    // A service manager sends signals to all processes of a service, and a terminal to all processes of a command. A
    // keeper must not end before it has released the snapshot.
    SigSet::all().thread_block().map_err(|error| failed("cannot block signals", error.into()))?;
    std::env::set_current_dir("/").map_err(|error| failed("cannot leave the directory", error))?;
    match arguments {
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
    let held = match HeldSnapshot::take(pool) {
        Ok(Some(held)) => held,
        Ok(None) => return report(&KeeperReport::Busy),
        Err(error) => return report(&KeeperReport::Failed(plain(&error))),
    };
    report(&KeeperReport::Held(held.root));
    // An error of the pipe means the same as its end.
    let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
    if held.release() {
        report(&KeeperReport::Released);
    }
}

/// Writes a report. Ignores errors, because the daemon may have ended.
fn report(report: &KeeperReport) {
    let _ = writeln!(io::stdout(), "{report}");
}

/// Whether the write end of the pipe is closed.
fn is_at_end(orders: &impl std::os::fd::AsFd) -> bool {
    let mut polled = [PollFd::new(orders.as_fd(), PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

/// The metadata snapshot of a pool, held by this process.
struct HeldSnapshot {
    control: Control,
    pool: DeviceId,
    identity: PoolIdentity,
    root: MetaBlock,
    record: SnapshotRecord,
}

impl HeldSnapshot {
    /// Takes the metadata snapshot of `pool`, for which the pool commits. `None` when another process holds it.
    fn take(pool: DeviceId) -> io::Result<Option<Self>> {
        let control = Control::open()?;
        let identity = PoolIdentity::of(pool)?;
        let Some(mut record) = SnapshotRecord::open(Path::new(DIRECTORY), &identity)? else { return Ok(None) };
        if !record.recover(&control, pool) {
            return Ok(None);
        }
        record.write(RecordedStep::Wanted)?;
        if let Err(error) = control.message(pool, "reserve_metadata_snap") {
            record.remove();
            return if error.raw_os_error() == Some(libc::EBUSY) { Ok(None) } else { Err(error) };
        }
        let root = held_root(&control, pool).and_then(|root| root.ok_or_else(|| io::ErrorKind::NotFound.into()));
        let root = root.and_then(|root| record.write(RecordedStep::Held(root)).map(|()| root));
        match root {
            Ok(root) => Ok(Some(Self { control, pool, identity, root, record })),
            Err(error) => {
                // This process took the snapshot above.
                match release(&control, pool) {
                    Ok(()) => record.remove(),
                    Err(error) => log_leftover(&identity.name, &error),
                }
                Err(error)
            }
        }
    }

    /// Releases the snapshot, unless the pool holds another one by now. Returns whether this process holds none any
    /// more.
    fn release(self) -> bool {
        let name = &self.identity.name;
        let result = PoolIdentity::of(self.pool).and_then(|identity| {
            // Another pool may have the device number by now. Its snapshot is not ours.
            let now = if identity == self.identity { held_root(&self.control, self.pool)? } else { None };
            if now == Some(self.root) {
                return release(&self.control, self.pool);
            }
            warn!("{name}: another program released the metadata snapshot while it was read");
            Ok(())
        });
        match &result {
            Ok(()) => self.record.remove(),
            Err(error) => log_leftover(name, error),
        }
        result.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_a_line_that_is_parsed_back() {
        let failed = KeeperReport::Failed("Operation not supported".to_owned());
        for report in [KeeperReport::Held(MetaBlock::new(112)), KeeperReport::Busy, failed, KeeperReport::Released] {
            assert_eq!(KeeperReport::parse(&report.to_string()), Some(report));
        }
        for line in ["", "held", "held x", "held -1", "running 0 tests"] {
            assert_eq!(KeeperReport::parse(line), None, "{line:?}");
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
