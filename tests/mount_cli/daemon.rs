//! The daemon: its descriptors, its privileges, and its reaction to signals.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bench::{Bench, Ran, mount_at};
use crate::common::check::check;
use crate::common::{needs, wait_until};

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).expect("the daemon runs");
}

/// A daemon in the foreground that has reported READY=1 to its service manager.
struct Foreground {
    child: Child,
    log: std::path::PathBuf,
}

impl Foreground {
    fn new(bench: &Bench) -> Self {
        Self::with_levels(bench, None)
    }

    /// With a value of `RUST_LOG`.
    fn with_levels(bench: &Bench, levels: Option<&str>) -> Self {
        let manager = UnixDatagram::bind(bench.path("manager")).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let log = bench.path("log");
        let mut command = Command::new(bench.bin("blkholefs"));
        command.args(["mount", "-f"]).arg(bench.device.path()).arg(bench.mnt());
        command.env("NOTIFY_SOCKET", bench.path("manager")).stderr(File::create(&log).unwrap());
        command.env_remove("RUST_LOG").envs(levels.map(|levels| ("RUST_LOG", levels)));
        let child = command.spawn().unwrap();
        let mut word = [0; 64];
        let length = manager.recv(&mut word).expect("the service reports that it is ready");
        assert_eq!(&word[..length], b"READY=1");
        assert!(bench.mounted().is_some(), "the mount exists when the service is ready");
        Self { child, log }
    }

    fn wait_for(&self, line: &str) {
        let text = || fs::read_to_string(&self.log).unwrap();
        assert!(wait_until(|| text().contains(line)), "no {line:?} in {}", text());
    }
}

#[test]
fn foreground_service_logs_and_obeys() {
    needs!(root);
    let bench = Bench::new();
    let mut service = Foreground::new(&bench);
    let device = bench.device.path().to_str().unwrap();
    service.wait_for(&format!("blkholefs: {device} is mounted on "));
    signal(service.child.id(), Signal::SIGUSR1);
    service.wait_for("0 open files on 0 devices");
    let open = File::open(bench.file()).unwrap();
    signal(service.child.id(), Signal::SIGUSR1);
    service.wait_for("1 open files on 1 devices");
    signal(service.child.id(), Signal::SIGHUP);
    service.wait_for("dropped the maps of 1 open devices");
    signal(service.child.id(), Signal::SIGUSR2);
    service.wait_for("debug lines are on");
    signal(service.child.id(), Signal::SIGUSR2);
    service.wait_for("debug lines are off");
    check(&bench.file(), bench.device.path());
    drop(open);
    signal(service.child.id(), Signal::SIGINT);
    assert_eq!(service.child.wait().unwrap().code(), Some(0));
    service.wait_for("is unmounted");
    bench.assert_nothing_left();
}

#[test]
fn term_unmounts() {
    needs!(root);
    let bench = Bench::new();
    let daemon = bench.mount(&[]);
    signal(daemon, Signal::SIGTERM);
    assert!(wait_until(|| bench.mounted().is_none()));
    bench.assert_nothing_left();
}

/// A mount with open files is detached at once. Later reads of these files fail and never return zeros.
#[test]
fn term_unmounts_although_files_are_open() {
    needs!(root);
    let bench = Bench::new();
    let daemon = bench.mount(&[]);
    let mut open = File::open(bench.file()).unwrap();
    signal(daemon, Signal::SIGTERM);
    bench.assert_becomes_unmounted();
    bench.assert_nothing_left();
    let mut bytes = [0; 4096];
    let error = open.read(&mut bytes).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
}

impl Bench {
    fn assert_becomes_unmounted(&self) {
        assert!(wait_until(|| self.mounted().is_none()), "still mounted");
    }
}

/// After the daemon is killed, its mount remains, and both helpers handle this state.
#[test]
fn killed_daemon_can_be_unmounted() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    let daemon = bench.mount(&[]);
    signal(daemon, Signal::SIGKILL);
    assert!(wait_until(|| fs::metadata(bench.mnt()).is_err()));
    bench.run("mount.blkholefs", [device, "mnt"]).fails(32, "already mounted here");
    let record = format!("/run/blkholefs/{}", bench.mounted().unwrap()[2].replace(':', "-"));
    let names_it = || fs::read_to_string(&record).unwrap_or_default().starts_with(&format!("{daemon}\n"));
    bench.umount();
    // Another process may be about to remove it at this moment.
    assert!(wait_until(|| !names_it()), "{record}");
    bench.mount(&[]);
    check(&bench.file(), bench.device.path());
    bench.umount();
}

/// If the command is interrupted during mount(2), the daemon removes the mount. Ctrl-C sends the signal to both
/// processes.
#[test]
fn interrupted_command_leaves_nothing() {
    needs!(root, programs["strace"]);
    let bench = Bench::new();
    for signal_to_both in [false, true] {
        let mut command = Command::new("strace");
        command.args(["-f", "-o", "trace", "-e", "trace=mount", "-e", "inject=mount:delay_enter=1s"]);
        command.arg(bench.bin("mount.blkholefs")).arg(bench.device.path()).arg(bench.mnt());
        let mut tracer = command.current_dir(bench.path("")).stderr(Stdio::null()).spawn().unwrap();
        let trace = || fs::read_to_string(bench.path("trace")).unwrap_or_default();
        assert!(wait_until(|| trace().contains(" mount(")), "{}", trace());
        let child = |pid: u32| -> u32 {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
            children.trim_end().parse().expect("there is one child")
        };
        let helper = child(tracer.id());
        if signal_to_both {
            signal(child(helper), Signal::SIGINT);
        }
        signal(helper, if signal_to_both { Signal::SIGINT } else { Signal::SIGKILL });
        tracer.wait().unwrap();
        assert!(trace().contains("+++ exited with 8 +++"), "{}", trace());
        bench.assert_nothing_left();
        fs::remove_file(bench.path("trace")).unwrap();
    }
}

/// A signal whose default action ends a process never leaves a mount without its daemon.
#[test]
fn every_signal_unmounts_or_does_nothing() {
    needs!(root);
    let bench = Bench::new();
    let send = |pid: u32, number: i32| crate::common::run("kill", [format!("-{number}"), pid.to_string()]);
    let daemon = bench.mount(&[]);
    for harmless in [libc::SIGXFSZ, libc::SIGPIPE, libc::SIGTSTP, libc::SIGTTOU, libc::SIGCHLD, libc::SIGWINCH] {
        send(daemon, harmless);
    }
    check(&bench.file(), bench.device.path());
    bench.umount();
    for number in [libc::SIGQUIT, libc::SIGALRM, libc::SIGXCPU, libc::SIGPROF, libc::SIGPWR, libc::SIGIO, 40] {
        send(bench.mount(&[]), number);
        assert!(wait_until(|| bench.mounted().is_none()), "signal {number}");
        bench.assert_nothing_left();
    }
}

/// umount(2) removes only the topmost mount of a path. The daemon must not unmount another mount that covers its own.
/// It serves requests until its own mount can be unmounted, so that no mount without a daemon is left.
#[test]
fn term_below_another_mount_ends_when_that_is_gone() {
    needs!(root);
    let bench = Bench::new();
    let mut service = Foreground::new(&bench);
    let inside = File::open(bench.file()).unwrap();
    nix::mount::mount(Some("over"), &bench.mnt(), Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();
    signal(service.child.id(), Signal::SIGTERM);
    service.wait_for("something else is mounted over it");
    assert_eq!((&inside).read(&mut [0; 4096]).unwrap(), 4096, "it is served");
    drop(inside);
    assert_eq!(bench.mounted().unwrap()[7..].last().map(String::as_str), Some("rw"), "the other mount stays");
    nix::mount::umount(&bench.mnt()).unwrap();
    assert!(wait_until(|| bench.mounted().is_none()));
    assert_eq!(service.child.wait().unwrap().code(), Some(0));
    bench.assert_nothing_left();
}

/// `RUST_LOG` adds lines, and the lines of the FUSE library are not shown.
#[test]
fn the_log_has_the_lines_that_the_user_chose() {
    needs!(root, programs["blockdev"]);
    let bench = Bench::new();
    for (levels, debug) in [(None, false), (Some("debug"), true), (Some("error"), false)] {
        let mut service = Foreground::with_levels(&bench, levels);
        drop(File::open(bench.file()).unwrap());
        // An ioctl(2) that no regular file has.
        let ran = Ran::of(Command::new("blockdev").arg("--getra").arg(bench.file()));
        assert_ne!(ran.code, 0, "{ran:?}");
        bench.umount();
        assert_eq!(service.child.wait().unwrap().code(), Some(0));
        let log = fs::read_to_string(&service.log).unwrap();
        assert_eq!(log.contains(": open "), debug, "{levels:?}: {log}");
        assert_eq!(log.contains(" is mounted on "), levels != Some("error"), "{levels:?}: {log}");
        assert!(!log.contains("Not Implemented") && !log.contains("unique"), "{levels:?}: {log}");
        fs::remove_file(bench.path("manager")).unwrap();
    }
}

#[test]
fn privileges_are_dropped_but_for_what_is_needed() {
    needs!(root);
    let bench = Bench::new();
    let daemon = bench.mount(&[]);
    let status = fs::read_to_string(format!("/proc/{daemon}/status")).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim).unwrap();
    // CAP_DAC_READ_SEARCH is 2, CAP_SYS_ADMIN is 21.
    let allowed = 1 << 2 | 1 << 21;
    for set in ["CapPrm:", "CapEff:", "CapInh:"] {
        assert_eq!(u64::from_str_radix(field(set), 16).unwrap() & !allowed, 0, "{set} {status}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    bench.umount();
}

/// Root's daemon can open an image that only its owner may read, after it has dropped most privileges.
#[test]
fn root_reads_private_images_of_others() {
    needs!(root);
    let bench = Bench::new();
    let private = bench.path("private");
    fs::create_dir(&private).unwrap();
    let image = private.join("image");
    fs::copy(bench.image.path(), &image).unwrap();
    for (path, mode) in [(&image, "0600"), (&private, "0700")] {
        crate::common::run("chmod", [mode.as_ref(), path.as_os_str()]);
        crate::common::run("chown", ["nobody".as_ref(), path.as_os_str()]);
    }
    bench.run("mount.blkholefs", [&image, &bench.mnt()]).succeeds();
    check(&bench.mnt().join("image"), &image);
    bench.umount();
}

/// The daemon keeps no directory, terminal or locked file of its caller open.
#[test]
fn the_daemon_keeps_nothing_of_its_caller_open() {
    needs!(root);
    let bench = Bench::new();
    let script = "exec 9>lock; flock 9; exec \"$@\"";
    let mount = bench.bin("mount.blkholefs");
    let words = ["-c", script, "sh", mount.to_str().unwrap(), bench.device.path().to_str().unwrap(), "mnt"];
    Ran::of(Command::new("sh").args(words).current_dir(bench.path(""))).succeeds();
    crate::common::run("flock", ["--nonblock".as_ref(), bench.path("lock").as_os_str(), "true".as_ref()]);
    let daemon = bench.daemon().unwrap();
    let link = |name: &str| fs::read_link(format!("/proc/{daemon}/{name}")).unwrap();
    assert_eq!(link("cwd"), Path::new("/"));
    for descriptor in ["fd/0", "fd/1", "fd/2"] {
        assert_eq!(link(descriptor), Path::new("/dev/null"), "{descriptor}");
    }
    let status = fs::read_to_string(format!("/proc/{daemon}/stat")).unwrap();
    let session = status.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap();
    assert_eq!(session, daemon.to_string(), "a session of its own");
    bench.umount();
}

/// Under systemd, standard error is the journal. The daemon keeps it open, and each line has a priority.
#[test]
fn journal_is_kept() {
    needs!(root);
    let bench = Bench::new();
    let journal = File::create(bench.path("journal")).unwrap();
    let named = journal.metadata().unwrap();
    let mut command = Command::new(bench.bin("mount.blkholefs"));
    command.env("JOURNAL_STREAM", format!("{}:{}", named.dev(), named.ino())).stderr(journal).stdin(Stdio::null());
    let status = command.arg(bench.device.path()).arg(bench.mnt()).status().unwrap();
    assert!(status.success());
    let lines = || fs::read_to_string(bench.path("journal")).unwrap();
    let device = bench.device.path().display();
    assert!(wait_until(|| lines().contains(&format!("<6>{device} is mounted on "))), "{}", lines());
    bench.umount();
    assert!(lines().lines().all(|line| line.starts_with("<6>")), "{}", lines());
}

/// With `-N`, the mount exists only in the other namespace. Both the helper with `-N` and a signal to the daemon
/// remove it.
#[test]
fn other_namespace() {
    needs!(root);
    let bench = Bench::new();
    let other = Other::new();
    let pid = other.0.id();
    let namespace = format!("/proc/{pid}/ns/mnt");
    let table = format!("/proc/{pid}/mountinfo");
    let there = || mount_at(&table, &bench.mnt());
    let device = bench.device.path().to_str().unwrap();

    bench.run("mount.blkholefs", [device, "mnt", "-N", &namespace]).succeeds();
    assert!(there().is_some() && bench.mounted().is_none());
    check(format!("/proc/{pid}/root{}", bench.file().display()).as_ref(), bench.device.path());
    bench.umount_by(&["mnt".into(), "-N".into(), namespace.clone().into()]);
    assert_eq!(there(), None);
    bench.assert_nothing_left();

    bench.run("mount.blkholefs", [device, "mnt", "-N", &namespace]).succeeds();
    signal(bench.daemon().unwrap(), Signal::SIGTERM);
    assert!(wait_until(|| there().is_none()));
    bench.assert_nothing_left();
}

/// A process in a mount namespace of its own.
pub struct Other(pub Child);

impl Other {
    /// A copy of this process's namespace, at the time of the call.
    pub fn new() -> Self {
        let mut command = Command::new("unshare");
        let child =
            command.args(["--mount", "sleep", "1000"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let name = format!("/proc/{}/comm", child.id());
        let other = Self(child);
        // The namespace is complete when unshare(1) executes its command.
        assert!(wait_until(|| fs::read_to_string(&name).unwrap() == "sleep\n"));
        other
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
