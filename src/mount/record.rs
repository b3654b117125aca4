//! Files in /run: the record of each daemon, and the lock of a mountpoint.
//!
//! A record contains the process id of the daemon, which locks it as long as it runs. Its name is the `st_dev` of the mount:
//! `umount.blkholefs` finds the daemon by it, and waits until the daemon has closed the device (see
//! [`crate::mount::release`]). The lock of a mountpoint is held while one daemon mounts there. Only the owner of the
//! directory can open these files, because a user who could lock them could block all mounts.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Pid, geteuid};

use crate::fs::TIMES_FILE;
use crate::sys::device::DeviceId;

/// The record of this process. Dropping it removes the file.
#[derive(Debug)]
pub struct MountRecord {
    path: PathBuf,
    file: Flock<File>,
}

/// How often the record is created again when another process removed the file before it was locked.
const ATTEMPTS: u32 = 16;

/// The lock of a mountpoint. No other process has it as long as this value exists.
#[derive(Debug)]
pub struct MountPointLock {
    path: PathBuf,
    file: Flock<File>,
}

impl MountPointLock {
    /// Waits for the lock of the mountpoint with these `st_dev` and `st_ino`.
    ///
    /// # Errors
    /// When `directory` cannot be written.
    pub fn wait(directory: &Path, (device, inode): (u64, u64)) -> io::Result<Self> {
        make(directory)?;
        let path = directory.join(format!("place-{device}-{inode}"));
        loop {
            let file = Flock::lock(open_own(&path)?, FlockArg::LockExclusive).map_err(|(_, e)| io::Error::from(e))?;
            // The process that held the lock before has removed the file, perhaps after it was opened here.
            if is_same(&file, &path) {
                return Ok(Self { path, file });
            }
        }
    }
}

impl Drop for MountPointLock {
    fn drop(&mut self) {
        // Removed while it is locked: a process that waits for the lock finds that the file is another one.
        remove_own(&self.file, &self.path);
    }
}

/// The directory of the calling user's records: in /run for root, in `$XDG_RUNTIME_DIR` for other users. `None` for a user
/// without a session.
pub fn directory() -> Option<PathBuf> {
    let parent = if geteuid().is_root() { "/run".into() } else { PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?) };
    parent.is_absolute().then(|| parent.join("blkholefs"))
}

impl MountRecord {
    /// Creates the record of the mount with `device` in `directory`, and removes the records of daemons that were killed.
    /// The file gets its name when it is complete and locked. It replaces the record of another daemon with this name: the
    /// kernel has reused the number, and a command that waits for that daemon has read the record already.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn create(directory: &Path, device: DeviceId) -> io::Result<Self> {
        make(directory)?;
        remove_stale(directory)?;
        let path = path(directory, device);
        let temporary = directory.join(format!(".new-{}", Pid::this()));
        for _ in 0..ATTEMPTS {
            fs::remove_file(&temporary).or_else(if_missing)?;
            match Self::create_as(&temporary, &path) {
                // Another process removed it as a stale record, before it was locked.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => return result,
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    fn create_as(temporary: &Path, path: &Path) -> io::Result<Self> {
        let file = open_own(temporary)?;
        let mut file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| io::Error::from(e))?;
        if let Err(error) = writeln!(file, "{}", Pid::this()).and_then(|()| fs::rename(temporary, path)) {
            fs::remove_file(temporary).or_else(if_missing)?;
            return Err(error);
        }
        Ok(Self { path: path.to_owned(), file })
    }
}

impl Drop for MountRecord {
    fn drop(&mut self) {
        // Another daemon may have replaced the record, see `create`.
        remove_own(&self.file, &self.path);
    }
}

fn remove_own(file: &File, path: &Path) {
    if is_same(file, path)
        && let Err(error) = fs::remove_file(path)
    {
        log::debug!("{}: cannot remove: {error}", path.display());
    }
}

fn make(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(directory)
}

fn open_own(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options.open(path)
}

/// The process id of the daemon that serves the mount with `device`; `None` without a record in `directory`, and when the
/// daemon has ended.
pub fn daemon_of(directory: &Path, device: DeviceId) -> Option<Pid> {
    const LONGEST: u64 = 16;
    let file = open(&path(directory, device)).ok()?;
    let mut text = String::new();
    (&file).take(LONGEST).read_to_string(&mut text).ok()?;
    let daemon = process_in(&text)?;
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Err((_, Errno::EWOULDBLOCK)) => Some(daemon),
        _ => None,
    }
}

/// Parses the text of a record.
pub fn process_in(text: &str) -> Option<Pid> {
    text.trim_end().parse().ok().filter(|pid| *pid > 0).map(Pid::from_raw)
}

fn path(directory: &Path, device: DeviceId) -> PathBuf {
    directory.join(format!("{}-{}", device.major, device.minor))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

/// Removes the records and locks of processes that were killed. The times of devices stay: no process keeps that file locked.
///
/// # Errors
/// When the directory cannot be read or written.
pub fn remove_stale(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        // It, and the file that replaces it.
        if path.file_stem() == Some(OsStr::new(TIMES_FILE)) {
            continue;
        }
        let Ok(file) = open(&path) else { continue };
        if let Ok(file) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            && is_same(&file, &path)
        {
            fs::remove_file(&path).or_else(if_missing)?;
        }
    }
    Ok(())
}

fn is_same(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn if_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: DeviceId = DeviceId { major: 0, minor: 45 };

    #[test]
    fn a_record_exists_as_long_as_its_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new");
        assert_eq!(daemon_of(&dir, DEVICE), None);
        let record = MountRecord::create(&dir, DEVICE).unwrap();
        assert_eq!(daemon_of(&dir, DEVICE), Some(Pid::this()));
        assert_eq!(daemon_of(&dir, DeviceId { minor: 46, ..DEVICE }), None);
        drop(record);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn the_record_of_a_killed_daemon_is_removed_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["0-44", "0-45"] {
            fs::write(dir.path().join(name), "1\n").unwrap();
        }
        assert_eq!(daemon_of(dir.path(), DEVICE), None, "process 1 does not hold the lock");
        let _record = MountRecord::create(dir.path(), DEVICE).unwrap();
        assert_eq!(daemon_of(dir.path(), DEVICE), Some(Pid::this()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_times_of_devices_are_not_stale() {
        let dir = tempfile::tempdir().unwrap();
        for name in [TIMES_FILE, "times.new", "0-45"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        remove_stale(dir.path()).unwrap();
        assert!(dir.path().join(TIMES_FILE).exists() && dir.path().join("times.new").exists());
        assert!(!dir.path().join("0-45").exists());
    }

    #[test]
    fn a_reused_number_is_that_of_the_new_mount() {
        let dir = tempfile::tempdir().unwrap();
        let old = MountRecord::create(dir.path(), DEVICE).unwrap();
        let new = MountRecord::create(dir.path(), DEVICE).unwrap();
        drop(old);
        assert_eq!(daemon_of(dir.path(), DEVICE), Some(Pid::this()), "dropping the old record keeps the new one");
        drop(new);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// Another process sees a record complete and locked, or not at all.
    #[test]
    fn a_record_appears_complete_among_others_that_remove_what_is_stale() {
        let dir = tempfile::tempdir().unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        remove_stale(dir.path()).unwrap();
                    }
                });
            }
            for _ in 0..500 {
                let record = MountRecord::create(dir.path(), DEVICE).unwrap();
                assert_eq!(daemon_of(dir.path(), DEVICE), Some(Pid::this()));
                drop(record);
                assert_eq!(daemon_of(dir.path(), DEVICE), None);
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn one_at_a_time_has_the_lock_of_a_mountpoint() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let lock = MountPointLock::wait(dir.path(), (1, 2)).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(lock);
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_record_that_is_garbage_names_no_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(dir.path(), DEVICE);
        for text in ["", "x", "-1\n", "0", "99999999999999999999999999"] {
            fs::write(&path, text).unwrap();
            let held = Flock::lock(File::open(&path).unwrap(), FlockArg::LockExclusive).unwrap();
            assert_eq!(daemon_of(dir.path(), DEVICE), None, "{text:?}");
            drop(held);
        }
    }
}
