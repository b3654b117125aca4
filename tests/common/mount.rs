//! Mounts of the program under test.

use std::fs::{self, File};
use std::io::Read as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::check::check;
use super::image::Image;
use super::loop_device::Loop;
use super::{try_run, wait_until};

/// A foreground `blkholefs mount`. Dropping this value unmounts it, and panics when the daemon fails.
pub struct Mount {
    daemon: Child,
    directory: tempfile::TempDir,
    log: tempfile::TempPath,
    file: PathBuf,
    killed: bool,
    ended: bool,
}

impl Mount {
    /// Mounts a device (or anything else that SPEC may be).
    pub fn new(spec: &Path) -> Self {
        Self::with_options(spec, &[])
    }

    /// [`Mount::new`] with additional options on the command line.
    pub fn with_options(spec: &Path, options: &[&str]) -> Self {
        Self::below(&std::env::temp_dir(), spec, options)
    }

    /// [`Mount::new`], with files that can be written.
    pub fn writable(spec: &Path) -> Self {
        Self::with_options(spec, &["-o", "rw"])
    }

    /// Mounts a directory of devices on a directory inside of it.
    pub fn inside(spec: &Path) -> Self {
        Self::below(spec, spec, &[])
    }

    /// Mounts a directory of devices on a directory inside of `place`.
    pub fn of_inside(spec: &Path, place: &Path) -> Self {
        Self::below(place, spec, &[])
    }

    fn below(parent: &Path, spec: &Path, options: &[&str]) -> Self {
        let directory =
            tempfile::Builder::new().prefix("blkholefs-").tempdir_in(parent).expect("a temporary directory");
        let (log, log_path) = tempfile::NamedTempFile::new().expect("a temporary file").into_parts();
        let mut command = Command::new(env!("CARGO_BIN_EXE_blkholefs"));
        command.args(["mount", "-f"]).args(options).arg(spec).arg(directory.path());
        let daemon =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("the program starts");
        let file = directory.path().join(spec.file_name().unwrap_or_default());
        let mut mount = Self { daemon, directory, log: log_path, file, killed: false, ended: false };
        let up = wait_until(|| mount.is_mounted() || !mount.is_running()) && mount.is_mounted();
        assert!(up, "{command:?} mounts nothing: {}", mount.log());
        mount
    }

    /// The file that shows the device, when SPEC is one device.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The mountpoint.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.daemon.id()
    }

    /// Whether the daemon has a file or device open. A close(2) does not wait for it: after the last one, the daemon closes
    /// the device a moment later.
    pub fn has_open(&self, path: &Path) -> bool {
        let files = fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("the daemon runs").flatten();
        files.into_iter().any(|file| fs::read_link(file.path()).is_ok_and(|open| open == path))
    }

    /// Kills the daemon; its mount stays until this value is dropped.
    pub fn kill(&mut self) {
        self.daemon.kill().expect("the daemon is our child");
        self.daemon.wait().expect("the daemon is our child");
        self.killed = true;
    }

    /// Sends SIGTERM to the daemon, which unmounts.
    pub fn terminate(&mut self) {
        self.killed = true;
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()).expect("a process id"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("the daemon is our child");
    }

    /// Where the daemon's threads are in the kernel, for messages.
    pub fn stacks(&self) -> String {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stack")).ok()).collect()
    }

    /// What the daemon wrote to standard error so far.
    pub fn log(&self) -> String {
        let mut text = String::new();
        File::open(&self.log).and_then(|mut file| file.read_to_string(&mut text)).expect("the log can be read");
        text
    }

    /// Ends all requests with an error: a daemon that is blocked in a request to its own mount
    /// cannot even be killed.
    fn abort(&self) {
        let control = self.directory.path().with_extension("control");
        let Some(minor) = self.device().and_then(|device| Some(device.split_once(':')?.1.to_owned())) else { return };
        let made = std::fs::create_dir(&control).is_ok();
        let mounted = made && Command::new("mount").args(["-t", "fusectl", "none"]).arg(&control).status().is_ok();
        if mounted {
            let _ = std::fs::write(control.join(minor).join("abort"), "1");
            let _ = Command::new("umount").arg(&control).status();
        }
        let _ = std::fs::remove_dir(&control);
    }

    /// Whether the mount is there.
    pub fn is_mounted(&self) -> bool {
        self.device().is_some()
    }

    /// The number of the file system, if it is mounted.
    fn device(&self) -> Option<String> {
        let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").expect("proc is mounted");
        let directory = self.directory.path().to_str().expect("a temporary path is text");
        let line = mounts.lines().find(|line| line.split(' ').nth(4) == Some(directory))?;
        line.split(' ').nth(2).map(ToOwned::to_owned)
    }

    /// Removes the mount and the daemon of a failed test.
    fn clear_away(&mut self) {
        self.abort();
        let _ = Command::new("umount").arg("--lazy").arg(self.directory.path()).status();
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }

    /// Checks that the daemon has ended by itself, and has unmounted.
    pub fn ended(mut self) {
        assert!(!self.is_running() && !self.is_mounted(), "{}", self.log());
        self.ended = true;
    }

    /// Whether the daemon has not ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.daemon.try_wait(), Ok(None))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let mut lines: Vec<_> = log.lines().collect();
            lines.dedup();
            eprintln!("the end of the daemon's log:\n{}", lines[lines.len().saturating_sub(20)..].join("\n"));
            return self.clear_away();
        }
        if self.ended {
            return;
        }
        // Another test's child has this process's descriptors between its fork and its exec, and so the mount is busy.
        let mut unmounted = Err(String::new());
        if self.killed && !self.is_mounted() {
            unmounted = Ok(String::new());
        }
        let done = unmounted.is_ok()
            || wait_until(|| {
                unmounted = try_run("umount", [self.directory.path()], "");
                !unmounted.as_ref().is_err_and(|error| error.contains("busy"))
            });
        let ended = done && unmounted.is_ok() && wait_until(|| !self.is_running());
        if !ended {
            self.clear_away();
        }
        assert!(unmounted.is_ok(), "{unmounted:?}");
        let status = self.daemon.wait().expect("the daemon is our child");
        assert!(ended && (status.success() || self.killed), "after umount the daemon: {status}: {}", self.log());
    }
}

/// An image, the loop device over it, and the mount of that.
pub struct LoopMount {
    /// The mount of the loop device.
    pub mount: Mount,
    /// The loop device.
    pub device: Loop,
    /// The image.
    pub image: Image,
}

impl LoopMount {
    /// An image of `size` bytes with data in the ranges.
    pub fn new(size: u64, data: &[Range<u64>]) -> Self {
        Self::with_options(size, data, &[])
    }

    /// [`LoopMount::new`] with additional options for losetup(8).
    pub fn with_options(size: u64, data: &[Range<u64>], options: &[&str]) -> Self {
        let image = Image::with_data(size, data);
        let device = Loop::with_options(image.path(), options);
        let mount = Mount::new(device.path());
        Self { mount, device, image }
    }

    /// The file that shows the device.
    pub fn file(&self) -> &Path {
        self.mount.file()
    }

    /// Checks holes, bytes and blocks against the device.
    pub fn check(&self) {
        check(self.file(), self.device.path());
    }
}
