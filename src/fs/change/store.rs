//! The file in which mounts share the times of devices. It is in memory (/run), so it ends with the boot whose states it has.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::records::{LONGEST_TEXT, Record, Records};
use crate::sys::boot::BootId;
use crate::sys::device::DeviceId;

/// The name of the file.
pub const NAME: &str = "times";

/// How often the lock is tried. A process that was stopped while it holds the lock must not stop others.
const ATTEMPTS: u32 = 50;
/// How long it is waited in between.
const PAUSE: Duration = Duration::from_millis(1);

/// The store of one directory.
pub(super) struct TimesStore {
    path: PathBuf,
    boot: BootId,
    /// The records that were read last, and what the file was then. Older records do no harm: a device does not return to an
    /// old state.
    read: Option<(Identity, Records)>,
}

/// The device, inode, length and time of a file. The file is replaced and never written to.
type Identity = (u64, u64, u64, i64, i64);

fn identity(file: &fs::Metadata) -> Identity {
    (file.dev(), file.ino(), file.len(), file.mtime(), file.mtime_nsec())
}

impl TimesStore {
    /// The store in that directory. `None` if the boot is not known.
    pub(super) fn new(directory: &Path) -> Option<Self> {
        Some(Self { path: directory.join(NAME), boot: BootId::current()?, read: None })
    }

    /// The record of a device, if there is one. A file that cannot be read has none.
    pub(super) fn get(&mut self, device: DeviceId) -> Option<Record> {
        let now = identity(&fs::symlink_metadata(&self.path).ok()?);
        if self.read.as_ref().is_none_or(|(identity, _)| *identity != now) {
            let mut options = OpenOptions::new();
            let file = options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&self.path).ok()?;
            self.read = Some(self.records(&file).ok()?);
        }
        self.read.as_ref()?.1.get(device)
    }

    fn records(&self, file: &File) -> io::Result<(Identity, Records)> {
        let metadata = file.metadata()?;
        let mut text = String::new();
        if metadata.is_file() {
            // One byte more than is allowed is refused. So is what is not UTF-8.
            let read = file.take(LONGEST_TEXT as u64 + 1).read_to_string(&mut text);
            read.or_else(|error| if error.kind() == io::ErrorKind::InvalidData { Ok(0) } else { Err(error) })?;
        }
        Ok((identity(&metadata), Records::parse(&text, self.boot)))
    }

    /// Adds records of devices. What another process has written of them in the meantime is kept where it is later.
    ///
    /// # Errors
    /// When the file cannot be written, and when another process holds its lock for long.
    pub(super) fn put(&mut self, records: &[(DeviceId, Record)]) -> io::Result<()> {
        let locked = self.lock()?;
        let (_, mut all) = self.records(&locked)?;
        for (device, record) in records {
            all.put(*device, all.get(*device).map_or(*record, |there| there.merged(*record)));
        }
        // Only the process that holds the lock has a file of this name.
        let temporary = self.path.with_extension("new");
        let result = self.replace(&temporary, &all.text(self.boot));
        if result.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        result
    }

    fn replace(&mut self, temporary: &Path, text: &str) -> io::Result<()> {
        let _ = fs::remove_file(temporary);
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(temporary)?;
        file.write_all(text.as_bytes())?;
        fs::rename(temporary, &self.path)?;
        self.read = Some((identity(&file.metadata()?), Records::parse(text, self.boot)));
        Ok(())
    }

    /// Opens the file, creates it if necessary, and locks it. It is the one with the name as long as it is locked.
    fn lock(&self) -> io::Result<Flock<File>> {
        if let Some(directory) = self.path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
        }
        for _ in 0..ATTEMPTS {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&self.path)?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(locked) if self.has_name(&locked)? => return Ok(locked),
                Ok(_) => {}
                Err((_, Errno::EWOULDBLOCK)) => thread::sleep(PAUSE),
                Err((_, error)) => return Err(error.into()),
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    fn has_name(&self, file: &File) -> io::Result<bool> {
        let open = file.metadata()?;
        let named = fs::symlink_metadata(&self.path);
        Ok(named.is_ok_and(|named| (named.dev(), named.ino()) == (open.dev(), open.ino())))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::SystemTime;

    use super::*;
    use crate::fs::change::FileTimes;

    fn id(minor: u32) -> DeviceId {
        DeviceId { major: 7, minor }
    }

    fn record(state: u128, seconds: u64) -> Record {
        let times = FileTimes::at(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        Record { state: Some(state), times }
    }

    #[test]
    fn what_one_store_has_written_another_one_reads() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new");
        let [mut first, mut second] = [0; 2].map(|_| TimesStore::new(&dir).unwrap());
        assert_eq!(first.get(id(1)), None);
        first.put(&[(id(1), record(1, 10)), (id(2), record(2, 20))]).unwrap();
        assert_eq!((second.get(id(1)), second.get(id(2))), (Some(record(1, 10)), Some(record(2, 20))));
        second.put(&[(id(1), record(3, 30)), (id(2), record(4, 15))]).unwrap();
        assert_eq!((first.get(id(1)), first.get(id(2))), (Some(record(3, 30)), Some(record(2, 20))));
        assert_eq!(fs::metadata(dir.join(NAME)).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn garbage_is_as_no_file_and_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        for garbage in [&b"x"[..], b"\xff", &vec![b'1'; LONGEST_TEXT + 2], b""] {
            fs::write(dir.path().join(NAME), garbage).unwrap();
            let mut store = TimesStore::new(dir.path()).unwrap();
            assert_eq!(store.get(id(1)), None);
            store.put(&[(id(1), record(1, 10))]).unwrap();
            assert_eq!(TimesStore::new(dir.path()).unwrap().get(id(1)), Some(record(1, 10)));
        }
    }

    #[test]
    fn a_store_that_cannot_be_written_is_an_error_and_no_wait() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = TimesStore::new(dir.path()).unwrap();
        fs::create_dir(dir.path().join(NAME)).unwrap();
        assert!(store.put(&[(id(1), record(1, 10))]).is_err());
        assert_eq!(store.get(id(1)), None);
        fs::remove_dir(dir.path().join(NAME)).unwrap();
        let _held = store.lock().unwrap();
        assert_eq!(store.put(&[(id(1), record(1, 10))]).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    }

    #[test]
    fn writers_at_the_same_time_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            for device in 0..4 {
                let dir = dir.path();
                scope.spawn(move || {
                    let mut store = TimesStore::new(dir).unwrap();
                    for round in 1..50 {
                        while store.put(&[(id(device), record(round.into(), round))]).is_err() {}
                    }
                });
            }
        });
        let mut store = TimesStore::new(dir.path()).unwrap();
        assert!((0..4).all(|device| store.get(id(device)) == Some(record(49, 49))));
    }
}
