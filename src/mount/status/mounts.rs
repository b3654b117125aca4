//! The mounts of this machine: those with records, and those that only the kernel's list has.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::{Pid, geteuid};

use super::ask::{self, Asked};
use crate::error::{Error, Result, plain};
use crate::fs::Status;
use crate::mount::point;
use crate::mount::record::{self, Description, Record};
use crate::spec::absolute;
use crate::sys::device::DeviceId;
use crate::sys::mountinfo::MountEntry;
use crate::units::Bytes;

/// One mount.
#[derive(Debug)]
pub struct MountStatus {
    /// What is shown, as it was typed; empty where that is not known.
    pub spec: OsString,
    /// Where it was mounted; empty where that is not known.
    pub directory: PathBuf,
    /// The mountpoints in the mount namespace of this process.
    pub mountpoints: Vec<PathBuf>,
    /// The options that matter, between commas, `ro` or `rw` first. `None` where there is no record of them.
    pub options: Option<OsString>,
    /// The daemon, by its number in the PID namespace of this process.
    pub daemon: Option<Pid>,
    /// The memory of the daemon that is resident.
    pub resident: Option<Bytes>,
    /// The user who mounted it.
    pub user: Option<u32>,
    /// What its daemon does.
    pub state: MountState,
}

/// What the daemon of a mount does.
#[derive(Debug)]
pub enum MountState {
    /// It serves, in this state.
    Serving(Status),
    /// It runs, and did not answer, for this reason.
    Silent(String),
    /// It was killed, and its mount is left.
    Killed,
    /// It is not known: it has no record.
    NoRecord,
    /// It is that of another user, whose records cannot be read.
    OfOtherUser,
}

/// The mounts of this machine.
#[derive(Debug)]
pub struct Mounts {
    /// Those that were asked for.
    pub found: Vec<MountStatus>,
    /// A usage error for each directory that is no mount of this program.
    pub missing: Vec<Error>,
}

/// A mount whose daemon was not asked yet.
struct Found {
    device: DeviceId,
    record: Option<Record>,
    mountpoints: Vec<PathBuf>,
    source: OsString,
    user: Option<u32>,
}

/// How long the roots of mounts without a record are waited for.
const ROOT_TIMEOUT: Duration = Duration::from_secs(1);

/// The mounts on `directories`, or all mounts if there are none. All daemons are asked at the same time.
///
/// # Errors
/// When the kernel's list of mounts, or the directory of the records, cannot be read.
pub fn list(directories: &[OsString]) -> Result<Mounts> {
    let place = record::directory();
    let records = place.as_deref().map_or(Ok(Vec::new()), |place| {
        record::list(place).map_err(|error| Error::failed("cannot read the records of mounts").on(place).because(error))
    })?;
    let mut found = all(records, point::list()?);
    let missing = select(&mut found, directories);
    let sockets: Vec<_> = found.iter().filter_map(Found::socket).collect();
    let answers = place.map_or_else(Vec::new, |place| ask::all(&place, &sockets, ask::TIMEOUT));
    let mut answers = answers.into_iter();
    let found = found.into_iter().map(|mount| {
        let answer = mount.socket().and_then(|_| answers.next());
        mount.with_answer(answer)
    });
    let mut found: Vec<_> = found.collect();
    find_killed(&mut found);
    Ok(Mounts { found, missing })
}

/// Finds out which daemons without a record were killed: another daemon may have removed the record since. The root of such a
/// mount answers ENOTCONN at once. A daemon that runs and hangs never answers, and is waited for for [`ROOT_TIMEOUT`] in all.
fn find_killed(mounts: &mut [MountStatus]) {
    let (sender, receiver) = channel();
    for (index, mount) in mounts.iter().enumerate().filter(|(_, mount)| matches!(mount.state, MountState::NoRecord)) {
        let (sender, directory) = (sender.clone(), mount.directory.clone());
        let is_dead = move || fs::metadata(directory).is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN));
        // A thread that waits for a daemon ends with the process.
        let _ = thread::Builder::new().spawn(move || sender.send((index, is_dead())));
    }
    drop(sender);
    let deadline = Instant::now() + ROOT_TIMEOUT;
    while let Ok((index, is_dead)) = receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        if is_dead {
            mounts[index].state = MountState::Killed;
        }
    }
}

/// All mounts, by the number of their file systems. A record of a daemon that was killed counts as long as its mount is there.
fn all(records: Vec<Record>, list: Vec<MountEntry>) -> Vec<Found> {
    let own = Some(geteuid().as_raw());
    let key = |device: DeviceId| (device.major, device.minor);
    let mut found = BTreeMap::new();
    for MountEntry { device, point, source, owner, .. } in list.into_iter().filter(MountEntry::is_blkholefs) {
        let new = || Found { device, record: None, mountpoints: Vec::new(), source, user: owner };
        found.entry(key(device)).or_insert_with(new).mountpoints.push(point);
    }
    for record in records {
        match found.get_mut(&key(record.device)) {
            // The number of a mount that is gone may be that of another user's mount by now.
            Some(mount) if mount.user == own => mount.record = Some(record),
            None if record.is_running => {
                let (device, mountpoints, source) = (record.device, Vec::new(), OsString::new());
                found.insert(key(device), Found { device, record: Some(record), mountpoints, source, user: own });
            }
            _ => {}
        }
    }
    found.into_values().collect()
}

/// Keeps the mounts on these directories, in their order. Returns an error for each directory that has none.
fn select(found: &mut Vec<Found>, directories: &[OsString]) -> Vec<Error> {
    if directories.is_empty() {
        return Vec::new();
    }
    let (mut selected, mut missing) = (Vec::new(), Vec::new());
    for typed in directories {
        // An empty path cannot be made absolute, and is no mountpoint.
        let path = absolute(Path::new(typed)).unwrap_or_default();
        let here = |path: &Path| found.iter().position(|mount| mount.is_at(path));
        // A path lookup may wait for a daemon that hangs, and fails for a mount whose daemon was killed. None is needed where
        // the path is typed as in the kernel's list.
        let index = here(&path).or_else(|| here(&fs::canonicalize(&path).ok()?));
        match index {
            Some(index) if selected.contains(&index) => {}
            Some(index) => selected.push(index),
            None => missing.push(Error::usage("not a mount of blkholefs").on(typed)),
        }
    }
    let mut all: Vec<_> = std::mem::take(found).into_iter().map(Some).collect();
    found.extend(selected.into_iter().filter_map(|index| all.get_mut(index)?.take()));
    missing
}

impl Found {
    fn description(&self) -> Option<&Description> {
        self.record.as_ref()?.text.description.as_ref()
    }

    fn is_at(&self, path: &Path) -> bool {
        let is_recorded = self.description().is_some_and(|description| description.directory == path);
        self.mountpoints.iter().any(|point| point == path) || self.mountpoints.is_empty() && is_recorded
    }

    /// The socket of the daemon, if it runs.
    fn socket(&self) -> Option<String> {
        let record = self.record.as_ref().filter(|record| record.is_running)?;
        Some(record::socket_name(self.device, record.text.daemon))
    }

    fn with_answer(self, asked: Option<Asked>) -> MountStatus {
        let is_own = self.user == Some(geteuid().as_raw());
        let (answer, process) = asked.map_or((None, None), |asked| (Some(asked.answer), asked.process));
        let state = match (answer, &self.record) {
            (Some(Ok(status)), _) => MountState::Serving(status),
            (Some(Err(error)), _) => MountState::Silent(why_silent(&error)),
            (None, Some(_)) => MountState::Killed,
            (None, None) if is_own => MountState::NoRecord,
            (None, None) => MountState::OfOtherUser,
        };
        // A daemon may run in another PID namespace, where the record has its number.
        let daemon = process.unwrap_or_else(|| self.record.as_ref().map(|record| record.text.daemon));
        let is_running = self.record.as_ref().is_some_and(|record| record.is_running);
        let first = self.mountpoints.first().cloned().unwrap_or_default();
        let of_table = Description { spec: self.source, directory: first, options: OsString::new() };
        let description = self.record.and_then(|record| record.text.description);
        let options = description.as_ref().map(|description| description.options.clone());
        let Description { spec, directory, .. } = description.unwrap_or(of_table);
        MountStatus {
            spec,
            directory,
            mountpoints: self.mountpoints,
            options,
            daemon,
            resident: daemon.filter(|_| is_running).and_then(resident),
            user: self.user,
            state,
        }
    }
}

/// A sentence without its final stop. Its subject, the daemon, is called "it".
fn why_silent(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut => format!("it did not answer within {} s", ask::TIMEOUT.as_secs()),
        io::ErrorKind::WouldBlock => "it does not answer, and many questions wait for it already".to_owned(),
        io::ErrorKind::NotFound => "it has no socket: it is of an older version, or starts or ends".to_owned(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => "it ends".to_owned(),
        io::ErrorKind::ConnectionRefused => "it starts or ends".to_owned(),
        io::ErrorKind::InvalidData => "its answer is not understood".to_owned(),
        _ => format!("it cannot be asked: {}", plain(error)),
    }
}

/// The resident memory of a process (proc_pid_status(5)).
fn resident(process: Pid) -> Option<Bytes> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    resident_in(&status)
}

fn resident_in(status: &str) -> Option<Bytes> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024).map(Bytes::new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::record::RecordText;
    use crate::sys::mountinfo;

    fn mounts(user: u32) -> Vec<MountEntry> {
        let lines = [
            format!("40 22 0:45 / /mnt/a ro - fuse.blkholefs /dev/a ro,user_id={user}"),
            format!("41 22 0:45 / /mnt/bind ro - fuse.blkholefs /dev/a ro,user_id={user}"),
            format!("42 22 0:46 / /mnt/other ro - fuse.blkholefs /dev/b ro,user_id={}", user + 1),
            format!("43 22 0:47 / /mnt/killed ro - fuse.blkholefs /dev/c ro,user_id={user}"),
            "44 22 0:48 / /mnt/tmp rw - tmpfs tmpfs rw".to_owned(),
            format!("45 22 0:49 / /mnt/bare ro - fuse.blkholefs /dev/e ro,user_id={user}"),
        ];
        mountinfo::parse(lines.join("\n").as_bytes())
    }

    fn record(minor: u32, is_running: bool) -> Record {
        let description = Description { spec: "/dev/r".into(), directory: "/mnt/r".into(), options: "rw".into() };
        let text = RecordText { daemon: Pid::from_raw(1), description: Some(description) };
        Record { device: DeviceId { major: 0, minor }, text, is_running }
    }

    fn found() -> Vec<Found> {
        let records = [(45, true), (46, false), (47, false), (50, true), (51, false)];
        all(records.map(|(minor, is_running)| record(minor, is_running)).into(), mounts(geteuid().as_raw()))
    }

    #[test]
    fn records_and_the_list_of_the_kernel_are_put_together() {
        let shown = found().into_iter().map(|mount| {
            let minor = mount.device.minor;
            let asked = mount.socket().map(|_| Asked { answer: Ok(Status::default()), process: None });
            let mount = mount.with_answer(asked);
            let state = match mount.state {
                MountState::Serving(_) => "serving",
                MountState::Silent(_) => "silent",
                MountState::Killed => "killed",
                MountState::NoRecord => "no record",
                MountState::OfOtherUser => "other",
            };
            (minor, mount.spec.into_string().unwrap(), mount.mountpoints.len(), state)
        });
        let expected = [
            (45, "/dev/r", 2, "serving"),
            (46, "/dev/b", 1, "other"),
            (47, "/dev/r", 1, "killed"),
            (49, "/dev/e", 1, "no record"),
            (50, "/dev/r", 0, "serving"),
        ];
        let expected = expected.map(|(minor, spec, points, state)| (minor, spec.to_owned(), points, state));
        assert_eq!(shown.collect::<Vec<_>>(), expected, "51 is the record of a mount that is gone");
    }

    #[test]
    fn a_daemon_that_is_silent_has_a_reason() {
        let reason = |kind: io::ErrorKind| why_silent(&kind.into());
        assert_eq!(reason(io::ErrorKind::TimedOut), "it did not answer within 5 s");
        // connect(2) fails at once where the queue of the socket is full.
        assert_eq!(reason(io::ErrorKind::WouldBlock), "it does not answer, and many questions wait for it already");
        assert_eq!(reason(io::ErrorKind::ConnectionRefused), "it starts or ends");
        assert_eq!(reason(io::ErrorKind::PermissionDenied), "it cannot be asked: permission denied");
    }

    #[test]
    fn directories_select_mounts_in_their_order() {
        let mut found = found();
        let words = ["/mnt/killed", "/mnt/tmp", "/mnt/bind/", "/mnt/a", "/mnt/r"].map(OsString::from);
        let missing = select(&mut found, &words);
        let minors: Vec<_> = found.iter().map(|mount| mount.device.minor).collect();
        assert_eq!(minors, [47, 45, 50], "a bind mount is the same mount; a record names one that is not visible");
        assert_eq!(missing.len(), 1);
        assert_eq!((missing[0].to_string(), missing[0].exit_code()), ("/mnt/tmp: not a mount of blkholefs".into(), 1));
    }

    #[test]
    fn the_resident_memory_of_this_process() {
        assert!(resident(Pid::this()).unwrap() > Bytes::new(1 << 20));
        assert_eq!(resident_in("VmRSS:\t   12 kB\n"), Some(Bytes::new(12 << 10)));
        for text in ["", "VmRSS: x kB", "VmRSS: 1", "VmRSS: 18446744073709551615 kB"] {
            assert_eq!(resident_in(text), None, "{text}");
        }
    }
}
