//! Whether the I/O counters of a device count everything: the switch `queue/iostats`.
//!
//! A request that is made while the switch is off is not counted. Looking at the switch now and then is not enough: it may
//! have been off in between. So the first look at a switch leaves an inotify watch on it, and a switch that was written to
//! since then proves nothing any more, for as long as this process lives: a request that was made while it was off may
//! still be under way.
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
use super::sysfs;

/// The first Linux whose device-mapper heeds the switch for devices that pass bios on ("dm: support turning off
/// block-core's io stats accounting", proposed in June 2023, when 6.4 took no new features any more).
const HEEDED_SINCE: (u32, u32) = (6, 5);

/// Marks in the release of kernels whose vendors take over much from later ones: Red Hat's and its clones, openEuler, SUSE.
const MIXED: [&str; 3] = [".el", ".oe", "-default"];

/// The watches of this process. They stay: there is one for each device that was ever looked at.
static WATCHES: Mutex<Option<Watches>> = Mutex::new(None);

/// The counters of a device, which count everything.
#[derive(Debug)]
pub struct Counting(Option<(File, Watch)>);

impl Counting {
    /// Says that a device counts everything, from a time before this returns.
    ///
    /// # Errors
    /// When the switch is off, or was written to since this process looked at it first, or cannot be watched.
    pub fn of(id: DeviceId) -> io::Result<Self> {
        if counts_always(id) {
            return Ok(Self(None));
        }
        // A partition has no queue of its own.
        let paths = ["queue/iostats", "../queue/iostats"].map(|name| sysfs::directory(id).join(name));
        let path = paths.iter().find(|path| path.exists()).ok_or(io::ErrorKind::NotFound)?;
        let switch = File::open(path)?;
        let watch = with_watches(|watches| watches.add(path))?;
        let counting = Self(Some((switch, watch)));
        if !counting.goes_on() {
            return Err(io::Error::other("they are switched off, or were switched (queue/iostats)"));
        }
        Ok(counting)
    }

    /// Whether the device has counted everything since this was made.
    pub fn goes_on(&self) -> bool {
        let Some((switch, watch)) = &self.0 else { return true };
        // The switch first: a later write to it is reported by the watch.
        is_on(switch) && with_watches(|watches| watches.is_untouched(*watch)).unwrap_or(false)
    }
}

fn is_on(switch: &File) -> bool {
    let mut text = [0; 8];
    matches!(switch.read_at(&mut text, 0), Ok(count) if text[..count].trim_ascii() == b"1")
}

/// Whether a device counts whatever its switch says: device-mapper up to Linux 6.4, where it passes bios on. Where it
/// passes requests on (multipath) the device has a `mq` directory, and heeds the switch.
fn counts_always(id: DeviceId) -> bool {
    static IGNORES: OnceLock<bool> = OnceLock::new();
    let ignores = || fs::read_to_string("/proc/sys/kernel/osrelease").is_ok_and(|release| ignores_the_switch(&release));
    sysfs::dm_name(id).is_some() && *IGNORES.get_or_init(ignores) && !sysfs::directory(id).join("mq").exists()
}

/// Whether a kernel is known to be older than the switch of device-mapper.
fn ignores_the_switch(release: &str) -> bool {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map(|word| word.parse::<u32>().ok());
    let (Some(Some(major)), Some(Some(minor))) = (numbers.next(), numbers.next()) else { return false };
    (major, minor) < HEEDED_SINCE && !MIXED.iter().any(|mark| release.contains(mark))
}

/// The number of an inotify watch. The kernel gives each number once (`fs/notify/inotify/inotify_user.c:
/// inotify_add_to_idr`).
type Watch = i32;

struct Watches {
    inotify: File,
    touched: BTreeSet<Watch>,
    /// Events were lost: no watch proves anything.
    lost: bool,
}

/// Does something with the watches, which are made at the first use.
fn with_watches<T>(work: impl FnOnce(&mut Watches) -> io::Result<T>) -> io::Result<T> {
    let mut watches = WATCHES.lock().unwrap_or_else(PoisonError::into_inner);
    if watches.is_none() {
        *watches = Some(Watches::new()?);
    }
    work(watches.as_mut().expect("made above"))
}

impl Watches {
    fn new() -> io::Result<Self> {
        // SAFETY: inotify_init1(2) takes flags only.
        let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel made this descriptor just now, for this caller alone.
        let inotify = unsafe { File::from_raw_fd(fd) };
        Ok(Self { inotify, touched: BTreeSet::new(), lost: false })
    }

    /// Watches a file. One that is watched already keeps its number.
    fn add(&mut self, path: &Path) -> io::Result<Watch> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: the path is a C string that lives over the call; the descriptor is open.
        match unsafe { libc::inotify_add_watch(self.inotify.as_raw_fd(), path.as_ptr(), libc::IN_MODIFY) } {
            watch if watch >= 0 => Ok(watch),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn is_untouched(&mut self, watch: Watch) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        loop {
            match self.inotify.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => self.note(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(!self.lost && !self.touched.contains(&watch))
    }

    /// Reads `struct inotify_event`s: a watch, a mask, a cookie, the length of the name, the name.
    fn note(&mut self, mut events: &[u8]) {
        const HEADER: usize = 16;
        while let Some(header) = events.first_chunk::<HEADER>() {
            let word = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
            if word(4) & libc::IN_Q_OVERFLOW != 0 {
                self.lost = true;
            }
            self.touched.insert(word(0).cast_signed());
            let name = usize::try_from(word(12)).unwrap_or(usize::MAX);
            events = events.get(HEADER.saturating_add(name)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_ignore_the_switch_of_device_mapper() {
        for (release, ignores) in [
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
            assert_eq!(ignores_the_switch(release), ignores, "{release}");
        }
    }

    #[test]
    fn a_file_that_was_written_to_once_is_touched_for_ever() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let other = tempfile::NamedTempFile::new().unwrap();
        let mut watches = Watches::new().unwrap();
        let [watch, beside] = [&file, &other].map(|file| watches.add(file.path()).unwrap());
        assert_eq!(watches.add(file.path()).unwrap(), watch, "one number for each file");
        fs::read(file.path()).unwrap();
        assert!(watches.is_untouched(watch).unwrap());
        fs::write(file.path(), "0").unwrap();
        assert!(!watches.is_untouched(watch).unwrap());
        assert!(!watches.is_untouched(watch).unwrap());
        assert!(watches.is_untouched(beside).unwrap());
        watches.note(&[[-1_i32, libc::IN_Q_OVERFLOW.cast_signed(), 0, 0].map(i32::to_ne_bytes).concat()].concat());
        assert!(!watches.is_untouched(beside).unwrap(), "events were lost");
        // Bytes that are no event are read without a panic.
        watches.note(&[255; 47]);
    }
}
