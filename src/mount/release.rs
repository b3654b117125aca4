//! Waiting after an unmount until the devices are free, as `losetup -d` or `lvremove` need them.
//!
//! The daemon ends after the unmount of its last mount. With a bind mount, or a copy in another mount namespace, it goes on,
//! and its devices are open as long as files are open there. /proc/PID/fd lists the open devices.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use crate::mount::{record, status};
use crate::sys::device::DeviceId;
use crate::sys::mountinfo::MountEntry;
use crate::sys::process;

/// The time that a daemon has to end in. Closing devices takes milliseconds, unless a device hangs.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// The time for which devices that are in use at another place are waited for.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The time between two readings of the daemon's descriptors, in milliseconds.
const INTERVAL_MS: u8 = 10;

/// The daemon that serves a mount.
pub struct Daemon {
    pid: Pid,
    process: OwnedFd,
    device: DeviceId,
}

/// The state of the daemon and its devices some time after an unmount.
#[derive(Debug, PartialEq, Eq)]
pub enum ReleaseOutcome {
    /// The daemon ended.
    Ended,
    /// The daemon serves the file system at another mountpoint, and has no device open.
    Idle,
    /// The file system is in use at another mountpoint, and the daemon has these devices and images open.
    InUse(Vec<PathBuf>),
    /// The file system is not mounted any more, and the daemon still runs, with these devices and images open.
    Hangs(Vec<PathBuf>),
}

impl Daemon {
    /// The daemon of a mount, if it has a record. It must be looked up before the unmount: after that, another mount may
    /// have the device number.
    pub fn of(mount: &MountEntry) -> Option<Self> {
        let directory = record::directory()?;
        let recorded = record::daemon_of(&directory, mount.device)?;
        let pid = status::process_of(&directory, mount.device, recorded)?;
        // A process that has ended since is not waited for.
        let process = process::pidfd_open(pid).ok()?;
        Some(Self { pid, process, device: mount.device })
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits, after the unmount, until the daemon has ended or has no device open, or a timeout passes.
    pub fn wait(&self) -> ReleaseOutcome {
        let start = Instant::now();
        loop {
            if self.ended() {
                return ReleaseOutcome::Ended;
            }
            let is_mounted = is_mounted(Path::new("/sys/class/bdi"), self.device);
            // If the descriptors cannot be listed, the devices are known to be free only when the daemon has ended.
            let open = open_devices(self.pid);
            match open {
                Ok(open) if is_mounted && open.is_empty() => return ReleaseOutcome::Idle,
                open if is_mounted && start.elapsed() > CLOSE_TIMEOUT => {
                    return ReleaseOutcome::InUse(open.unwrap_or_default());
                }
                open if start.elapsed() > END_TIMEOUT => return ReleaseOutcome::Hangs(open.unwrap_or_default()),
                _ => {}
            }
        }
    }

    /// Waits for the end of the process for [`INTERVAL_MS`]. Returns whether it has ended.
    fn ended(&self) -> bool {
        let mut events = [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)];
        poll(&mut events, PollTimeout::from(INTERVAL_MS)).is_ok_and(|ready| ready > 0)
    }
}

/// Whether the file system with this device number is mounted in any namespace. As long as it is, it has a directory in
/// /sys/class/bdi (`fs/super.c: super_setup_bdi_name`), which is removed with its superblock
/// (`fs/super.c: generic_shutdown_super`; 5.10, 6.1, 6.12, 7.3).
fn is_mounted(class: &Path, device: DeviceId) -> bool {
    class.join(device.to_string()).exists()
}

/// The block devices and images that a process has open. Regular files count as images, except the standard descriptors,
/// the records of daemons, and files of sysfs and proc.
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
        // A descriptor that was closed since is left out.
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
        let daemon = Daemon { pid, process, device: DeviceId { major: 0, minor: u32::MAX } };
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
