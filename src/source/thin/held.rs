//! The metadata snapshot of a pool, as the daemon has it: for as long as one tree is read.
//!
//! There is one for each pool, on disk, without an owner; it outlives the process that took it, and while it is held the
//! pool can free nothing that it refers to. So a process of its own takes and releases it (see [`super::keeper`]), which
//! survives the daemon. The keeper's record is for the case that the keeper itself is killed.

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
use super::keeper::{Answer, COMMAND};
use super::record::{self, DIRECTORY, Identity};
use crate::error::plain;
use crate::sys::device::DeviceId;
use crate::sys::dm::Control;

/// The running program, whatever became of its file.
const PROGRAM: &str = "/proc/self/exe";
/// How long a keeper may take to take the snapshot.
const TAKE: Duration = Duration::from_secs(5);
/// How long it is waited for that it releases the snapshot; it goes on alone after that.
const RELEASE: Duration = Duration::from_secs(2);

/// The keepers that this process started.
struct Keepers {
    /// Whether the program is at its end: no snapshot is taken any more.
    ending: bool,
    /// Snapshots that are held, or are about to be.
    in_use: usize,
    /// Keepers that nothing depends on any more, and that had not ended.
    left: Vec<Keeper>,
}

static KEEPERS: Mutex<Keepers> = Mutex::new(Keepers { ending: false, in_use: 0, left: Vec::new() });
static FEWER: Condvar = Condvar::new();

fn keepers() -> MutexGuard<'static, Keepers> {
    KEEPERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For the end of the program: lets no thread take a snapshot any more, and waits a moment for those that are held. One
/// that a thread still reads is released by its keeper when this process is gone, and its pipes with it.
pub fn finish() {
    let deadline = Instant::now() + RELEASE;
    let mut keepers = keepers();
    keepers.ending = true;
    let waited = FEWER.wait_timeout_while(keepers, RELEASE, |keepers| keepers.in_use > 0);
    let mut left = std::mem::take(&mut waited.unwrap_or_else(PoisonError::into_inner).0.left);
    for keeper in &mut left {
        keeper.has_ended(deadline);
    }
}

/// Releases what killed processes left held, at the first call in this process, which waits that long for it. Only root
/// can read the directory of the records.
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

/// Counts a snapshot as in use.
struct InUse;

impl InUse {
    /// `None` at the end of the program.
    fn begin() -> Option<Self> {
        let mut keepers = keepers();
        // Those that ended since must not stay as zombies.
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
        FEWER.notify_all();
    }
}

/// The metadata snapshot of a pool, held by a keeper of this process. Dropping it releases it.
pub struct Snapshot {
    root: MetaBlock,
    keeper: Option<Keeper>,
    _in_use: InUse,
}

impl Snapshot {
    /// Takes the metadata snapshot of `pool`, which commits first; `None` when somebody has it, and when it takes too
    /// long.
    ///
    /// # Errors
    /// When no keeper can be started, or the pool does not give it (a pool that does not write its metadata cannot).
    pub fn reserve(control: &Control, pool: DeviceId) -> io::Result<Option<Self>> {
        // To its end, if that is soon: the keeper that recovers a pool has locked its record.
        recover_once(RELEASE);
        // What is held while no process of ours has a record is another tool's.
        if record::held_root(control, pool)?.is_some() && !record::exists(&Identity::of(pool)?) {
            return Ok(None);
        }
        let Some(in_use) = InUse::begin() else { return Ok(None) };
        let mut keeper = Keeper::start(&[&pool.to_string()])?;
        let answer = keeper.answer(Instant::now() + TAKE);
        if let Some(Answer::Held(root)) = answer {
            return Ok(Some(Self { root, keeper: Some(keeper), _in_use: in_use }));
        }
        // Without an answer it may wait for the pool.
        let patience = if answer.is_some() { RELEASE } else { Duration::ZERO };
        keeper.leave(Instant::now() + patience);
        match answer {
            Some(Answer::Failed(reason)) => Err(io::Error::other(reason)),
            _ => Ok(None),
        }
    }

    /// Where the snapshot's superblock is.
    pub fn root(&self) -> MetaBlock {
        self.root
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        let Some(mut keeper) = self.keeper.take() else { return };
        if !keeper.has_ended(Instant::now() + RELEASE) {
            keepers().left.push(keeper);
        } else if !keeper.has_released {
            // It was killed, or has said why it cannot.
            recover(Duration::ZERO);
        }
    }
}

/// A process that holds a metadata snapshot until its standard input ends.
struct Keeper {
    process: Child,
    orders: Option<ChildStdin>,
    answers: ChildStdout,
    /// What was read of an answer.
    line: Vec<u8>,
    /// Whether it has answered that nothing is held any more.
    has_released: bool,
}

impl Keeper {
    fn start(words: &[&str]) -> io::Result<Self> {
        let mut command = Command::new(PROGRAM);
        command.arg0("blkholefs").arg(COMMAND).args(words);
        // A group of its own: the terminal's signals end the daemon, not the keeper.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut process = command.spawn()?;
        let missing = || io::Error::from(io::ErrorKind::BrokenPipe);
        let orders = process.stdin.take();
        let answers = process.stdout.take().ok_or_else(missing)?;
        Ok(Self { process, orders, answers, line: Vec::new(), has_released: false })
    }

    /// Its next answer; `None` when it has ended without one, and when none came in time.
    fn answer(&mut self, deadline: Instant) -> Option<Answer> {
        loop {
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.line.drain(..=end).collect();
                return str::from_utf8(&line[..end]).ok()?.parse().ok();
            }
            let mut some = [0; 256];
            match self.read(&mut some, deadline) {
                Ok(count @ 1..) => self.line.extend_from_slice(&some[..count]),
                Ok(0) | Err(_) => return None,
            }
        }
    }

    fn read(&mut self, buffer: &mut [u8], deadline: Instant) -> io::Result<usize> {
        wait_readable(&self.answers, deadline)?;
        self.answers.read(buffer)
    }

    /// Closes its standard input, so that it releases what it holds, and waits until it has ended or the deadline has
    /// passed. Returns whether it has ended; no zombie stays then.
    fn has_ended(&mut self, deadline: Instant) -> bool {
        self.orders = None;
        while let Some(answer) = self.answer(deadline) {
            self.has_released |= answer == Answer::Released;
        }
        // Whatever else it writes: its last descriptor closes right before its end.
        loop {
            match self.read(&mut [0; 256], deadline) {
                Ok(0) => break,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
        // Fails with ECHILD where SIGCHLD is ignored: then there are no zombies.
        let _ = self.process.wait();
        true
    }

    /// Lets it go its own way: it releases what it holds as soon as it can.
    fn leave(mut self, deadline: Instant) {
        if !self.has_ended(deadline) {
            keepers().left.push(self);
        }
    }
}

/// Waits until there is something to read, or the writer is gone.
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
