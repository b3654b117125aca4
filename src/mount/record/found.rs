//! What is in the directory of the records.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Pid;

use super::{RecordText, process_in};
use crate::sys::device::DeviceId;

/// A record, as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The `st_dev` of the mount.
    pub device: DeviceId,
    /// What the record contains.
    pub text: RecordText,
    /// Whether its daemon runs.
    pub is_running: bool,
}

impl Record {
    pub(super) fn read(directory: &Path, device: DeviceId) -> Option<Self> {
        /// Longer than the text of any record: a SPEC, a directory and options of 4096 bytes, four for each that is escaped.
        const LONGEST: u64 = 64 << 10;
        let file = super::open(&super::path(directory, device)).ok()?;
        let mut text = Vec::new();
        (&file).take(LONGEST).read_to_end(&mut text).ok()?;
        let text = RecordText::parse(&text)?;
        let is_running = matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, Errno::EWOULDBLOCK)));
        Some(Self { device, text, is_running })
    }
}

/// All records in `directory`, in the order of their device numbers.
///
/// # Errors
/// When the directory cannot be read. One that does not exist has no records.
pub fn list(directory: &Path) -> io::Result<Vec<Record>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut records = Vec::new();
    for entry in entries {
        if let Some(Owned::Record(device)) = Owned::parse(&entry?.file_name()) {
            records.extend(Record::read(directory, device));
        }
    }
    records.sort_by_key(|record| (record.device.major, record.device.minor));
    Ok(records)
}

/// What a file in the directory is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owned {
    /// `MAJOR-MINOR`.
    Record(DeviceId),
    /// `MAJOR-MINOR.PID.socket`.
    Socket(DeviceId, Pid),
    /// The lock of a mountpoint, or a record that has no name yet. Both are locked as long as they are used.
    Lock,
}

impl Owned {
    /// `None` for a file of another kind.
    pub(super) fn parse(name: &OsStr) -> Option<Self> {
        let name = name.to_str()?;
        if name.starts_with("place-") || name.starts_with(".new-") {
            return Some(Self::Lock);
        }
        let device = |name: &str| name.replacen('-', ":", 1).parse().ok();
        match name.strip_suffix(SOCKET_SUFFIX).and_then(|name| name.split_once('.')) {
            Some((name, pid)) => Some(Self::Socket(device(name)?, process_in(pid.as_bytes())?)),
            None => device(name).map(Self::Record),
        }
    }
}

/// The end of the name of a socket.
const SOCKET_SUFFIX: &str = ".socket";

/// The name of the socket of a daemon in the directory of its record.
pub fn socket_name(device: DeviceId, daemon: Pid) -> String {
    format!("{}-{}.{daemon}{SOCKET_SUFFIX}", device.major, device.minor)
}

#[cfg(test)]
mod tests {
    use super::super::{Description, MountRecord};
    use super::*;

    #[test]
    fn records_are_listed_with_what_they_contain() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(list(&dir.path().join("none")).unwrap(), []);
        let device = DeviceId { major: 0, minor: 45 };
        let description = Description { spec: "/dev/x".into(), directory: "/mnt".into(), options: "ro".into() };
        let _record = MountRecord::create(dir.path(), device, description).unwrap();
        for name in ["0-7", "9-1000", "0-8x", "place-1-2"] {
            fs::write(dir.path().join(name), "1\n").unwrap();
        }
        fs::write(dir.path().join("0-9"), "garbage").unwrap();
        let found = list(dir.path()).unwrap();
        let shown = found.iter().map(|record| (record.device.to_string(), record.text.daemon, record.is_running));
        let this = ("0:45".to_owned(), Pid::this(), true);
        let old = |device: &str| (device.to_owned(), Pid::from_raw(1), false);
        assert_eq!(shown.collect::<Vec<_>>(), [old("0:7"), this, old("9:1000")]);
        let description = found[1].text.description.clone().unwrap();
        assert_eq!((description.spec, description.directory), ("/dev/x".into(), "/mnt".into()));
    }
}
