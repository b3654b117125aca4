//! The metadata snapshot of a pool: taken for as long as one tree is read, and released whatever happens.
//!
//! There is one for each pool, on disk, without an owner; it outlives the process that took it, and while it is held the
//! pool can free nothing that it refers to. So who takes it leaves a record, locked as long as it lives: the next start
//! finds the record of a process that was killed and releases what that one held, if it is still what is held. Somebody
//! else's snapshot is never released; where a record cannot tell whose it is, the user is told.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{RwLock, RwLockReadGuard, TryLockError};

use log::{error, info, warn};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};

use super::MetaBlock;
use super::params;
use crate::error::plain;
use crate::sys::device::DeviceId;
use crate::sys::dm::{Commit, Control};
use crate::sys::sysfs;

/// Where the records are: gone with the next boot, as are the processes.
const DIRECTORY: &str = "/run/blkholefs.thin";

/// Held for reading while a snapshot is, and for writing by the end of the program.
static EXIT: RwLock<()> = RwLock::new(());

/// Waits until no thread holds a metadata snapshot, and lets none take one any more. For the end of the program.
pub fn finish() {
    std::mem::forget(EXIT.write());
}

/// The metadata snapshot of a pool, held by this process. Dropping it releases it.
pub struct Snapshot<'a> {
    control: &'a Control,
    pool: DeviceId,
    root: Option<MetaBlock>,
    record: Record,
    _signals: HeldSignals,
    _exit: RwLockReadGuard<'static, ()>,
}

impl<'a> Snapshot<'a> {
    /// Takes the metadata snapshot of `pool`, which commits first; `None` when somebody has it.
    ///
    /// # Errors
    /// When the pool cannot do it (`EOPNOTSUPP` when it does not write its metadata), or no record can be written.
    pub fn reserve(control: &'a Control, pool: DeviceId) -> io::Result<Option<Self>> {
        let exit = match EXIT.try_read() {
            Ok(exit) => exit,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(None),
        };
        let Some(mut record) = Record::open(Path::new(DIRECTORY), &Identity::of(pool)?)? else {
            return Ok(None);
        };
        record.recover(control, pool);
        let signals = HeldSignals::new()?;
        record.write(Step::Wanted)?;
        match control.message(pool, "reserve_metadata_snap") {
            Ok(()) => {}
            Err(error) => {
                record.remove();
                let busy = error.raw_os_error() == Some(libc::EBUSY);
                return if busy { Ok(None) } else { Err(error) };
            }
        }
        let written = record.write(Step::Taken);
        let mut snapshot = Self { control, pool, root: None, record, _signals: signals, _exit: exit };
        written?;
        let root = held_root(control, pool)?.ok_or(io::ErrorKind::NotFound)?;
        snapshot.root = Some(root);
        snapshot.record.write(Step::Held(root))?;
        Ok(Some(snapshot))
    }

    /// Where the snapshot's superblock is.
    pub fn root(&self) -> MetaBlock {
        self.root.expect("known since it was taken")
    }
}

impl Drop for Snapshot<'_> {
    fn drop(&mut self) {
        // Another tool may have released it, and taken its own.
        match held_root(self.control, self.pool) {
            Ok(now) if self.root.is_some() && now != self.root => {
                warn!("pool {}: somebody else released the metadata snapshot while it was read", self.pool);
                self.record.remove();
            }
            _ => match release(self.control, self.pool) {
                Ok(()) => self.record.remove(),
                Err(error) => tell_leftover(self.pool, &error),
            },
        }
    }
}

/// Releases what killed processes left held, in all pools.
pub fn recover(control: &Control) {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return };
    for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        if let Some(pool) = device_named(&name) {
            recover_pool(control, pool);
        }
    }
}

fn recover_pool(control: &Control, pool: DeviceId) {
    let Ok(identity) = Identity::of(pool) else { return };
    if !Path::new(DIRECTORY).join(&identity.name).exists() {
        return;
    }
    // Without a record in it, or locked by a process that lives: nothing to do.
    if let Ok(Some(mut record)) = Record::open(Path::new(DIRECTORY), &identity) {
        record.recover(control, pool);
        record.remove();
    }
}

/// The device-mapper device with that name.
fn device_named(name: &str) -> Option<DeviceId> {
    let devices = fs::read_dir("/sys/block").ok()?;
    devices.filter_map(Result::ok).find_map(|entry| {
        let text = |attribute: &str| fs::read_to_string(entry.path().join(attribute)).ok();
        (text("dm/name")?.trim_end_matches('\n') == name).then(|| text("dev")?.trim().parse().ok())?
    })
}

fn held_root(control: &Control, pool: DeviceId) -> io::Result<Option<MetaBlock>> {
    let status = control.status(pool, Commit::No)?;
    let line = status.targets.first().map(|target| target.params.as_str()).unwrap_or_default();
    params::pool_status(line).map(|status| status.held_root).map_err(io::Error::other)
}

fn release(control: &Control, pool: DeviceId) -> io::Result<()> {
    match control.message(pool, "release_metadata_snap") {
        // EINVAL: there is none, which is what we want.
        Err(error) if error.raw_os_error() != Some(libc::EINVAL) => Err(error),
        _ => Ok(()),
    }
}

fn tell_leftover(pool: DeviceId, error: &io::Error) {
    let name = sysfs::dm_name(pool).unwrap_or_else(|| pool.to_string());
    error!("{name}: cannot release the metadata snapshot: {}", plain(error));
    error!("{name}: the next start tries again; by hand: dmsetup message {name} 0 release_metadata_snap");
}

/// Signals that end a program wait while the snapshot is held. Threads that start meanwhile inherit that; the others of
/// a daemon never take them.
struct HeldSignals(SigSet);

impl HeldSignals {
    fn new() -> io::Result<Self> {
        let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGPIPE]);
        Ok(Self(signals.thread_swap_mask(SigmaskHow::SIG_BLOCK)?))
    }
}

impl Drop for HeldSignals {
    fn drop(&mut self) {
        // Fails only for an impossible request.
        let _ = self.0.thread_set_mask();
    }
}

/// What a pool is recognised by after a restart: its minor number may have changed.
struct Identity {
    name: String,
    uuid: String,
}

impl Identity {
    fn of(pool: DeviceId) -> io::Result<Self> {
        let name = sysfs::dm_name(pool).ok_or(io::ErrorKind::NotFound)?;
        let uuid = sysfs::attribute(pool, "dm/uuid").unwrap_or_default();
        Ok(Self { name, uuid })
    }
}

/// How far a process came with the metadata snapshot of a pool, as its record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It was about to take the snapshot.
    Wanted,
    /// It has it.
    Taken,
    /// It has it, there.
    Held(MetaBlock),
}

/// The record of one pool: its uuid, then a line for each step.
struct Record {
    path: PathBuf,
    file: Flock<File>,
    uuid: String,
    /// What a process that is gone left here.
    left: Option<Step>,
}

impl Record {
    /// Opens and locks the record of a pool; `None` when another process has it.
    fn open(directory: &Path, pool: &Identity) -> io::Result<Option<Self>> {
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
                let left = file.read_to_string(&mut text).ok().and_then(|_| parse(&text, &pool.uuid));
                return Ok(Some(Self { path, file, uuid: pool.uuid.clone(), left }));
            }
        }
    }

    fn write(&mut self, step: Step) -> io::Result<()> {
        let line = match step {
            Step::Wanted => {
                self.file.set_len(0)?;
                format!("{}\nwanted\n", self.uuid)
            }
            Step::Taken => "taken\n".to_owned(),
            Step::Held(root) => format!("held {}\n", root.get()),
        };
        self.file.write_all(line.as_bytes())
    }

    fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            warn!("{}: cannot remove: {}", self.path.display(), plain(&error));
        }
    }

    /// Releases what the process that left this record held, if that is what is held now.
    fn recover(&mut self, control: &Control, pool: DeviceId) {
        let Some(left) = self.left.take() else { return };
        let Ok(Some(held)) = held_root(control, pool) else { return };
        let name = &self.path.file_name().unwrap_or_default().display();
        match left {
            Step::Held(root) if root != held => {}
            Step::Held(_) | Step::Taken => match release(control, pool) {
                Ok(()) => info!("{name}: released the metadata snapshot that a killed process had left"),
                Err(error) => tell_leftover(pool, &error),
            },
            Step::Wanted => warn!(
                "{name}: somebody holds its metadata snapshot: perhaps a process of ours that was killed, perhaps \
                 another tool. If no tool is at work: dmsetup message {name} 0 release_metadata_snap"
            ),
        }
    }
}

/// The last whole line of a record of the pool with `uuid`; `None` for another pool's record and for a line of no known
/// form.
pub fn parse(text: &str, uuid: &str) -> Option<Step> {
    let whole = &text[..text.rfind('\n')?];
    let (recorded, steps) = whole.split_once('\n')?;
    let last = steps.lines().last().filter(|_| recorded == uuid)?;
    match last.split_once(' ') {
        None if last == "wanted" => Some(Step::Wanted),
        None if last == "taken" => Some(Step::Taken),
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
    fn a_record_tells_how_far_its_writer_came() {
        let dir = tempfile::tempdir().unwrap();
        let left = |uuid: &str| Record::open(dir.path(), &pool(uuid)).unwrap().unwrap().left;
        assert_eq!(left("LVM-1"), None);
        let mut record = Record::open(dir.path(), &pool("LVM-1")).unwrap().unwrap();
        for step in [Step::Wanted, Step::Taken, Step::Held(MetaBlock::new(112))] {
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
    fn an_unfinished_line_is_not_believed() {
        for (text, step) in [
            ("", None),
            ("u", None),
            ("u\n", None),
            ("u\nwanted", None),
            ("u\nwanted\n", Some(Step::Wanted)),
            ("u\nwanted\ntak", Some(Step::Wanted)),
            ("u\nwanted\ntaken\nheld 1", Some(Step::Taken)),
            ("u\nwanted\ntaken\nheld 12\n", Some(Step::Held(MetaBlock::new(12)))),
            ("u\nwanted\ntaken\nheld x\n", None),
            ("v\nwanted\ntaken\n", None),
            ("\n\n", None),
        ] {
            assert_eq!(parse(text, "u"), step, "{text:?}");
        }
        assert_eq!(parse("\ntaken\n", ""), Some(Step::Taken), "a pool without a uuid");
    }
}
