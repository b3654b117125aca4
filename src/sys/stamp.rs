//! Stamps of files: a stamp is what stat(2) returns of a file. Equal stamps can prove that the file was not written in
//! between.
//!
//! The kernel takes the times of a file from the coarse clock, which advances in ticks of 1 to 10 ms (`current_time` and
//! `inode_set_ctime_current` of `fs/inode.c`). Two writes within one tick result in the same times. So a stamp is usable as
//! a proof only if it is settled: its change time must be older than the coarse clock by at least two ticks when it is taken,
//! so that every later write results in a later change time. Since Linux 6.13 most local file systems use a fine-grained
//! time for a change that follows a stat(2). This does not affect the argument.
//!
//! If the clock is set back, a later write can result in an old time again. A file server has a clock of its own. In both
//! cases stamps prove nothing.
#![allow(unsafe_code)]

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
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

/// File systems that take the times of files from the clock of this machine. `sys::file::Seeks::of` has the same file systems
/// for another property of them. A file system with one of the properties need not have the other one, so the lists are
/// separate.
const LOCAL_CLOCK: [FsType; 4] = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC];

/// The age at which a stamp is settled on file systems that store times in whole seconds (ext3, or ext4 with small inodes).
const WHOLE_SECONDS: Duration = Duration::from_secs(2);

/// `F_SETSIG` of `include/uapi/asm-generic/fcntl.h`.
const F_SETSIG: libc::c_int = 10;

/// The stamp of an open file.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    fields: StampFields,
    /// How often the clock had been set when the stamp was taken (see [`clock_steps`]). `None` if the stamp proves nothing.
    steps: Option<u64>,
    /// How much older the change time must become until the stamp is settled.
    too_young_by: Duration,
    /// Whether a write to a mapping of the file changes its times.
    has_mapped_writes: bool,
}

/// The state of a file that has a settled stamp. If it is the same later in this boot, the file was not written in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileState {
    fields: StampFields,
    /// See [`clock_offset`]: a clock that is set back could give old times again.
    clock: i64,
}

/// The fields of stat(2) that identify a file, and those that change when it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct StampFields {
    device: u64,
    inode: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl StampFields {
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
    /// The current stamp of a file.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn of(file: &File) -> io::Result<Self> {
        let steps = clock_steps();
        // The clock is read before the stat: a write that is not visible in the stat has this time or a later one.
        let clock = clock_gettime(ClockId::CLOCK_REALTIME_COARSE)?;
        let fields = StampFields::of(&file.metadata()?);
        // Only the change time counts. Every write updates it, and it cannot be set, other than by setting the clock.
        let settled_age = if fields.ctime.1 == 0 { WHOLE_SECONDS } else { tick()? * 2 };
        // A fine-grained change time can be later than the coarse clock.
        let too_young_by = since_1970(fields.ctime).saturating_add(settled_age).saturating_sub(clock.into());
        let kind = fstatfs(file).map(|stat| stat.filesystem_type());
        let is_local = kind.is_ok_and(|kind| LOCAL_CLOCK.contains(&kind));
        let steps = steps.filter(|_| is_local && too_young_by.is_zero());
        Ok(Self { fields, steps, too_young_by, has_mapped_writes: is_local && kind != Ok(TMPFS_MAGIC) })
    }

    /// The stamp of a file. Waits up to a few seconds until the stamp is settled. `file` must be open for reading only.
    ///
    /// The stamp proves nothing if the file is open for writing, or mapped shared and writable. The kernel updates the times
    /// at the start of a write. So a write that is in progress can change the file later without changing the times.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn settled(file: &File) -> io::Result<Self> {
        let stamp = Self::settled_in_time(file)?;
        // Checked after the stat: every write that starts later changes the times.
        Ok(Self { steps: stamp.steps.filter(|_| has_no_writer(file)), ..stamp })
    }

    /// Like [`Stamp::settled`], without the check for writers: it proves nothing of a write that is in progress now.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn settled_in_time(file: &File) -> io::Result<Self> {
        let mut stamp = Self::of(file)?;
        for _ in 0..3 {
            if stamp.is_settled() || stamp.too_young_by.is_zero() || stamp.too_young_by > WHOLE_SECONDS * 2 {
                break;
            }
            // One tick more, since the coarse clock can lag behind the real time by up to one tick.
            thread::sleep(stamp.too_young_by + tick()?);
            stamp = Self::of(file)?;
        }
        Ok(stamp)
    }

    /// The state of the file, to be compared by any process of this boot. `None` if the stamp is not settled.
    pub fn state(&self) -> Option<FileState> {
        let steps = self.steps?;
        let state = FileState { fields: self.fields, clock: clock_offset().ok()? };
        // The clock was not set since before the stat, so the offset is that of the stat.
        (clock_steps() == Some(steps)).then_some(state)
    }

    /// Whether a write to a mapping of the file changes its times. It does not on tmpfs (`shmem_vm_ops` of `mm/shmem.c` has no
    /// `page_mkwrite`), and is not known on other file systems.
    pub fn has_mapped_writes(&self) -> bool {
        self.has_mapped_writes
    }

    /// The change time, which each write moves, and which nobody can set. (The modification time can be set to the same one after
    /// a write.) A time before 1970 is taken for 1970.
    pub fn changed(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + since_1970(self.fields.ctime)
    }

    /// Whether the stamp can prove anything.
    fn is_settled(&self) -> bool {
        self.steps.is_some()
    }

    /// Whether it is proven that the file was not written since the stamp was taken. `file` must be the same file.
    pub fn proves_unchanged(&self, file: &File) -> bool {
        // The steps are counted after the stat, so that they include every step before a write that the stat shows.
        self.looks_unchanged(file) && self.is_settled() && clock_steps() == self.steps
    }

    /// Whether the file has the same stamp. A write within one tick of an unsettled stamp can go unnoticed.
    pub fn looks_unchanged(&self, file: &File) -> bool {
        file.metadata().is_ok_and(|stat| StampFields::of(&stat) == self.fields)
    }
}

/// Waits for the writes to a file that are under way. Its times change when a write begins, and when a page of a mapping is
/// written for the first time after it was written back. So a stamp that is taken after this covers the writes before it:
/// - writing back makes the next write to a page of a mapping a first one (`folio_clear_dirty_for_io`);
/// - a search and a read wait for a write(2) that goes through the page cache, because it holds the lock of the inode (the
///   search in ext4 and btrfs, the read in XFS).
///
/// It does not wait for direct writes: they hold no lock up to their end. Errors are ignored: they change no bytes.
pub fn finish_writes(file: &File) {
    let is_known = fstatfs(file).is_ok_and(|stat| LOCAL_CLOCK.contains(&stat.filesystem_type()));
    if is_known {
        let _ = super::file::write_through(file);
        let _ = super::file::next_data(file, crate::units::Bytes::ZERO);
        let _ = file.read_at(&mut [0], 0);
    }
}

/// The difference of the real-time clock and the monotonic clock, in nanoseconds. It changes when the clock is set, and by the
/// time that the machine was suspended for. It is constant otherwise, because both are slewed together
/// (`kernel/time/timekeeping.c: wall_to_monotonic`). The coarse clocks advance at the same ticks, so it is exact.
fn clock_offset() -> io::Result<i64> {
    let coarse = || clock_gettime(ClockId::CLOCK_REALTIME_COARSE);
    loop {
        let before = coarse()?;
        let monotonic = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)?;
        if coarse()? == before {
            let nanoseconds =
                |time: TimeSpec| time.tv_sec().saturating_mul(1_000_000_000).saturating_add(time.tv_nsec());
            return Ok(nanoseconds(before).saturating_sub(nanoseconds(monotonic)));
        }
    }
}

/// Whether there is no descriptor and no shared mapping through which the file can be written. Only then does the kernel grant
/// a read lease (`fs/locks.c: check_conflicting_open`). The lease is released immediately. Returns `false` if it is not
/// known: on a file system without leases, or for a file of another user without CAP_LEASE.
fn has_no_writer(file: &File) -> bool {
    // While the lease is held, an open for writing sends a signal. The default action of SIGURG is to ignore it.
    // SAFETY: F_SETSIG takes an integer and no pointers.
    if unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) } != 0 {
        return false;
    }
    // SAFETY: F_SETLEASE takes an integer and no pointers.
    let lease = |kind: libc::c_int| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) } == 0;
    lease(libc::F_RDLCK) && lease(libc::F_UNLCK)
}

/// The current time, or a time that is 1 ns later than the last result if that is later. So the results strictly increase even
/// if the clock is coarse or is set back.
pub fn increasing_now() -> SystemTime {
    static LAST: Mutex<SystemTime> = Mutex::new(SystemTime::UNIX_EPOCH);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    *last = SystemTime::now().max(*last + Duration::from_nanos(1));
    *last
}

/// How often the clock was set since the first call of this function. `None` if it is not known.
fn clock_steps() -> Option<u64> {
    static TIMER: Mutex<Option<TimerFd>> = Mutex::new(None);
    static STEPS: AtomicU64 = AtomicU64::new(0);
    let mut timer = TIMER.lock().unwrap_or_else(PoisonError::into_inner);
    if timer.is_none() {
        // A failure is not remembered: its reason, such as too few descriptors, may be temporary.
        *timer = Some(cancelled_when_set().ok()?);
    }
    match read(timer.as_ref()?, &mut [0; 8]) {
        Err(Errno::EAGAIN) => Some(STEPS.load(Ordering::SeqCst)),
        Err(Errno::ECANCELED) => Some(STEPS.fetch_add(1, Ordering::SeqCst) + 1),
        _ => None,
    }
}

/// A timer that never expires. After the clock was set, by a user, by a step of NTP or by a leap second, one read of it fails
/// with ECANCELED (timerfd_create(2), `timerfd_clock_was_set` of `fs/timerfd.c`).
fn cancelled_when_set() -> nix::Result<TimerFd> {
    const NEVER: TimeSpec = TimeSpec::new(1 << 33, 0);
    let timer = TimerFd::new(TimerClock::CLOCK_REALTIME, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
    let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
    timer.set(Expiration::OneShot(NEVER), flags)?;
    Ok(timer)
}

/// The resolution of the coarse clock.
fn tick() -> io::Result<Duration> {
    static TICK: OnceLock<Duration> = OnceLock::new();
    if let Some(tick) = TICK.get() {
        return Ok(*tick);
    }
    let tick = clock_getres(ClockId::CLOCK_REALTIME_COARSE)?;
    Ok(*TICK.get_or_init(|| tick.into()))
}

/// A time of stat(2) as a duration since 1970. An earlier time becomes zero, which is old enough for a settled stamp.
fn since_1970((seconds, nanoseconds): (i64, i64)) -> Duration {
    let part = |number: i64| u64::try_from(number).unwrap_or(0);
    Duration::from_secs(part(seconds)).saturating_add(Duration::from_nanos(part(nanoseconds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::fs::FileTimes;

    #[test]
    fn every_write_after_a_settled_stamp_is_noticed() {
        let file = tempfile::tempfile().unwrap();
        for round in 0..300_u32 {
            file.write_all_at(&round.to_ne_bytes(), 0).unwrap();
            let young = Stamp::of(&file).unwrap();
            file.write_all_at(&round.to_be_bytes(), 0).unwrap();
            assert!(!young.proves_unchanged(&file), "round {round}, by a young stamp");
            if round % 10 == 0 {
                let settled = Stamp::settled_in_time(&file).unwrap();
                assert!(settled.is_settled() && settled.proves_unchanged(&file), "round {round}: {settled:?}");
                file.write_all_at(&round.to_be_bytes(), 0).unwrap();
                assert!(!settled.looks_unchanged(&file), "round {round}");
            }
        }
    }

    /// The kernel updates the times at the start of a write, so that the stamp does not cover a write in progress.
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
    fn only_settled_stamps_have_a_state() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"1", 0).unwrap();
        let young = Stamp::of(&file).unwrap();
        assert_eq!(young.state().is_some(), young.is_settled());
        let [first, second] = [0; 2].map(|_| Stamp::settled_in_time(&file).unwrap().state());
        assert!(first.is_some() && first == second);
        file.write_all_at(b"1", 0).unwrap();
        assert_ne!(Stamp::settled_in_time(&file).unwrap().state(), first);
    }

    #[test]
    fn the_clock_has_one_offset_until_it_is_set() {
        let steps = clock_steps();
        let offsets: HashSet<_> = (0..10_000).map(|_| clock_offset().unwrap()).collect();
        assert!(offsets.len() == 1 || clock_steps() != steps, "{offsets:?}");
    }

    /// Of the writes to a dirty page of a mapping only the first one changes the times, until the page was written back.
    #[test]
    fn writes_to_a_mapping_change_the_times_after_those_before_it_are_finished() {
        let file = tempfile::Builder::new().tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        if !Stamp::of(file.as_file()).unwrap().has_mapped_writes() {
            return;
        }
        file.as_file().set_len(4096).unwrap();
        let map = map(file.as_file());
        for round in 0..3 {
            map(round);
            finish_writes(file.as_file());
            let stamp = Stamp::settled_in_time(file.as_file()).unwrap();
            assert!(stamp.is_settled() && stamp.looks_unchanged(file.as_file()));
            map(round + 1);
            assert!(!stamp.looks_unchanged(file.as_file()), "round {round}");
        }
    }

    /// Maps the first page of a file, and returns what writes a byte to it. The mapping stays until the process ends.
    fn map(file: &File) -> impl Fn(u8) {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: the mapping has 4096 bytes and is never unmapped.
        move |byte| unsafe { at.cast::<u8>().write_volatile(byte) }
    }

    #[test]
    fn setting_the_modification_time_hides_no_write() {
        let file = tempfile::tempfile().unwrap();
        for time in [SystemTime::UNIX_EPOCH, SystemTime::now() + Duration::from_secs(1000)] {
            let times = FileTimes::new().set_modified(time);
            file.set_times(times).unwrap();
            let settled = Stamp::settled_in_time(&file).unwrap();
            assert!(settled.is_settled(), "{settled:?}");
            file.write_all_at(b"1", 0).unwrap();
            file.set_times(times).unwrap();
            assert!(!settled.looks_unchanged(&file));
        }
    }

    #[test]
    fn no_two_times_are_the_same() {
        let times: Vec<_> = (0..1000).map(|_| increasing_now()).collect();
        assert!(times.is_sorted_by(|a, b| a < b));
    }
}
