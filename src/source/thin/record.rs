//! Records of the metadata snapshots that this program takes: a file for each pool, which survives the process that
//! holds the snapshot.
//!
//! The file is locked as long as that process lives. A record without a lock was left by a process that was killed. The
//! next process releases the snapshot that the record names, if the pool still holds it. A process that was killed
//! inside its reserve message left a record that names no snapshot. Then a held snapshot may be its own or another
//! program's, and the log asks the user to decide.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use log::{error, info, warn};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::{MetaBlock, params};
use crate::error::plain;
use crate::sys::device::DeviceId;
use crate::sys::dm::{Commit, Control};
use crate::sys::sysfs;

/// The directory of the records. It is empty after a boot, when no process holds a snapshot either.
pub const DIRECTORY: &str = "/run/blkholefs.thin";

/// The block of the metadata snapshot that a pool holds now, whichever process took it.
///
/// # Errors
/// When the pool's status cannot be read, or the pool has failed.
pub fn held_root(control: &Control, pool: DeviceId) -> io::Result<Option<MetaBlock>> {
    let status = control.status(pool, Commit::No)?;
    let line = status.targets.first().map(|target| target.params.as_str()).unwrap_or_default();
    params::pool_status(line).map(|status| status.held_root).map_err(io::Error::other)
}

/// Releases the metadata snapshot of a pool, whichever process took it.
///
/// # Errors
/// As the ioctl: `EOPNOTSUPP` when the pool does not write its metadata.
pub fn release(control: &Control, pool: DeviceId) -> io::Result<()> {
    match control.message(pool, "release_metadata_snap") {
        // EINVAL means that the pool holds none.
        Err(error) if error.raw_os_error() != Some(libc::EINVAL) => Err(error),
        _ => Ok(()),
    }
}

/// Logs that a snapshot of this program is still held, and what the user can do.
pub fn log_leftover(pool: &str, error: &io::Error) {
    error!("{pool}: cannot release the metadata snapshot: {}", plain(error));
    error!("{pool}: the next mount tries again; to do it by hand: dmsetup message {pool} 0 release_metadata_snap");
}

/// Releases the snapshots that killed processes left held, in all pools.
pub fn recover_all(control: &Control) {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return };
    for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        if let Some(pool) = device_named(&name) {
            recover(control, pool);
        }
    }
}

fn recover(control: &Control, pool: DeviceId) {
    let Ok(identity) = PoolIdentity::of(pool) else { return };
    if !exists(&identity) {
        return;
    }
    // A record that is locked belongs to a process that lives.
    if let Ok(Some(mut record)) = SnapshotRecord::open(Path::new(DIRECTORY), &identity)
        && record.recover(control, pool)
    {
        record.remove();
    }
}

/// Whether the pool has a record, of a process that lives or was killed.
pub fn exists(pool: &PoolIdentity) -> bool {
    Path::new(DIRECTORY).join(&pool.name).exists()
}

/// The device-mapper device with that name. A device whose attributes cannot be read is skipped, and its record stays.
fn device_named(name: &str) -> Option<DeviceId> {
    let devices = fs::read_dir("/sys/block").ok()?;
    devices.filter_map(Result::ok).find_map(|entry| {
        let text = |attribute: &str| fs::read_to_string(entry.path().join(attribute)).ok();
        (text("dm/name")?.trim_end_matches('\n') == name).then(|| text("dev")?.trim().parse().ok())?
    })
}

/// The name and the uuid of a pool. They identify it when its device number has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolIdentity {
    /// Its name.
    pub name: String,
    /// Its uuid, which is empty if the program that made the pool gave it none. LVM's begins with `LVM-`, and has the
    /// uuids of the volume group and of the pool.
    pub uuid: String,
}

impl PoolIdentity {
    /// The identity of the device that has this number now.
    ///
    /// # Errors
    /// When there is no such device, or its name or uuid cannot be read.
    pub fn of(pool: DeviceId) -> io::Result<Self> {
        let name = sysfs::dm_name(pool).ok_or(io::ErrorKind::NotFound)?;
        let uuid = fs::read_to_string(sysfs::directory(pool).join("dm/uuid"))?;
        Ok(Self { name, uuid: uuid.trim_end_matches('\n').to_owned() })
    }
}

/// A step of taking a snapshot, as a record has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordedStep {
    /// The reserve message is sent after this, so the snapshot may have been taken: `wanted`.
    Wanted,
    /// The snapshot at this block was taken: `held BLOCK`.
    Held(MetaBlock),
}

/// The record of one pool, open and locked: a line with the pool's uuid, then a line for each step.
pub struct SnapshotRecord {
    path: PathBuf,
    file: Flock<File>,
    uuid: String,
    /// The last step of the process that left this record.
    left: Option<RecordedStep>,
}

impl SnapshotRecord {
    /// Opens and locks the record of a pool. `None` when another process has it locked.
    ///
    /// # Errors
    /// When the directory or the file cannot be created, opened or read.
    pub fn open(directory: &Path, pool: &PoolIdentity) -> io::Result<Option<Self>> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let path = directory.join(&pool.name);
        loop {
            let mut options = OpenOptions::new();
            options.read(true).append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            let mut file = match Flock::lock(options.open(&path)?, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
                Err((_, errno)) => return Err(errno.into()),
            };
            // The process that had it locked may have removed it after it was opened here.
            if is_at(&file, &path) {
                let mut text = String::new();
                file.read_to_string(&mut text)?;
                return Ok(Some(Self { path, file, uuid: pool.uuid.clone(), left: parse(&text, &pool.uuid) }));
            }
        }
    }

    /// Adds a step. [`RecordedStep::Wanted`] overwrites the record.
    ///
    /// # Errors
    /// As write(2).
    pub fn write(&mut self, step: RecordedStep) -> io::Result<()> {
        let line = match step {
            RecordedStep::Wanted => {
                self.file.set_len(0)?;
                format!("{}\nwanted\n", self.uuid)
            }
            RecordedStep::Held(root) => format!("held {}\n", root.get()),
        };
        self.file.write_all(line.as_bytes())
    }

    /// Removes the record, when no snapshot is held any more.
    pub fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            warn!("{}: cannot remove: {}", self.path.display(), plain(&error));
        }
    }

    /// Releases the snapshot of the process that left this record, if the pool still holds it. Returns `false` when
    /// that fails; then the record must stay as it is.
    pub fn recover(&mut self, control: &Control, pool: DeviceId) -> bool {
        let Some(left) = self.left.take() else { return true };
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let result = held_root(control, pool).and_then(|held| match (left, held) {
            (_, None) => Ok(()),
            (RecordedStep::Held(root), Some(held)) if root != held => Ok(()),
            (RecordedStep::Held(_), Some(_)) => {
                release(control, pool)?;
                info!("{name}: released the metadata snapshot that a killed process had left");
                Ok(())
            }
            (RecordedStep::Wanted, Some(_)) => {
                warn!(
                    "{name}: its metadata snapshot is held by another tool, or was left by a killed blkholefs process. \
                     If no tool uses it: dmsetup message {name} 0 release_metadata_snap"
                );
                Ok(())
            }
        });
        result.inspect_err(|error| log_leftover(&name, error)).is_ok()
    }
}

/// Parses a record. Returns its last step; `None` when it has no complete line of a step, or is of another pool than
/// the one with `uuid`.
pub fn parse(text: &str, uuid: &str) -> Option<RecordedStep> {
    let whole = &text[..text.rfind('\n')?];
    let (recorded, steps) = whole.split_once('\n')?;
    let last = steps.lines().last().filter(|_| recorded == uuid)?;
    match last.split_once(' ') {
        None if last == "wanted" => Some(RecordedStep::Wanted),
        Some(("held", root)) => root.parse().ok().map(|root| RecordedStep::Held(MetaBlock::new(root))),
        _ => None,
    }
}

/// Whether `path` leads to the open `file`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(uuid: &str) -> PoolIdentity {
        PoolIdentity { name: "vg-pool-tpool".to_owned(), uuid: uuid.to_owned() }
    }

    #[test]
    fn a_record_has_the_last_step_of_its_writer() {
        let dir = tempfile::tempdir().unwrap();
        let left = |uuid: &str| SnapshotRecord::open(dir.path(), &pool(uuid)).unwrap().unwrap().left;
        assert_eq!(left("LVM-1"), None);
        let mut record = SnapshotRecord::open(dir.path(), &pool("LVM-1")).unwrap().unwrap();
        for step in [RecordedStep::Wanted, RecordedStep::Held(MetaBlock::new(112))] {
            record.write(step).unwrap();
            assert!(SnapshotRecord::open(dir.path(), &pool("LVM-1")).unwrap().is_none(), "it is locked");
            let text = fs::read_to_string(&record.path).unwrap();
            assert_eq!(parse(&text, "LVM-1"), Some(step));
        }
        drop(record);
        assert_eq!(left("LVM-1"), Some(RecordedStep::Held(MetaBlock::new(112))));
        assert_eq!(left("LVM-2"), None, "another pool of that name");
        SnapshotRecord::open(dir.path(), &pool("LVM-1")).unwrap().unwrap().remove();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_incomplete_line_is_ignored() {
        for (text, step) in [
            ("", None),
            ("u", None),
            ("u\n", None),
            ("u\nwanted", None),
            ("u\nwanted\n", Some(RecordedStep::Wanted)),
            ("u\nwanted\nheld 1", Some(RecordedStep::Wanted)),
            ("u\nwanted\nheld 12\n", Some(RecordedStep::Held(MetaBlock::new(12)))),
            ("u\nwanted\nheld x\n", None),
            ("v\nwanted\nheld 12\n", None),
            ("\n\n", None),
        ] {
            assert_eq!(parse(text, "u"), step, "{text:?}");
        }
        assert_eq!(parse("\nheld 3\n", ""), Some(RecordedStep::Held(MetaBlock::new(3))), "a pool without a uuid");
    }
}
