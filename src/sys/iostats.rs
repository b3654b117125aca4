//! Whether the I/O counters of a device count all requests, which depends on its sysfs attribute `queue/iostats`.
//!
//! A request that is submitted while the attribute is 0 is not counted. It is not enough to read the attribute from time to
//! time, as it may have been 0 in between. So each attribute gets an inotify watch before it is first read. After a write to
//! the attribute, whatever its value, the counters of the device prove nothing until this process ends: a request that was
//! submitted while the attribute was 0 may still be in flight.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::device::DeviceId;
use super::sysfs::{self, StatFile};

/// The first version of Linux in which the attribute has an effect on bio-based device-mapper devices ("dm: support turning
/// off block-core's io stats accounting"). The patch was proposed in June 2023, after the merge window of 6.4.
const EFFECTIVE_SINCE: (u32, u32) = (6, 5);

/// Parts of the release names of kernels with many backported features, whose version number proves nothing: those of Red Hat
/// and its clones, openEuler and SUSE.
const BACKPORTING: [&str; 3] = [".el", ".oe", "-default"];

/// The watches of this process, one for each device on which [`CompleteAccounting::of`] was called. They are never removed.
static WATCHES: Mutex<Option<Watches>> = Mutex::new(None);

/// The observation that the I/O counters of a device count all requests. Without a file and a watch for a device whose
/// attribute has no effect.
#[derive(Debug)]
pub struct CompleteAccounting(Option<(File, WatchId)>);

impl CompleteAccounting {
    /// Starts the observation of a device. All requests are counted from some time during this call on.
    ///
    /// # Errors
    /// If the attribute is 0, if it was written to since this process first observed it, or if it cannot be watched.
    pub fn of(id: DeviceId) -> io::Result<Self> {
        if counts_always(id) {
            return Ok(Self(None));
        }
        // A partition has no `queue` directory. That of its disk applies.
        let paths = ["queue/iostats", "../queue/iostats"].map(|name| sysfs::directory(id).join(name));
        let path = paths.iter().find(|path| path.exists()).ok_or(io::ErrorKind::NotFound)?;
        let attribute = File::open(path)?;
        let watch = with_watches(|watches| watches.add(path))?;
        let accounting = Self(Some((attribute, watch)));
        if !accounting.holds() {
            return Err(io::Error::other("their attribute queue/iostats is 0, or was written to"));
        }
        Ok(accounting)
    }

    /// Whether the device has counted all requests since the observation was started.
    pub fn holds(&self) -> bool {
        let Some((attribute, watch)) = &self.0 else { return true };
        // The value is read first: the watch then covers any write after the read.
        is_on(attribute) && with_watches(|watches| watches.is_unwritten(*watch)).unwrap_or(false)
    }
}

/// Whether a device has I/O counters that count. Drivers without request queues need not count: `drivers/block/brd.c` and
/// `drivers/md/md-linear.c` do not, nor does native multipath of NVMe before Linux 6.4. Their counters are 0 for ever. Those of
/// another such device that was never used look the same. The counters of a zram device begin again at 0 when it is reset
/// (`zram_reset_device` of `drivers/block/zram/zram_drv.c`).
pub fn counts(id: DeviceId, stat: &StatFile) -> bool {
    if sysfs::directory(id).join("comp_algorithm").exists() {
        return false;
    }
    let has_queue = || ["mq", "../mq"].iter().any(|name| sysfs::directory(id).join(name).exists());
    has_queue() || sysfs::dm_name(id).is_some() || stat.is_moved().unwrap_or(false)
}

/// Whether the value of the attribute is 1.
fn is_on(attribute: &File) -> bool {
    let mut text = [0; 8];
    matches!(attribute.read_at(&mut text, 0), Ok(count) if text[..count].trim_ascii() == b"1")
}

/// Whether the attribute has no effect on a device: on bio-based device-mapper devices before Linux 6.5. A request-based
/// device-mapper device (multipath) has a directory `mq`, and the attribute has an effect on it.
fn counts_always(id: DeviceId) -> bool {
    static OLD_KERNEL: OnceLock<bool> = OnceLock::new();
    let is_old = || release().is_some_and(|release| is_older(&release));
    sysfs::dm_name(id).is_some() && *OLD_KERNEL.get_or_init(is_old) && !sysfs::directory(id).join("mq").exists()
}

/// Whether the kernel with this release name is known to be older than [`EFFECTIVE_SINCE`].
fn is_older(release: &str) -> bool {
    let is_older = version(release).is_some_and(|version| version < EFFECTIVE_SINCE);
    is_older && !BACKPORTING.iter().any(|mark| release.contains(mark))
}

/// The release name of the running kernel.
fn release() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/osrelease").ok()
}

/// The first two numbers of a release name.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map(|word| word.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// The oldest version of Linux whose bio-based device-mapper devices count each sector of a write exactly once, as was checked. In
/// 5.10 all of a request that is divided is counted first, and its rest subtracted after that.
const EXACT_SINCE: (u32, u32) = (6, 1);

/// Whether the counters of a bio-based device-mapper device grow by the number of sectors of each write, neither more nor less.
///
/// Only x86-64 adds to a counter in one instruction, which no interrupt divides (`percpu_add_op` of
/// `arch/x86/include/asm/percpu.h`). Where it is read, changed and written (`raw_cpu_generic_to_op` of
/// `include/asm-generic/percpu.h`), what an interrupt adds in between is lost.
pub fn counts_each_sector() -> bool {
    static EXACT: OnceLock<bool> = OnceLock::new();
    let is_new = || release().is_some_and(|release| version(&release).is_some_and(|version| version >= EXACT_SINCE));
    cfg!(target_arch = "x86_64") && *EXACT.get_or_init(is_new)
}

/// The number of an inotify watch. The kernel never reuses a number (`fs/notify/inotify/inotify_user.c: inotify_add_to_idr`).
type WatchId = i32;

/// An inotify instance with its watches.
struct Watches {
    inotify: File,
    /// The watches of files that were written to.
    written: BTreeSet<WatchId>,
    /// Whether events were lost, so that any file may have been written to.
    lost: bool,
}

/// Calls `work` with the watches of this process, which are created by the first call.
fn with_watches<T>(work: impl FnOnce(&mut Watches) -> io::Result<T>) -> io::Result<T> {
    let mut watches = WATCHES.lock().unwrap_or_else(PoisonError::into_inner);
    if watches.is_none() {
        *watches = Some(Watches::new()?);
    }
    work(watches.as_mut().expect("made above"))
}

impl Watches {
    fn new() -> io::Result<Self> {
        // SAFETY: inotify_init1(2) takes one integer and no pointers.
        let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above has opened this descriptor, and no other value owns it.
        let inotify = unsafe { File::from_raw_fd(fd) };
        Ok(Self { inotify, written: BTreeSet::new(), lost: false })
    }

    /// Watches a file for writes. If it is watched already, the result is the existing watch.
    fn add(&mut self, path: &Path) -> io::Result<WatchId> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: the path is NUL-terminated and lives longer than the call, and the descriptor stays open during the call.
        match unsafe { libc::inotify_add_watch(self.inotify.as_raw_fd(), path.as_ptr(), libc::IN_MODIFY) } {
            watch if watch >= 0 => Ok(watch),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn is_unwritten(&mut self, watch: WatchId) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        loop {
            match self.inotify.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => self.record(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(!self.lost && !self.written.contains(&watch))
    }

    /// Parses a sequence of `struct inotify_event`: the watch, a mask, a cookie, the length of the name, and the name.
    fn record(&mut self, mut events: &[u8]) {
        const HEADER: usize = 16;
        while let Some(header) = events.first_chunk::<HEADER>() {
            let word = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
            if word(4) & libc::IN_Q_OVERFLOW != 0 {
                self.lost = true;
            }
            self.written.insert(word(0).cast_signed());
            let name = usize::try_from(word(12)).unwrap_or(usize::MAX);
            events = events.get(HEADER.saturating_add(name)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_in_which_the_attribute_has_no_effect_on_device_mapper() {
        for (release, expected) in [
            ("5.10.0-46-amd64\n", true),
            ("6.1.176", true),
            ("5.15.0-105-generic", true),
            ("6.4.16", true),
            ("6.5.0", false),
            ("6.12.107+deb13-amd64", false),
            ("7.3.4", false),
            ("10.1", false),
            ("5.14.0-503.el9.x86_64", false),
            ("5.14.21-150500.55.7-default", false),
            ("5.10.0-216.0.0.115.oe2203sp4.x86_64", false),
            ("", false),
            ("6", false),
            ("x.y", false),
        ] {
            assert_eq!(is_older(release), expected, "{release}");
        }
    }

    #[test]
    fn a_file_that_was_written_to_once_counts_as_written_for_ever() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let other = tempfile::NamedTempFile::new().unwrap();
        let mut watches = Watches::new().unwrap();
        let [watch, beside] = [&file, &other].map(|file| watches.add(file.path()).unwrap());
        assert_eq!(watches.add(file.path()).unwrap(), watch, "each file has one watch");
        fs::read(file.path()).unwrap();
        assert!(watches.is_unwritten(watch).unwrap());
        fs::write(file.path(), "0").unwrap();
        assert!(!watches.is_unwritten(watch).unwrap());
        assert!(!watches.is_unwritten(watch).unwrap());
        assert!(watches.is_unwritten(beside).unwrap());
        watches.record(&[[-1_i32, libc::IN_Q_OVERFLOW.cast_signed(), 0, 0].map(i32::to_ne_bytes).concat()].concat());
        assert!(!watches.is_unwritten(beside).unwrap(), "events were lost");
        // Malformed events cause no panic.
        watches.record(&[255; 47]);
    }
}
