//! The metadata snapshot of a pool, which the daemon holds while it reads one mapping tree.
//!
//! A pool has at most one, on disk and without an owner. It survives the process that took it, and as long as it is
//! held the pool cannot free the blocks that it refers to. So a process that survives the daemon takes and releases it
//! (see [`super::keeper`]). If the keeper itself is killed, its record (see [`super::record`]) lets another process
//! release the snapshot.

use std::fs;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use log::debug;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::MetaBlock;
use super::keeper::{COMMAND, KeeperReport};
use super::record::{self, DIRECTORY, PoolIdentity};
use crate::error::plain;
use crate::sys::device::DeviceId;
use crate::sys::dm::Control;

/// The program that runs, even if its file was replaced or removed.
const PROGRAM: &str = "/proc/self/exe";
/// The longest time to wait until a keeper has taken the snapshot.
const TAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest time to wait until a keeper has released the snapshot. It goes on after that.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// The keepers that this process started.
struct Keepers {
    /// Whether the program ends, so that no snapshot may be taken.
    ending: bool,
    /// The number of snapshots that are held, or about to be taken.
    in_use: usize,
    /// Keepers that were still running when they were no longer needed.
    left: Vec<Keeper>,
}

static KEEPERS: Mutex<Keepers> = Mutex::new(Keepers { ending: false, in_use: 0, left: Vec::new() });
/// Notified when [`Keepers::in_use`] decreases.
static RELEASED: Condvar = Condvar::new();

fn keepers() -> MutexGuard<'static, Keepers> {
    KEEPERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Prepares the end of the program: no thread can take a snapshot any more, and those that are held are waited for, up
/// to two seconds. A snapshot that a thread still reads then is released by its keeper when this process ends,
/// which closes the pipe.
pub fn finish() {
    let deadline = Instant::now() + RELEASE_TIMEOUT;
    let mut keepers = keepers();
    keepers.ending = true;
    let waited = RELEASED.wait_timeout_while(keepers, RELEASE_TIMEOUT, |keepers| keepers.in_use > 0);
    let mut left = std::mem::take(&mut waited.unwrap_or_else(PoisonError::into_inner).0.left);
    for keeper in &mut left {
        keeper.has_ended(deadline);
    }
}

/// Releases the snapshots that killed processes left held. Only the first call in a process does so; it waits for up to
/// `wait`. Does nothing unless the caller is root, because only root can read the directory of the records.
pub fn recover_once(wait: Duration) {
    static RECOVERED: Once = Once::new();
    RECOVERED.call_once(|| recover(wait));
}

fn recover(wait: Duration) {
    if fs::read_dir(DIRECTORY).is_ok_and(|mut entries| entries.next().is_some()) {
        match Keeper::start(&[]) {
            Ok(keeper) => keeper.leave(Instant::now() + wait),
            Err(error) => debug!("cannot look for metadata snapshots that were left held: {}", plain(&error)),
        }
    }
}

/// Counts a snapshot as in use until it is dropped.
struct InUse;

impl InUse {
    /// `None` when the program ends.
    fn begin() -> Option<Self> {
        let mut keepers = keepers();
        // Waits for the keepers that ended, so that they do not stay as zombies.
        keepers.left.retain_mut(|keeper| !keeper.has_ended(Instant::now()));
        if keepers.ending {
            return None;
        }
        keepers.in_use += 1;
        Some(Self)
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        keepers().in_use -= 1;
        RELEASED.notify_all();
    }
}

/// The metadata snapshot of a pool, held by a keeper of this process. Dropping it releases it.
pub struct MetadataSnapshot {
    root: MetaBlock,
    keeper: Option<Keeper>,
    _in_use: InUse,
}

impl MetadataSnapshot {
    /// Takes the metadata snapshot of `pool`, for which the pool commits. `None` when another process holds it, or it
    /// takes longer than five seconds.
    ///
    /// # Errors
    /// When no keeper can be started, or the pool refuses: a pool that does not write its metadata does.
    pub fn reserve(control: &Control, pool: DeviceId) -> io::Result<Option<Self>> {
        // The keeper that recovers has the pool's record locked for a moment, so the next one waits for its end.
        recover_once(RELEASE_TIMEOUT);
        // A snapshot without a record was taken by another program.
        if record::held_root(control, pool)?.is_some() && !record::exists(&PoolIdentity::of(pool)?) {
            return Ok(None);
        }
        let Some(in_use) = InUse::begin() else { return Ok(None) };
        let mut keeper = Keeper::start(&[&pool.to_string()])?;
        let report = keeper.next_report(Instant::now() + TAKE_TIMEOUT);
        if let Some(KeeperReport::Held(root)) = report {
            return Ok(Some(Self { root, keeper: Some(keeper), _in_use: in_use }));
        }
        // A keeper without a report may wait for the pool, which can take very long.
        let wait = if report.is_some() { RELEASE_TIMEOUT } else { Duration::ZERO };
        keeper.leave(Instant::now() + wait);
        match report {
            Some(KeeperReport::Failed(reason)) => Err(io::Error::other(reason)),
            _ => Ok(None),
        }
    }

    /// The block of the snapshot's superblock.
    pub fn root(&self) -> MetaBlock {
        self.root
    }
}

impl Drop for MetadataSnapshot {
    fn drop(&mut self) {
        let Some(mut keeper) = self.keeper.take() else { return };
        if !keeper.has_ended(Instant::now() + RELEASE_TIMEOUT) {
            keepers().left.push(keeper);
        } else if !keeper.has_released {
            // It was killed, or could not release the snapshot and has logged why.
            recover(Duration::ZERO);
        }
    }
}

/// A process that holds a metadata snapshot until its standard input ends.
struct Keeper {
    process: Child,
    /// Its standard input. The keeper releases the snapshot when this is closed.
    stdin: Option<ChildStdin>,
    /// Its standard output, which it writes reports to.
    stdout: ChildStdout,
    /// The part of the next report that was read already.
    line: Vec<u8>,
    /// Whether it has reported [`KeeperReport::Released`].
    has_released: bool,
}

impl Keeper {
    fn start(arguments: &[&str]) -> io::Result<Self> {
        let mut command = Command::new(PROGRAM);
        command.arg0("blkholefs").arg(COMMAND).args(arguments);
        // A process group of its own, so that the terminal's signals do not reach the keeper.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut process = command.spawn()?;
        let missing = || io::Error::from(io::ErrorKind::BrokenPipe);
        let stdin = process.stdin.take();
        let stdout = process.stdout.take().ok_or_else(missing)?;
        Ok(Self { process, stdin, stdout, line: Vec::new(), has_released: false })
    }

    /// Its next report. `None` when it ends without one, or the deadline passes.
    fn next_report(&mut self, deadline: Instant) -> Option<KeeperReport> {
        loop {
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.line.drain(..=end).collect();
                return KeeperReport::parse(str::from_utf8(&line[..end]).ok()?);
            }
            let mut some = [0; 256];
            match self.read(&mut some, deadline) {
                Ok(count @ 1..) => self.line.extend_from_slice(&some[..count]),
                Ok(0) | Err(_) => return None,
            }
        }
    }

    fn read(&mut self, buffer: &mut [u8], deadline: Instant) -> io::Result<usize> {
        wait_readable(&self.stdout, deadline)?;
        self.stdout.read(buffer)
    }

    /// Closes its standard input, so that it releases the snapshot, and waits until it ends or the deadline passes.
    /// Returns whether it has ended; then no zombie is left.
    fn has_ended(&mut self, deadline: Instant) -> bool {
        self.stdin = None;
        while let Some(report) = self.next_report(deadline) {
            self.has_released |= report == KeeperReport::Released;
        }
        // The pipe is closed right before the process ends, so the rest of the output is skipped.
        loop {
            match self.read(&mut [0; 256], deadline) {
                Ok(0) => break,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
        // Fails with ECHILD if SIGCHLD is ignored. Then there are no zombies.
        let _ = self.process.wait();
        true
    }

    /// Closes its standard input and waits until the deadline. A keeper that still runs then is kept in
    /// [`Keepers::left`].
    fn leave(mut self, deadline: Instant) {
        if !self.has_ended(deadline) {
            keepers().left.push(self);
        }
    }
}

/// Waits until the pipe has something to read or its write end is closed.
///
/// # Errors
/// When the deadline passes, or as poll(2).
fn wait_readable(pipe: &impl AsFd, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, timeout) {
            Ok(0) if left.is_zero() => return Err(io::ErrorKind::TimedOut.into()),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
