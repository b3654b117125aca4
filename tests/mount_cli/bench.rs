//! The program under the names that mount(8) looks for, a device, and a place to mount it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::common::image::Image;
use crate::common::loop_device::Loop;
use crate::common::{MIB, wait_until};

/// The names of the program.
pub const NAMES: [&str; 4] = ["mount.blkholefs", "mount.fuse.blkholefs", "umount.blkholefs", "umount.fuse.blkholefs"];

/// The directory and device of one test. Dropping it removes both, and panics if a mount or a daemon is left.
pub struct Bench {
    /// The loop device.
    pub device: Loop,
    /// The image of the device.
    pub image: Image,
    directory: tempfile::TempDir,
}

impl Bench {
    /// Creates a device of 1 MiB with a hole, and a directory `mnt` to mount it on.
    pub fn new() -> Self {
        let image = Image::with_data(MIB, &[0..MIB / 4, MIB / 2..MIB]);
        let device = Loop::new(image.path());
        let directory = tempfile::Builder::new().prefix("blkholefs-cli-").tempdir().expect("a temporary directory");
        // Ordinary users access the directory too.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
        let bench = Self { device, image, directory };
        fs::create_dir(bench.path("bin")).expect("it is empty");
        fs::create_dir(bench.mnt()).expect("it is empty");
        for name in NAMES.into_iter().chain(["blkholefs"]) {
            symlink(env!("CARGO_BIN_EXE_blkholefs"), bench.bin(name)).expect("it is empty");
        }
        bench
    }

    /// A path in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The program under a name.
    pub fn bin(&self, name: &str) -> PathBuf {
        self.path("bin").join(name)
    }

    /// The place to mount on.
    pub fn mnt(&self) -> PathBuf {
        self.path("mnt")
    }

    /// The file that shows the device.
    pub fn file(&self) -> PathBuf {
        self.mnt().join(self.device.name())
    }

    /// Runs the program under a name.
    pub fn run<S: AsRef<OsStr>>(&self, name: &str, words: impl IntoIterator<Item = S>) -> Ran {
        Ran::of(Command::new(self.bin(name)).args(words).current_dir(self.directory.path()))
    }

    /// Mounts the device on `mnt` with further arguments for the helper, and returns the daemon's process ID.
    pub fn mount(&self, words: &[&str]) -> u32 {
        let operands =
            [self.device.path().as_os_str(), self.directory.path().join("mnt").as_os_str()].map(OsStr::to_owned);
        let words = words.iter().map(|word| OsStr::new(word).to_owned());
        self.run("mount.blkholefs", operands.into_iter().chain(words)).succeeds();
        self.daemon().expect("a daemon serves the mount")
    }

    /// Unmounts `mnt` with the helper.
    pub fn umount(&self) {
        self.umount_by(&[self.mnt()]);
    }

    /// Unmounts with these arguments for the helper.
    pub fn umount_by(&self, words: &[PathBuf]) {
        let mut ran = self.run("umount.blkholefs", words);
        // A program that another test is about to start holds the files of this process until its exec(2).
        let ended = wait_until(|| {
            let busy = ran.err.contains("busy");
            if busy {
                ran = self.run("umount.blkholefs", words);
            }
            !busy
        });
        assert!(ended, "{ran:?}");
        ran.succeeds();
    }

    /// The process in the record of the mount on `place`. Reads only root's records.
    pub fn server(&self, place: &Path) -> u32 {
        let device = &mount_at("/proc/self/mountinfo", place).expect("it is mounted")[2];
        let record = fs::read_to_string(format!("/run/blkholefs/{}", device.replace(':', "-"))).expect("a record");
        record.lines().next().expect("a line").parse().expect("a process")
    }

    /// The fields of the mount table's line for `mnt`.
    pub fn mounted(&self) -> Option<Vec<String>> {
        mount_at("/proc/self/mountinfo", &self.mnt())
    }

    /// The process that was started with this test's directory among its words and still runs.
    pub fn daemon(&self) -> Option<u32> {
        let ours = self.directory.path().to_str().expect("a temporary path is text");
        let is_daemon = |pid: &u32| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words);
            let own = words.split('\0').next().is_some_and(|name| name.contains("blkholefs"));
            own && words.contains(ours)
        };
        let numbers = fs::read_dir("/proc").expect("proc is mounted").flatten();
        numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(is_daemon)
    }

    /// Checks that nothing is mounted and no daemon runs.
    pub fn assert_nothing_left(&self) {
        assert_eq!(self.mounted(), None, "still mounted");
        assert!(wait_until(|| self.daemon().is_none()), "process {:?} is left", self.daemon());
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for place in [self.mnt(), self.path("home/mnt"), self.path("home/file")] {
                let _ = Command::new("umount").arg("--lazy").arg(place).stderr(Stdio::null()).status();
            }
            if let Some(pid) = self.daemon() {
                let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
            }
            return;
        }
        self.assert_nothing_left();
    }
}

/// The fields of the topmost line for a place in a mount table.
pub fn mount_at(table: &str, place: &Path) -> Option<Vec<String>> {
    let text = fs::read_to_string(table).expect("proc is mounted");
    let place = place.to_str().expect("a temporary path is text");
    let mut lines = text.lines().map(|line| line.split(' ').map(str::to_owned).collect::<Vec<_>>());
    lines.rfind(|fields| fields.get(4).is_some_and(|field| field == place))
}

/// Asserts that a daemon ended before `umount -v` returned with this output, unless the namespace of another test has a
/// copy of the mount.
pub fn assert_ended(daemon: u32, ran: &Ran) {
    let elsewhere = ran.err.contains("serves a mount in another namespace, and has no device open");
    assert_eq!(ran.code, 0, "{ran:?}");
    // A zombie process has an empty command line.
    let words = fs::read(format!("/proc/{daemon}/cmdline")).unwrap_or_default();
    assert!(elsewhere || words.is_empty(), "the daemon is running after umount: {ran:?}");
}

/// The output and the exit code of a program.
#[derive(Debug)]
pub struct Ran {
    /// The exit code; -1 for a signal.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ran {
    /// Runs a command to its end. It also waits until both pipes are closed, so it hangs if a daemon keeps one of
    /// them open.
    pub fn of(command: &mut Command) -> Self {
        let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().expect("the program starts");
        let text = |bytes| String::from_utf8(bytes).expect("messages are text");
        Self { code: status.code().unwrap_or(-1), out: text(stdout), err: text(stderr) }
    }

    /// Panics unless it ended with 0 and wrote nothing to standard error.
    pub fn succeeds(&self) {
        assert_eq!((self.code, self.err.as_str()), (0, ""), "{self:?}");
    }

    /// Panics unless it ended with `code` and one line, plus perhaps a hint, that has `text` in it.
    pub fn fails(&self, code: i32, text: &str) {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.err.contains(text) && (1..=2).contains(&self.err.lines().count()), "expected {text:?}: {self:?}");
        assert_eq!(self.out, "", "{self:?}");
    }
}
