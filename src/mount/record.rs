//! The record of a running daemon: a file that names its process, locked as long as it lives.
//!
//! umount(8) returns when the mount is gone, which is a moment before the daemon closed the device. Who must be sure
//! (see [`crate::mount::umount`]) finds the daemon by the `st_dev` of its mount and waits for its end.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Pid, geteuid};

use crate::mount::mountinfo::DeviceNumber;

/// A record held by this process; dropping it removes it.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    file: Flock<File>,
}

/// The directory of the records that the calling user may write: root's in /run, a user's in the session's directory.
/// `None` for a user without a session.
pub fn directory() -> Option<PathBuf> {
    let parent = if geteuid().is_root() { "/run".into() } else { PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?) };
    parent.is_absolute().then(|| parent.join("blkholefs"))
}

impl Record {
    /// Creates the record of the mount with `device` in `directory`, and removes those of daemons that were killed.
    ///
    /// # Errors
    /// When the directory cannot be written, or another process took the name again and again.
    pub fn create(directory: &Path, device: DeviceNumber) -> io::Result<Self> {
        const ATTEMPTS: u32 = 16;
        DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
        remove_stale(directory)?;
        let path = path(directory, device);
        for _ in 0..ATTEMPTS {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)?;
            let Ok(mut file) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
                // The number belongs to our mount now: an older daemon of the same number is at its end, and whoever
                // waits for it has its file open.
                fs::remove_file(&path).or_else(if_missing)?;
                continue;
            };
            // Between open and lock, somebody may have taken it for a stale one.
            if is_same(&file, &path) {
                file.set_len(0)?;
                writeln!(file, "{}", Pid::this())?;
                return Ok(Self { path, file });
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // Another daemon may have replaced it, see `create`.
        if is_same(&self.file, &self.path)
            && let Err(error) = fs::remove_file(&self.path)
        {
            log::debug!("{}: cannot remove: {error}", self.path.display());
        }
    }
}

/// The daemon that serves the mount with `device`, if it lives and left a record in `directory`.
pub fn daemon_of(directory: &Path, device: DeviceNumber) -> Option<Pid> {
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

/// The process that the text of a record names.
pub fn process_in(text: &str) -> Option<Pid> {
    text.trim_end().parse().ok().filter(|pid| *pid > 0).map(Pid::from_raw)
}

fn path(directory: &Path, device: DeviceNumber) -> PathBuf {
    directory.join(format!("{}-{}", device.major, device.minor))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

/// Removes the records of daemons that were killed.
///
/// # Errors
/// When the directory cannot be read or written.
pub fn remove_stale(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
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

    const DEVICE: DeviceNumber = DeviceNumber { major: 0, minor: 45 };

    #[test]
    fn a_record_lives_as_long_as_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new");
        assert_eq!(daemon_of(&dir, DEVICE), None);
        let record = Record::create(&dir, DEVICE).unwrap();
        assert_eq!(daemon_of(&dir, DEVICE), Some(Pid::this()));
        assert_eq!(daemon_of(&dir, DeviceNumber { minor: 46, ..DEVICE }), None);
        drop(record);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_daemon_left_is_removed_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["0-44", "0-45"] {
            fs::write(dir.path().join(name), "1\n").unwrap();
        }
        assert_eq!(daemon_of(dir.path(), DEVICE), None, "process 1 does not hold the lock");
        let _record = Record::create(dir.path(), DEVICE).unwrap();
        assert_eq!(daemon_of(dir.path(), DEVICE), Some(Pid::this()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_number_that_is_used_again_belongs_to_the_new_mount() {
        let dir = tempfile::tempdir().unwrap();
        let old = Record::create(dir.path(), DEVICE).unwrap();
        let new = Record::create(dir.path(), DEVICE).unwrap();
        drop(old);
        assert_eq!(daemon_of(dir.path(), DEVICE), Some(Pid::this()), "the old one left the new one alone");
        drop(new);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_record_that_is_garbage_names_nobody() {
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
