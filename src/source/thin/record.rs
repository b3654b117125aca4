//! The record of a metadata snapshot that was taken: it survives the process that holds the snapshot.
//!
//! The file is locked while that process lives. A record that is not locked was left behind, and the next start releases
//! the snapshot that the record names, if that one is still held. A process that was killed inside its reserve message
//! left a record that names none; then nothing distinguishes its snapshot from another tool's, and the user decides.

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

/// Where the records are: gone with the next boot, as are the processes.
pub const DIRECTORY: &str = "/run/blkholefs.thin";

/// The root of the metadata snapshot that a pool has now, whichever process took it.
///
/// # Errors
/// When the pool's status cannot be read, or is that of a pool that failed.
pub fn held_root(control: &Control, pool: DeviceId) -> io::Result<Option<MetaBlock>> {
    let status = control.status(pool, Commit::No)?;
    let line = status.targets.first().map(|target| target.params.as_str()).unwrap_or_default();
    params::pool_status(line).map(|status| status.held_root).map_err(io::Error::other)
}

/// Releases the metadata snapshot of a pool, whichever process took it.
///
/// # Errors
/// As the message: `EOPNOTSUPP` when the pool does not write its metadata.
pub fn release(control: &Control, pool: DeviceId) -> io::Result<()> {
    match control.message(pool, "release_metadata_snap") {
        // EINVAL: there is none, which is what we want.
        Err(error) if error.raw_os_error() != Some(libc::EINVAL) => Err(error),
        _ => Ok(()),
    }
}

/// Says that a snapshot of ours stays held, and what can be done about it.
pub fn tell_leftover(pool: &str, error: &io::Error) {
    error!("{pool}: cannot release the metadata snapshot: {}", plain(error));
    error!("{pool}: the next start tries again; by hand: dmsetup message {pool} 0 release_metadata_snap");
}

/// Releases what killed processes left held, in all pools.
pub fn recover_all(control: &Control) {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return };
    for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        if let Some(pool) = device_named(&name) {
            recover(control, pool);
        }
    }
}

fn recover(control: &Control, pool: DeviceId) {
    let Ok(identity) = Identity::of(pool) else { return };
    if !exists(&identity) {
        return;
    }
    // One that is locked by a process that lives is none of ours.
    if let Ok(Some(mut record)) = Record::open(Path::new(DIRECTORY), &identity)
        && record.recover(control, pool)
    {
        record.remove();
    }
}

/// Whether there is a record of the pool, of a process that lives or was killed.
pub fn exists(pool: &Identity) -> bool {
    Path::new(DIRECTORY).join(&pool.name).exists()
}

/// The device-mapper device with that name. A device that does not answer is not taken for it: its record stays.
fn device_named(name: &str) -> Option<DeviceId> {
    let devices = fs::read_dir("/sys/block").ok()?;
    devices.filter_map(Result::ok).find_map(|entry| {
        let text = |attribute: &str| fs::read_to_string(entry.path().join(attribute)).ok();
        (text("dm/name")?.trim_end_matches('\n') == name).then(|| text("dev")?.trim().parse().ok())?
    })
}

/// What a pool is recognised by after a restart: its minor number may have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its name.
    pub name: String,
    uuid: String,
}

impl Identity {
    /// The pool that has this number now.
    ///
    /// # Errors
    /// When it is gone, or its name or uuid cannot be read.
    pub fn of(pool: DeviceId) -> io::Result<Self> {
        let name = sysfs::dm_name(pool).ok_or(io::ErrorKind::NotFound)?;
        let uuid = fs::read_to_string(sysfs::directory(pool).join("dm/uuid"))?;
        Ok(Self { name, uuid: uuid.trim_end_matches('\n').to_owned() })
    }
}

/// How far a process came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It was about to take the snapshot, and may have taken it.
    Wanted,
    /// It has the snapshot with this root.
    Held(MetaBlock),
}

/// The record of one pool: its uuid, then a line for each step.
pub struct Record {
    path: PathBuf,
    file: Flock<File>,
    uuid: String,
    /// What a process that is gone left here.
    left: Option<Step>,
}

impl Record {
    /// Opens and locks the record of a pool; `None` when another process has it.
    ///
    /// # Errors
    /// When the directory or the file cannot be made.
    pub fn open(directory: &Path, pool: &Identity) -> io::Result<Option<Self>> {
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
            // Its holder removes it, and may have done so since it was opened.
            if is_at(&file, &path) {
                let mut text = String::new();
                file.read_to_string(&mut text)?;
                return Ok(Some(Self { path, file, uuid: pool.uuid.clone(), left: parse(&text, &pool.uuid) }));
            }
        }
    }

    /// Adds a step; [`Step::Wanted`] begins the record anew.
    ///
    /// # Errors
    /// As write(2).
    pub fn write(&mut self, step: Step) -> io::Result<()> {
        let line = match step {
            Step::Wanted => {
                self.file.set_len(0)?;
                format!("{}\nwanted\n", self.uuid)
            }
            Step::Held(root) => format!("held {}\n", root.get()),
        };
        self.file.write_all(line.as_bytes())
    }

    /// Removes the record: nothing is held any more.
    pub fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            warn!("{}: cannot remove: {}", self.path.display(), plain(&error));
        }
    }

    /// Releases what the process that left this record held, if that is what is held now. False when that cannot be done
    /// now: the record must stay as it is.
    pub fn recover(&mut self, control: &Control, pool: DeviceId) -> bool {
        let Some(left) = self.left.take() else { return true };
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let result = held_root(control, pool).and_then(|held| match (left, held) {
            (_, None) => Ok(()),
            (Step::Held(root), Some(held)) if root != held => Ok(()),
            (Step::Held(_), Some(_)) => {
                release(control, pool)?;
                info!("{name}: released the metadata snapshot that a killed process had left");
                Ok(())
            }
            (Step::Wanted, Some(_)) => {
                warn!(
                    "{name}: somebody holds its metadata snapshot: perhaps a process of ours that was killed, perhaps \
                     another tool. If no tool is at work: dmsetup message {name} 0 release_metadata_snap"
                );
                Ok(())
            }
        });
        result.inspect_err(|error| tell_leftover(&name, error)).is_ok()
    }
}

/// The last whole line of a record of the pool with `uuid`.
pub fn parse(text: &str, uuid: &str) -> Option<Step> {
    let whole = &text[..text.rfind('\n')?];
    let (recorded, steps) = whole.split_once('\n')?;
    let last = steps.lines().last().filter(|_| recorded == uuid)?;
    match last.split_once(' ') {
        None if last == "wanted" => Some(Step::Wanted),
        Some(("held", root)) => root.parse().ok().map(|root| Step::Held(MetaBlock::new(root))),
        _ => None,
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(uuid: &str) -> Identity {
        Identity { name: "vg-pool-tpool".to_owned(), uuid: uuid.to_owned() }
    }

    #[test]
    fn a_record_says_how_far_its_writer_came() {
        let dir = tempfile::tempdir().unwrap();
        let left = |uuid: &str| Record::open(dir.path(), &pool(uuid)).unwrap().unwrap().left;
        assert_eq!(left("LVM-1"), None);
        let mut record = Record::open(dir.path(), &pool("LVM-1")).unwrap().unwrap();
        for step in [Step::Wanted, Step::Held(MetaBlock::new(112))] {
            record.write(step).unwrap();
            assert!(Record::open(dir.path(), &pool("LVM-1")).unwrap().is_none(), "it is locked");
            let text = fs::read_to_string(&record.path).unwrap();
            assert_eq!(parse(&text, "LVM-1"), Some(step));
        }
        drop(record);
        assert_eq!(left("LVM-1"), Some(Step::Held(MetaBlock::new(112))));
        assert_eq!(left("LVM-2"), None, "another pool of that name");
        Record::open(dir.path(), &pool("LVM-1")).unwrap().unwrap().remove();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_unfinished_line_does_not_count() {
        for (text, step) in [
            ("", None),
            ("u", None),
            ("u\n", None),
            ("u\nwanted", None),
            ("u\nwanted\n", Some(Step::Wanted)),
            ("u\nwanted\nheld 1", Some(Step::Wanted)),
            ("u\nwanted\nheld 12\n", Some(Step::Held(MetaBlock::new(12)))),
            ("u\nwanted\nheld x\n", None),
            ("v\nwanted\nheld 12\n", None),
            ("\n\n", None),
        ] {
            assert_eq!(parse(text, "u"), step, "{text:?}");
        }
        assert_eq!(parse("\nheld 3\n", ""), Some(Step::Held(MetaBlock::new(3))), "a pool without a uuid");
    }
}
