//! Peers: other programs that show a device or an image as a file through FUSE.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::common::wait_until;
use crate::floor::unmount;

/// `qemu-storage-daemon` with a FUSE export, unmounted with this value.
pub struct Qemu {
    daemon: Child,
    point: tempfile::NamedTempFile,
}

impl Qemu {
    /// The program, of Debian's `qemu-system-common` or `qemu-utils`.
    pub const PROGRAM: &str = "qemu-storage-daemon";

    /// Exports a device or an image.
    pub fn new(spec: &Path) -> Self {
        let driver = if spec.starts_with("/dev") { "host_device" } else { "file" };
        let point = tempfile::NamedTempFile::with_prefix("blkholefs-").expect("a temporary file");
        let mut command = Command::new(Self::PROGRAM);
        command.arg("--blockdev").arg(format!("driver={driver},node-name=n,read-only=on,filename={}", spec.display()));
        let export = format!("type=fuse,id=e,node-name=n,writable=off,mountpoint={}", point.path().display());
        command.arg("--export").arg(export).stdin(Stdio::null());
        let daemon = command.spawn().expect("the program was found");
        let peer = Self { daemon, point };
        let is_up = || File::open(peer.file()).and_then(|file| file.metadata()).is_ok_and(|found| found.len() > 0);
        assert!(wait_until(is_up), "{command:?} exports nothing");
        peer
    }

    /// The file that shows it.
    pub fn file(&self) -> PathBuf {
        self.point.path().to_owned()
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.daemon.id()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        unmount(self.point.path());
        let pid = i32::try_from(self.daemon.id()).expect("a process number");
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        let _ = self.daemon.wait();
    }
}
