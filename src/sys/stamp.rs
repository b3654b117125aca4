//! Stamps of files: what stat(2) says of a file, as evidence that it was not written since.
//!
//! The kernel takes the times of a file from a clock that moves by ticks of 1 to 10 ms (`current_time` and
//! `inode_set_ctime_current` of `fs/inode.c`). Two writes within one tick leave one time. So a stamp is evidence only when
//! it is settled: the times were older than the clock by two ticks when they were read, so that every later write gives
//! later ones. Since Linux 6.13 most local file systems take a fine time for a change that follows a stat; that makes
//! nothing worse.
//!
//! A clock that is set back gives old times again, and a file server has a clock of its own: neither proves anything.
#![allow(unsafe_code)]

use std::fs::{File, Metadata};
use std::hash::{Hash, Hasher};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, TimerSetTimeFlags};
use nix::sys::timerfd::{ClockId as TimerClock, TimerFd, TimerFlags};
use nix::time::{ClockId, clock_getres, clock_gettime};
use nix::unistd::read;

/// File systems whose times come from the clock of this machine.
const LOCAL: [FsType; 4] = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC];

/// The age from which times prove something on file systems that keep whole seconds only (ext3, or ext4 with small
/// inodes).
const WHOLE_SECONDS: Duration = Duration::from_secs(2);

/// `F_SETSIG` of `include/uapi/asm-generic/fcntl.h`.
const F_SETSIG: libc::c_int = 10;

/// What stat(2) said of an open file, and whether that is evidence.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    seen: Seen,
    /// `None` when a later write may leave the same times.
    steps: Option<u64>,
    /// How long the times must become older before they prove anything.
    too_young_by: Duration,
}

/// What moves when a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Seen {
    device: u64,
    inode: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Seen {
    fn of(stat: &Metadata) -> Self {
        Self {
            device: stat.dev(),
            inode: stat.ino(),
            size: stat.size(),
            mtime: (stat.mtime(), stat.mtime_nsec()),
            ctime: (stat.ctime(), stat.ctime_nsec()),
        }
    }
}

impl Stamp {
    /// The stamp of a file now.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn of(file: &File) -> io::Result<Self> {
        let steps = clock_steps();
        // Before the stat: a write that the stat does not show gets this time or a later one.
        let clock = clock_gettime(ClockId::CLOCK_REALTIME_COARSE)?;
        let seen = Seen::of(&file.metadata()?);
        // The change time alone: it cannot be set but by setting the clock, and every write moves it.
        let must_be = if seen.ctime.1 == 0 { WHOLE_SECONDS } else { tick()? * 2 };
        // A fine time may be later than the clock of ticks.
        let too_young_by = since_1970(seen.ctime).saturating_add(must_be).saturating_sub(clock.into());
        let is_local = fstatfs(file).is_ok_and(|stat| LOCAL.contains(&stat.filesystem_type()));
        Ok(Self { seen, steps: steps.filter(|_| is_local && too_young_by.is_zero()), too_young_by })
    }

    /// The stamp of a file as soon as it is settled, or soon if it never is. `file` must be open for reading only.
    ///
    /// It proves nothing when the file is open for writing or mapped shared and writable: the kernel moves the times when a
    /// write begins, so one that is under way would end unseen.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn settled(file: &File) -> io::Result<Self> {
        let stamp = Self::soon_settled(file)?;
        // After the stat: a write that begins from here on moves the times.
        Ok(Self { steps: stamp.steps.filter(|_| has_no_writer(file)), ..stamp })
    }

    fn soon_settled(file: &File) -> io::Result<Self> {
        let mut stamp = Self::of(file)?;
        for _ in 0..3 {
            if stamp.is_settled() || stamp.too_young_by.is_zero() || stamp.too_young_by > WHOLE_SECONDS * 2 {
                break;
            }
            // The clock of ticks shows it at its next tick.
            thread::sleep(stamp.too_young_by + tick()?);
            stamp = Self::of(file)?;
        }
        Ok(stamp)
    }

    /// Whether it can prove anything.
    pub fn is_settled(&self) -> bool {
        self.steps.is_some()
    }

    /// Whether it is proven that nobody wrote to the file since, where `file` is the one that the stamp is of.
    pub fn proves_unchanged(&self, file: &File) -> bool {
        // The clock after the stat: it was not set before anything that the stat shows.
        self.looks_unchanged(file) && self.is_settled() && clock_steps() == self.steps
    }

    /// Whether nothing is seen of a write. One within a tick of the stamp may not be.
    pub fn looks_unchanged(&self, file: &File) -> bool {
        file.metadata().is_ok_and(|stat| Seen::of(&stat) == self.seen)
    }
}

/// Stamps of equal hashes are of a file that was not written in between; one that proves nothing is like no other.
impl Hash for Stamp {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        static UNSETTLED: AtomicU64 = AtomicU64::new(0);
        match self.steps {
            Some(steps) => (0, steps, self.seen).hash(hasher),
            None => (1, UNSETTLED.fetch_add(1, Ordering::Relaxed)).hash(hasher),
        }
    }
}

/// Whether no descriptor of a file can write to it, and no shared mapping: only then does the kernel give a lease for
/// reading (`fs/locks.c: check_conflicting_open`). The lease is given back at once. Not every file system has leases, and
/// those on files of other users need CAP_LEASE: then nothing is known.
fn has_no_writer(file: &File) -> bool {
    // An open for writing that comes just now sends a signal. This one is ignored where nothing else is said.
    // SAFETY: F_SETSIG takes a number and touches no memory of this process.
    if unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) } != 0 {
        return false;
    }
    // SAFETY: F_SETLEASE takes a number and touches no memory of this process.
    let lease = |kind: libc::c_int| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) } == 0;
    lease(libc::F_RDLCK) && lease(libc::F_UNLCK)
}

/// The time of now, later than every time that this function gave before: a clock of ticks gives one time to many
/// moments, and a clock can be set back.
pub fn later_than_before() -> SystemTime {
    static LAST: Mutex<SystemTime> = Mutex::new(SystemTime::UNIX_EPOCH);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    *last = SystemTime::now().max(*last + Duration::from_nanos(1));
    *last
}

/// How often the clock was set since the first call; `None` when that cannot be known.
fn clock_steps() -> Option<u64> {
    static TIMER: Mutex<Option<TimerFd>> = Mutex::new(None);
    static STEPS: AtomicU64 = AtomicU64::new(0);
    let mut timer = TIMER.lock().unwrap_or_else(PoisonError::into_inner);
    if timer.is_none() {
        // A failure, such as too few descriptors, may be gone at the next call.
        *timer = Some(cancelled_when_set().ok()?);
    }
    match read(timer.as_ref()?, &mut [0; 8]) {
        Err(Errno::EAGAIN) => Some(STEPS.load(Ordering::SeqCst)),
        Err(Errno::ECANCELED) => Some(STEPS.fetch_add(1, Ordering::SeqCst) + 1),
        _ => None,
    }
}

/// A timer that never fires, and whose reads fail once with ECANCELED each time that the clock was set (timerfd_create(2),
/// `timerfd_clock_was_set` of `fs/timerfd.c`): by hand, by NTP in a step, by a leap second.
fn cancelled_when_set() -> nix::Result<TimerFd> {
    const NEVER: TimeSpec = TimeSpec::new(1 << 33, 0);
    let timer = TimerFd::new(TimerClock::CLOCK_REALTIME, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
    let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
    timer.set(Expiration::OneShot(NEVER), flags)?;
    Ok(timer)
}

/// The step of the clock that file systems take times from.
fn tick() -> io::Result<Duration> {
    static TICK: OnceLock<Duration> = OnceLock::new();
    if let Some(tick) = TICK.get() {
        return Ok(*tick);
    }
    let tick = clock_getres(ClockId::CLOCK_REALTIME_COARSE)?;
    Ok(*TICK.get_or_init(|| tick.into()))
}

/// A time of stat(2) as a duration since 1970; one before that is old in any case.
fn since_1970((seconds, nanoseconds): (i64, i64)) -> Duration {
    let part = |number: i64| u64::try_from(number).unwrap_or(0);
    Duration::from_secs(part(seconds)).saturating_add(Duration::from_nanos(part(nanoseconds)))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs::FileTimes;
    use std::hash::{BuildHasher, RandomState};
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn no_write_after_a_settled_stamp_goes_unseen() {
        let file = tempfile::tempfile().unwrap();
        for round in 0..300_u32 {
            file.write_all_at(&round.to_ne_bytes(), 0).unwrap();
            let young = Stamp::of(&file).unwrap();
            file.write_all_at(&round.to_be_bytes(), 0).unwrap();
            assert!(!young.proves_unchanged(&file), "round {round}, by a young stamp");
            if round % 10 == 0 {
                let settled = Stamp::soon_settled(&file).unwrap();
                assert!(settled.is_settled() && settled.proves_unchanged(&file), "round {round}: {settled:?}");
                file.write_all_at(&round.to_be_bytes(), 0).unwrap();
                assert!(!settled.looks_unchanged(&file), "round {round}");
            }
        }
    }

    /// The times move when a write begins: one that is under way when the stamp is taken ends unseen.
    #[test]
    fn a_file_that_is_open_for_writing_proves_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let reader = File::open(file.path()).unwrap();
        file.as_file().write_all_at(b"1", 0).unwrap();
        assert!(!Stamp::settled(&reader).unwrap().is_settled());
        let path = file.into_temp_path();
        assert!(Stamp::settled(&reader).unwrap().is_settled());
        let writer = File::options().write(true).open(&path).unwrap();
        assert!(!Stamp::settled(&reader).unwrap().is_settled());
        drop(writer);
    }

    #[test]
    fn unsettled_stamps_are_like_no_other() {
        let file = tempfile::tempfile().unwrap();
        let state = RandomState::new();
        file.write_all_at(b"1", 0).unwrap();
        let young = Stamp::of(&file).unwrap();
        let settled = Stamp::soon_settled(&file).unwrap();
        let hashes: HashSet<_> = [young, young, settled, settled].iter().map(|stamp| state.hash_one(stamp)).collect();
        assert_eq!(hashes.len(), if young.is_settled() { 1 } else { 3 });
    }

    #[test]
    fn a_modification_time_that_is_set_hides_no_write() {
        let file = tempfile::tempfile().unwrap();
        for time in [SystemTime::UNIX_EPOCH, SystemTime::now() + Duration::from_secs(1000)] {
            let times = FileTimes::new().set_modified(time);
            file.set_times(times).unwrap();
            let settled = Stamp::soon_settled(&file).unwrap();
            assert!(settled.is_settled(), "{settled:?}");
            file.write_all_at(b"1", 0).unwrap();
            file.set_times(times).unwrap();
            assert!(!settled.looks_unchanged(&file));
        }
    }

    #[test]
    fn no_two_times_are_the_same() {
        let times: Vec<_> = (0..1000).map(|_| later_than_before()).collect();
        assert!(times.is_sorted_by(|a, b| a < b));
    }
}
