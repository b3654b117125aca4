//! The FUSE session: the mount itself, and the threads that answer the kernel.
//!
//! Root mounts with mount(2), so that the mount has the type `fuse.blkholefs` (`findmnt --real` hides plain `fuse`) and the
//! source exactly as typed, by which `mount -a` and systemd recognise it. Other users mount with fusermount3.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::mount::{MsFlags, mount as mount2};
use nix::unistd::{getegid, geteuid};

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::{BlkHoleFs, SESSION_THREADS};
use crate::mount::fusermount;
use crate::mount::options::MountOptions;
use crate::mount::point::{Claim, MountPoint, MountPointKind, Mounted};
use crate::sys::device::DeviceId;
use crate::sys::mountinfo::FS_TYPE;

/// Whether each session thread has a descriptor of the FUSE device of its own (`FUSE_DEV_IOC_CLONE`, Linux 4.5).
pub const CLONE_DESCRIPTOR: bool = true;

/// The readahead of the mount in KiB. With the kernel's default of 128, a copy waits for many small requests.
const READ_AHEAD_KIB: u32 = 1024;

/// A session after the mount and the handshake with the kernel (FUSE_INIT).
pub struct Session(fuser::Session<BlkHoleFs>);

impl Session {
    /// Answers requests until the mount is gone, and drops the file system.
    ///
    /// # Errors
    /// When the connection to the kernel breaks.
    pub fn run(self) -> io::Result<()> {
        self.0.run()
    }
}

/// Whether all threads of the session run: the FUSE library starts them in the order of their numbers, which are part of
/// their names.
///
/// # Errors
/// When proc is not mounted.
pub fn all_threads_run() -> io::Result<bool> {
    let last = format!("fuser-{}\n", SESSION_THREADS - 1);
    let mut names = fs::read_dir("/proc/self/task")?.flatten().map(|task| fs::read(task.path().join("comm")));
    // The name of a thread that has ended cannot be read.
    Ok(names.any(|name| name.is_ok_and(|name| name == last.as_bytes())))
}

/// Mounts `filesystem` on the mountpoint of `claim`, with the mount source `spec`.
///
/// # Errors
/// When the FUSE device cannot be opened, or the mount is refused. Nothing is mounted then.
pub fn mount(filesystem: BlkHoleFs, spec: &OsStr, claim: &Claim, options: &MountOptions) -> Result<(Session, Mounted)> {
    let point = claim.point();
    let device =
        if geteuid().is_root() { mount_as_root(spec, point, options) } else { mount_as_user(spec, point, options) }?;
    let mounted = claim.mounted(spec)?;
    let mut config = fuser::Config::default();
    config.n_threads = Some(SESSION_THREADS);
    config.clone_fd = CLONE_DESCRIPTOR;
    let kernel_cache = filesystem.kernel_cache();
    // The kernel refuses other users without allow_other. The check of the FUSE library would also refuse requests of the
    // kernel itself.
    let session = fuser::Session::from_fd(filesystem, device, fuser::SessionACL::All, config).map_err(|e| {
        let error = Error::failed("the handshake with the kernel failed").on(mounted.dir()).because(e);
        mounted.unmount_after(error)
    })?;
    kernel_cache.connect(session.notifier());
    raise_read_ahead(mounted.device());
    Ok((Session(session), mounted))
}

fn mount_as_root(spec: &OsStr, point: &MountPoint, options: &MountOptions) -> Result<OwnedFd> {
    let device = open_fuse_device()?;
    let root_mode = match point.kind() {
        MountPointKind::Directory => libc::S_IFDIR,
        MountPointKind::File => libc::S_IFREG,
    };
    let mut data = format!(
        "fd={},rootmode={root_mode:o},user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        geteuid(),
        getegid()
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    if let Some(size) = options.max_read {
        data.push_str(&format!(",max_read={size}"));
    }
    point.namespace().within(|| {
        mount2(Some(spec), point.dir(), Some(FS_TYPE), options.flags, Some(data.as_str()))
            .map_err(|e| Error::failed("cannot mount").on(point.dir()).because(e))
    })?;
    Ok(device.into())
}

fn open_fuse_device() -> Result<File> {
    const FUSE_DEVICE: &str = "/dev/fuse";
    OpenOptions::new().read(true).write(true).open(FUSE_DEVICE).map_err(|e| {
        let missing = matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO));
        let error = Error::new(ErrorKind::System, "cannot open").on(FUSE_DEVICE).because(e);
        if missing { error.hint("is the kernel's FUSE module loaded? modprobe fuse") } else { error }
    })
}

/// The flags that fusermount3 accepts from users.
const USER_FLAGS: [(MsFlags, &str); 7] = [
    (MsFlags::MS_RDONLY, "ro"),
    (MsFlags::MS_NOSUID, "nosuid"),
    (MsFlags::MS_NODEV, "nodev"),
    (MsFlags::MS_NOEXEC, "noexec"),
    (MsFlags::MS_SYNCHRONOUS, "sync"),
    (MsFlags::MS_NOATIME, "noatime"),
    (MsFlags::MS_DIRSYNC, "dirsync"),
];

fn mount_as_user(spec: &OsStr, point: &MountPoint, options: &MountOptions) -> Result<OwnedFd> {
    if point.namespace().is_other() {
        return Err(Error::usage("only root can mount in another namespace"));
    }
    let mut list = OsString::from("subtype=blkholefs,default_permissions");
    for (flag, word) in USER_FLAGS {
        if options.flags.contains(flag) {
            list.push(",");
            list.push(word);
        }
    }
    if options.allow_other {
        list.push(",allow_other");
    }
    if let Some(size) = options.max_read {
        list.push(format!(",max_read={size}"));
    }
    list.push(",fsname=");
    list.push(fusermount::escaped(spec));
    fusermount::mount(point.dir(), &list)
}

fn raise_read_ahead(device: DeviceId) {
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(error) = fs::write(Path::new(&path), READ_AHEAD_KIB.to_string()) {
        log::debug!("{path}: cannot raise: {error}");
    }
}
