//! Files in /run: the record of each daemon, and the lock of a mountpoint.
//!
//! A record contains the process id of the daemon, which locks it as long as it runs, and what it serves. Its name is the
//! `st_dev` of the mount: `umount.blkholefs` finds the daemon by it, and waits until the daemon has closed the device (see
//! [`crate::mount::release`]). The lock of a mountpoint is held while one daemon mounts there. Only the owner of the
//! directory can open these files, because a user who could lock them could block all mounts. Beside a record is the socket at
//! which the daemon answers how it does (see [`crate::mount::status`]). Its name has the process id in it, so that no other
//! daemon ever has the same one.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Pid, geteuid};

use crate::sys::device::DeviceId;

mod found;
mod text;

use found::Owned;
pub use found::{Record, list, socket_name};
pub use text::{Description, RecordText, escape, process_in};

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
    pub fn create(directory: &Path, device: DeviceId, description: Description) -> io::Result<Self> {
        make(directory)?;
        remove_stale(directory)?;
        let path = path(directory, device);
        let text = RecordText { daemon: Pid::this(), description: Some(description) }.format();
        let temporary = directory.join(format!(".new-{}", Pid::this()));
        for _ in 0..ATTEMPTS {
            fs::remove_file(&temporary).or_else(if_missing)?;
            match Self::create_as(&temporary, &path, &text) {
                // Another process removed it as a stale record, before it was locked.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => return result,
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    fn create_as(temporary: &Path, path: &Path, text: &[u8]) -> io::Result<Self> {
        let file = open_own(temporary)?;
        let mut file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| io::Error::from(e))?;
        if let Err(error) = file.write_all(text).and_then(|()| fs::rename(temporary, path)) {
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
    Record::read(directory, device).filter(|record| record.is_running).map(|record| record.text.daemon)
}

fn path(directory: &Path, device: DeviceId) -> PathBuf {
    directory.join(format!("{}-{}", device.major, device.minor))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

/// Removes the records, locks and sockets of processes that were killed, and no other file.
///
/// # Errors
/// When the directory cannot be read or written.
pub fn remove_stale(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        match path.file_name().and_then(Owned::parse) {
            // A daemon has its record before its socket, and keeps it for longer.
            Some(Owned::Socket(device, daemon)) if daemon_of(directory, device) != Some(daemon) => {
                fs::remove_file(&path).or_else(if_missing)?;
                continue;
            }
            Some(Owned::Socket(..)) | None => continue,
            Some(Owned::Record(_) | Owned::Lock) => {}
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

    fn create(directory: &Path) -> io::Result<MountRecord> {
        let description = Description { spec: "/dev/x".into(), directory: "/mnt".into(), options: "ro".into() };
        MountRecord::create(directory, DEVICE, description)
    }

    #[test]
    fn a_record_exists_as_long_as_its_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new");
        assert_eq!(daemon_of(&dir, DEVICE), None);
        let record = create(&dir).unwrap();
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
        let _record = create(dir.path()).unwrap();
        assert_eq!(daemon_of(dir.path(), DEVICE), Some(Pid::this()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn sockets_are_removed_with_their_daemons_and_other_files_stay() {
        use std::os::unix::net::UnixListener;
        let dir = tempfile::tempdir().unwrap();
        let names = || {
            let entries = fs::read_dir(dir.path()).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let record = create(dir.path()).unwrap();
        let own = socket_name(DEVICE, Pid::this());
        let killed =
            [socket_name(DEVICE, Pid::from_raw(1)), socket_name(DeviceId { minor: 46, ..DEVICE }, Pid::this())];
        for name in killed.iter().chain([&own]) {
            UnixListener::bind(dir.path().join(name)).unwrap();
        }
        let others = ["0-45.x.socket", "times", "times.new"];
        others.iter().for_each(|name| fs::write(dir.path().join(name), "").unwrap());
        remove_stale(dir.path()).unwrap();
        assert_eq!(names(), ["0-45", &own, others[0], others[1], others[2]]);
        drop(record);
        remove_stale(dir.path()).unwrap();
        assert_eq!(names(), others);
    }

    #[test]
    fn a_reused_number_is_that_of_the_new_mount() {
        let dir = tempfile::tempdir().unwrap();
        let old = create(dir.path()).unwrap();
        let new = create(dir.path()).unwrap();
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
                let record = create(dir.path()).unwrap();
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
