//! When a device is free after an unmount. What comes next (`losetup -d`, `lvremove`) needs the device, so the device is
//! what is waited for, and the kernel's list of the daemon's descriptors is what is asked.
//!
//! A mount that was the last one of its file system ends the daemon. A bind mount or a copy in another mount namespace
//! keeps the daemon, and an open file there keeps the device.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use crate::mount::mountinfo::{DeviceNumber, MountEntry};
use crate::mount::record;
use crate::sys::process;

/// How long a daemon may take to end. Closing devices takes milliseconds; what takes longer is a device that hangs.
const TO_END: Duration = Duration::from_secs(30);

/// How long files that are open elsewhere may keep the device. Their users may know nothing of the unmount.
const TO_CLOSE: Duration = Duration::from_secs(5);

/// How often the daemon's descriptors are looked at.
const LOOK_AGAIN_MS: u8 = 10;

/// The daemon that serves a mount.
pub struct Daemon {
    pid: Pid,
    process: OwnedFd,
    device: DeviceNumber,
}

/// What became of the devices after an unmount.
#[derive(Debug, PartialEq, Eq)]
pub enum ReleaseOutcome {
    /// The daemon ended.
    Ended,
    /// The daemon serves the file system at another place, and has no device open.
    Idle,
    /// The daemon has these devices and images open, as the file system is in use at another place.
    InUse(Vec<PathBuf>),
    /// Nothing uses the file system any more, and the daemon still runs, with these devices and images open.
    Hangs(Vec<PathBuf>),
}

impl Daemon {
    /// The daemon of a mount, if it left a record. To be called before the unmount: later the number of the mount may be
    /// that of another one.
    pub fn of(mount: &MountEntry) -> Option<Self> {
        let pid = record::daemon_of(&record::directory()?, mount.device)?;
        // A process that ended in between needs no waiting.
        let process = process::pidfd_open(pid).ok()?;
        Some(Self { pid, process, device: mount.device })
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits, after the unmount, until the daemon ended, or has no device open although it serves on.
    pub fn wait(&self) -> ReleaseOutcome {
        let start = Instant::now();
        loop {
            if self.ended() {
                return ReleaseOutcome::Ended;
            }
            let serves = serves(Path::new("/sys/class/bdi"), self.device);
            // Where the descriptors cannot be seen, only the end says that the devices are free.
            let open = open_devices(self.pid);
            match open {
                Ok(open) if serves && open.is_empty() => return ReleaseOutcome::Idle,
                open if serves && start.elapsed() > TO_CLOSE => return ReleaseOutcome::InUse(open.unwrap_or_default()),
                open if start.elapsed() > TO_END => return ReleaseOutcome::Hangs(open.unwrap_or_default()),
                _ => {}
            }
        }
    }

    /// Whether the process ended, within the time between two looks.
    fn ended(&self) -> bool {
        let mut events = [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)];
        poll(&mut events, PollTimeout::from(LOOK_AGAIN_MS)).is_ok_and(|ready| ready > 0)
    }
}

/// Whether the file system with this number is mounted anywhere: as long as it is, in whatever namespace, it has a backing
/// device info of its own (`fs/super.c: super_setup_bdi_name`), which goes with its superblock
/// (`fs/super.c: generic_shutdown_super`; 5.10, 6.1, 6.12, 7.3).
fn serves(class: &Path, device: DeviceNumber) -> bool {
    class.join(device.to_string()).exists()
}

/// The block devices and the images that a process has open. Its standard descriptors, its own record, sysfs and proc are
/// none.
fn open_devices(pid: Pid) -> io::Result<Vec<PathBuf>> {
    let own = record::directory();
    let is_device = |descriptor: &Path, target: &Path| {
        let Ok(metadata) = fs::metadata(descriptor) else { return false };
        let mut not_images = [Some(Path::new("/sys")), Some(Path::new("/proc")), own.as_deref()].into_iter().flatten();
        let is_image = metadata.is_file() && !not_images.any(|place| target.starts_with(place));
        is_image || metadata.file_type().is_block_device()
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let descriptor = entry?.path();
        let is_standard =
            descriptor.file_name().is_some_and(|name| ["0", "1", "2"].iter().any(|number| name == *number));
        // One that was closed in between is none.
        let Ok(target) = fs::read_link(&descriptor) else { continue };
        if !is_standard && !found.contains(&target) && is_device(&descriptor, &target) {
            found.push(target);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_ended_is_noticed() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let process = process::pidfd_open(pid).unwrap();
        let daemon = Daemon { pid, process, device: DeviceNumber { major: 0, minor: u32::MAX } };
        assert_eq!(daemon.wait(), ReleaseOutcome::Ended);
        child.wait().unwrap();
    }

    #[test]
    fn an_open_image_is_seen_until_it_is_closed() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let path = fs::canonicalize(image.path()).unwrap();
        let open = || open_devices(Pid::this()).unwrap().contains(&path);
        assert!(open());
        let path_only = image.into_temp_path();
        assert!(!open());
        drop(path_only);
    }
}
