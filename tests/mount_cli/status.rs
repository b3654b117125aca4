//! `blkholefs status`: what it prints of mounts that are idle, open, degraded, stopped, killed, and of other users.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::bench::{Bench, Ran, mount_at};
use crate::common::{MIB, assert_becomes, needs, run, wait_until};
use crate::daemon::Other;

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).expect("the daemon runs");
}

/// Whether all threads of a process are stopped.
fn is_stopped(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").flatten();
    let mut states = threads.map(|thread| fs::read_to_string(thread.path().join("status")).unwrap_or_default());
    states.all(|status| status.contains("\nState:\tT"))
}

fn seek_data(file: &File, offset: i64) -> Option<i64> {
    nix::unistd::lseek(file, offset, nix::unistd::Whence::SeekData).ok()
}

impl Bench {
    /// The only mount on `place`, as `status --json` has it.
    fn status_of(&self, place: &Path) -> Value {
        let ran = self.run("blkholefs", ["status".as_ref(), "--json".as_ref(), place.as_os_str()]);
        ran.succeeds();
        only_mount(&ran)
    }

    fn status(&self) -> Value {
        self.status_of(&self.mnt())
    }

    /// What `status` prints of `mnt`.
    fn table(&self) -> String {
        let ran = self.run("blkholefs", ["status".as_ref(), self.mnt().as_os_str()]);
        ran.succeeds();
        ran.out
    }

    /// The socket of the daemon `pid` on `mnt`.
    fn socket(&self, pid: u32) -> PathBuf {
        let device = self.mounted().expect("it is mounted")[2].replace(':', "-");
        Path::new("/run/blkholefs").join(format!("{device}.{pid}.socket"))
    }
}

fn only_mount(ran: &Ran) -> Value {
    let all: Value = serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{error}: {ran:?}"));
    let mounts = all["mounts"].as_array().expect("a list");
    assert_eq!(mounts.len(), 1, "{ran:?}");
    mounts[0].clone()
}

#[test]
fn idle_and_open_files() {
    needs!(root);
    let bench = Bench::new();
    let daemon = bench.mount(&["-o", "allow_other,compact"]);
    let idle = bench.status();
    let device = bench.device.path().to_str().unwrap();
    let place = bench.mnt();
    for (key, value) in [
        ("spec", json!(device)),
        ("directory", json!(place)),
        ("mountpoints", json!([place])),
        ("options", json!("ro,allow_other,compact")),
        ("writable", json!(false)),
        ("user", json!(0)),
        ("pid", json!(daemon)),
        ("state", json!("serving")),
        ("no-answer-because", Value::Null),
        ("open-files", json!(0)),
        ("files", json!([])),
        ("degraded", json!([])),
        ("all-data", json!([])),
    ] {
        assert_eq!(idle[key], value, "{key}");
    }
    assert!(idle["memory"]["resident"].as_u64().unwrap() > MIB);
    assert_eq!(idle["memory"]["maps-limit"], json!(256 * MIB));
    let open = [bench.file(), bench.file()].map(|file| File::open(file).unwrap());
    assert_eq!(seek_data(&open[0], 0), Some(0));
    let used = bench.status();
    assert_eq!(used["open-files"], json!(2));
    assert_eq!(used["files"], json!([{ "file": bench.device.name(), "opens": 2, "maps": 0 }]));
    let table = bench.table();
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["SPEC", "DIR", "PID", "OPEN", "MAPS", "AHEAD", "RSS", "OPTIONS"]);
    assert_eq!(lines[1][..5], [device, place.to_str().unwrap(), &daemon.to_string(), "2", "0B"]);
    assert_eq!((lines.len(), lines[1][7]), (2, "ro,allow_other,compact"));
    drop(open);
    assert_becomes(&json!(0), || bench.status()["open-files"].clone());
    let (socket, mode) = (bench.socket(daemon), |path: &Path| fs::symlink_metadata(path).unwrap().permissions().mode());
    assert_eq!(mode(&socket) & 0o777, 0o600);
    bench.umount();
    bench.assert_nothing_left();
    assert!(!socket.exists(), "the socket is removed");
}

/// The backing file of the loop device is removed before the file is opened: its holes cannot be known.
#[test]
fn a_degraded_file_has_a_reason_and_a_time() {
    needs!(root);
    let bench = Bench::new();
    bench.mount(&[]);
    let (image, copied) = (bench.image.path().to_owned(), bench.path("copied"));
    fs::copy(&image, &copied).unwrap();
    // The kernel follows a rename, and notes "(deleted)" in the path of a file that is removed.
    fs::remove_file(&image).unwrap();
    let file = File::open(bench.file()).unwrap();
    assert_eq!(seek_data(&file, 0), Some(0));
    let status = bench.status();
    let degraded = status["degraded"].as_array().unwrap();
    assert_eq!(degraded.len(), 1, "{status}");
    assert_eq!(degraded[0]["file"], json!(bench.device.name()));
    assert_eq!(degraded[0]["layer"], json!(bench.device.path()));
    assert!(degraded[0]["reason"].as_str().unwrap().contains("its backing file is not reachable"), "{status}");
    let since = degraded[0]["since"].as_str().expect("a time").to_owned();
    let now = run("date", ["--utc", "+%Y-%m-%dT%H:%M:%SZ"]);
    assert!(since.as_str() <= now.trim_end() && since.len() == 20 && since.starts_with("20"), "{since}, {now}");
    assert_eq!(bench.status()["degraded"][0]["since"], json!(since), "the time of the first");
    let line = format!("  {}: degraded to data since {since}: ", bench.device.name());
    assert!(bench.table().lines().any(|found| found.starts_with(&line)), "{}", bench.table());
    drop(file);
    fs::copy(&copied, &image).unwrap();
    assert_becomes(&json!(0), || bench.status()["open-files"].clone());
    assert_eq!(bench.status()["degraded"], json!([]), "no file is open");
    bench.umount();
}

/// A view whose device has no file system is all data, and that is no failure.
#[test]
fn what_is_data_by_design_is_no_failure() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    let ran = bench.run("mount.blkholefs", [device, "mnt", "-o", "used"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let view = format!("{}.used", bench.device.name());
    let file = File::open(bench.mnt().join(&view)).unwrap();
    assert_eq!(seek_data(&file, 0), Some(0));
    let status = bench.status();
    assert_eq!((&status["degraded"], &status["all-data"][0]["file"]), (&json!([]), &json!(view)), "{status}");
    assert!(bench.table().contains(&format!("\n  {view}: all data: ")), "{}", bench.table());
    drop(file);
    bench.umount();
}

#[test]
fn a_killed_daemon_is_listed_until_its_mount_is_gone() {
    needs!(root);
    let bench = Bench::new();
    let daemon = bench.mount(&[]);
    let socket = bench.socket(daemon);
    assert!(fs::symlink_metadata(&socket).unwrap().file_type().is_socket());
    signal(daemon, Signal::SIGKILL);
    assert!(wait_until(|| fs::metadata(bench.mnt()).is_err()));
    assert_becomes(&json!("killed"), || bench.status()["state"].clone());
    let status = bench.status();
    assert_eq!(status["spec"], json!(bench.device.path()));
    // A daemon of another test may have removed the record already.
    assert!([json!(daemon), Value::Null].contains(&status["pid"]), "{status}");
    assert_eq!((&status["open-files"], &status["memory"]["resident"]), (&Value::Null, &Value::Null));
    let place = bench.mnt();
    let advice = format!("\n  the daemon was killed and the mount is left: umount {}\n", place.display());
    assert!(bench.table().contains(&advice), "{}", bench.table());
    // The next daemon removes the record.
    let other = Bench::new();
    other.mount(&[]);
    let status = bench.status();
    assert_eq!((&status["state"], &status["pid"]), (&json!("killed"), &Value::Null), "{status}");
    other.umount();
    bench.umount();
    assert!(wait_until(|| !socket.exists()), "the socket goes with the record");
    let ran = bench.run("blkholefs", [OsStr::new("status"), place.as_os_str()]);
    ran.fails(1, &format!("{}: not a mount of blkholefs", place.display()));
}

#[test]
fn a_stopped_daemon_is_not_waited_for() {
    needs!(root);
    let (bench, other) = (Bench::new(), Bench::new());
    let daemon = bench.mount(&[]);
    other.mount(&[]);
    signal(daemon, Signal::SIGSTOP);
    assert!(wait_until(|| is_stopped(daemon)), "its threads stop one after the other");
    let start = Instant::now();
    let places = [bench.mnt(), other.mnt()];
    let ran = bench.run("blkholefs", ["status".as_ref(), places[0].as_os_str(), places[1].as_os_str()]);
    let took = start.elapsed();
    signal(daemon, Signal::SIGCONT);
    ran.succeeds();
    assert!(took < Duration::from_secs(30), "{took:?}");
    let lines: Vec<&str> = ran.out.lines().collect();
    assert!(lines[1].contains(bench.device.path().to_str().unwrap()), "from the record: {ran:?}");
    assert_eq!((lines[2], lines.len()), ("  no answer of the daemon: it did not answer within 5 s", 4), "{ran:?}");
    assert_becomes(&json!("serving"), || bench.status()["state"].clone());
    bench.umount();
    other.umount();
}

/// A client that connects and reads nothing delays neither other clients for long, nor the unmount.
#[test]
fn clients_that_never_read_do_no_harm() {
    needs!(root);
    let bench = Bench::new();
    let daemon = bench.mount(&[]);
    let hung: Vec<_> = (0..20).map(|_| UnixStream::connect(bench.socket(daemon)).unwrap()).collect();
    assert_eq!(bench.status()["state"], json!("serving"));
    let start = Instant::now();
    bench.umount();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    bench.assert_nothing_left();
    drop(hung);
}

#[test]
fn ten_commands_at_a_time_all_get_an_answer() {
    needs!(root);
    let bench = Bench::new();
    bench.mount(&[]);
    let open = File::open(bench.file()).unwrap();
    let place = bench.mnt();
    let spawn = |_| {
        let mut command = Command::new(bench.bin("blkholefs"));
        command.args(["status".as_ref(), "--json".as_ref(), place.as_os_str()]).stdout(Stdio::piped()).spawn().unwrap()
    };
    let commands: Vec<_> = (0..10).map(spawn).collect();
    for command in commands {
        let output = command.wait_with_output().unwrap();
        let all: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((output.status.code(), &all["mounts"][0]["open-files"]), (Some(0), &json!(1)), "{all}");
    }
    drop(open);
    bench.umount();
}

/// Names with line breaks, escapes and bytes that are not UTF-8, of a service in the foreground.
#[test]
fn names_of_any_bytes_are_one_line_and_json() {
    needs!(root);
    let bench = Bench::new();
    let image = bench.path("i\n\x1b[2J \\040\"");
    let place = bench.path("").join(OsStr::from_bytes(b"d\n\xff"));
    fs::copy(bench.image.path(), &image).unwrap();
    fs::create_dir(&place).unwrap();
    let mut command = Command::new(bench.bin("blkholefs"));
    let log = File::create(bench.path("log")).unwrap();
    let mut service = command.args(["mount", "-f"]).args([&image, &place]).stderr(log).spawn().unwrap();
    let words = ["status".as_ref(), "--json".as_ref(), place.as_os_str()];
    assert!(wait_until(|| bench.run("blkholefs", words).out.contains("\"state\": \"serving\"")));
    let status = bench.status_of(&place);
    assert_eq!(status["spec"], json!(image.to_str().unwrap()));
    assert_eq!(status["directory"], json!(format!("{}d\\n\\xff", bench.path("").display())));
    assert_eq!(status["pid"], json!(service.id()));
    let ran = bench.run("blkholefs", ["status".as_ref(), place.as_os_str()]);
    assert_eq!(ran.out.lines().count(), 2, "{ran:?}");
    assert!(ran.out.contains("i\\n\\u{1b}[2J \\040\"") && ran.out.contains("d\\n\\xff"), "{ran:?}");
    bench.umount_by(&[place]);
    assert_eq!(service.wait().unwrap().code(), Some(0));
}

#[test]
fn a_mount_in_another_namespace_and_a_bind_mount() {
    needs!(root);
    let bench = Bench::new();
    let other = Other::new();
    let namespace = format!("/proc/{}/ns/mnt", other.0.id());
    let device = bench.device.path().to_str().unwrap();
    bench.run("mount.blkholefs", [device, "mnt", "-N", &namespace]).succeeds();
    let status = bench.status();
    assert_eq!((&status["state"], &status["mountpoints"]), (&json!("serving"), &json!([])), "{status}");
    assert!(bench.table().ends_with("\n  not mounted in this mount namespace\n"), "{}", bench.table());
    bench.umount_by(&["mnt".into(), "-N".into(), namespace.into()]);
    bench.mount(&[]);
    let bind = bench.path("bind");
    fs::create_dir(&bind).unwrap();
    run("mount", ["--bind".as_ref(), bench.mnt().as_os_str(), bind.as_os_str()]);
    assert_eq!(bench.status_of(&bind)["mountpoints"], json!([bench.mnt(), bind]));
    assert!(bench.table().ends_with(&format!("\n  also mounted on {}\n", bind.display())), "{}", bench.table());
    run("umount", [&bind]);
    bench.umount();
}

/// A daemon in a container: its number in the record is that of its namespace, where it is the first process.
#[test]
fn a_daemon_in_another_pid_namespace_has_its_number_here() {
    needs!(root, programs["unshare"]);
    let bench = Bench::new();
    let place = bench.mnt();
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork"]).arg(bench.bin("blkholefs")).args(["mount", "-f"]);
    let mut container = command.arg(bench.device.path()).arg(&place).stderr(Stdio::null()).spawn().unwrap();
    let words = ["status".as_ref(), "--json".as_ref(), place.as_os_str()];
    assert!(wait_until(|| bench.run("blkholefs", words).out.contains("\"state\": \"serving\"")));
    let parent = container.id();
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
    let daemon: u32 = children.trim().parse().expect("one child");
    let record = Path::new("/run/blkholefs").join(bench.mounted().unwrap()[2].replace(':', "-"));
    assert!(fs::read_to_string(record).unwrap().starts_with("1\n"), "the case that is tested");
    assert_eq!(bench.status()["pid"], json!(daemon));
    let words: [OsString; 2] = ["-v".into(), place.into()];
    crate::bench::assert_ended(daemon, &bench.run("umount.blkholefs", words));
    assert_eq!(container.wait().unwrap().code(), Some(0));
}

/// What is no mount is an error, and the others are printed.
#[test]
fn directories_that_are_no_mounts_are_errors() {
    needs!(root);
    let bench = Bench::new();
    bench.mount(&[]);
    fs::create_dir(bench.path("empty")).unwrap();
    for words in [&["status", "empty", "mnt", "/proc"][..], &["status", "--json", "empty", "mnt", "/proc"]] {
        let ran = bench.run("blkholefs", words);
        let not_mounted = "empty: not a mount of blkholefs\nblkholefs: /proc: not a mount of blkholefs\n";
        assert_eq!((ran.code, ran.err), (1, format!("blkholefs: {not_mounted}")));
        assert_eq!(ran.out.matches(bench.device.path().to_str().unwrap()).count(), 1, "{}", ran.out);
    }
    bench.umount();
    bench.run("blkholefs", ["status", "-x"]).fails(1, "invalid option '-x'");
}

/// A system without mounts: no line but a sentence, or an empty list.
#[test]
fn without_mounts_there_is_a_sentence() {
    needs!(root, programs["unshare"]);
    let bench = Bench::new();
    // A user of whom there is no other mount, in a namespace where there is none of anybody.
    let script = "umount --all --types fuse.blkholefs; exec setpriv --reuid=65533 --clear-groups \"$@\"";
    let of = |words: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh"]).arg(program(&bench)).args(words);
        Ran::of(command.env("XDG_RUNTIME_DIR", bench.path("none")))
    };
    let (plain, json) = (of(&["status"]), of(&["status", "--json"]));
    plain.succeeds();
    json.succeeds();
    assert_eq!(plain.out, "no mounts of blkholefs\n");
    assert_eq!(serde_json::from_str::<Value>(&json.out).unwrap(), json!({ "mounts": [] }));
}

/// A copy of the program that every user can run.
fn program(bench: &Bench) -> PathBuf {
    let copy = bench.path("copy");
    run("cp", [env!("CARGO_BIN_EXE_blkholefs").as_ref(), copy.as_os_str()]);
    copy
}

/// A user sees all of the user's own mounts, and of root's what the kernel's list has. Root sees as much of the user's.
#[test]
fn an_ordinary_user_sees_own_mounts_and_that_there_are_others() {
    needs!(root, programs["fusermount3", "setpriv"]);
    let bench = Bench::new();
    bench.mount(&[]);
    let (home, copy) = (bench.path("home"), program(&bench));
    for directory in [&home, &home.join("mnt"), &home.join("run")] {
        fs::create_dir(directory).unwrap();
    }
    fs::copy(bench.image.path(), home.join("image")).unwrap();
    run("chown", ["-R".as_ref(), "nobody".as_ref(), home.as_os_str()]);
    let user = |words: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=nobody", "--regid=65534", "--clear-groups"]).arg(&copy).args(words);
        Ran::of(command.current_dir(&home).env("XDG_RUNTIME_DIR", home.join("run")))
    };
    user(&["mount", "image", "mnt"]).succeeds();
    let ran = user(&["status", "--json", "mnt"]);
    ran.succeeds();
    let own = only_mount(&ran);
    assert_eq!((&own["state"], &own["spec"]), (&json!("serving"), &json!("image")), "{own}");
    let ran = user(&["status", bench.mnt().to_str().unwrap()]);
    ran.succeeds();
    assert!(ran.out.ends_with("\n  a mount of root, who can see more of it\n"), "{ran:?}");
    assert!(ran.out.contains(bench.device.path().to_str().unwrap()), "{ran:?}");
    let place = home.join("mnt");
    let seen_by_root = bench.status_of(&place);
    assert_eq!((&seen_by_root["state"], &seen_by_root["pid"]), (&json!("other-user"), &Value::Null));
    user(&["umount", "mnt"]).succeeds();
    assert_eq!(mount_at("/proc/self/mountinfo", &place), None);
    assert_eq!(fs::read_dir(home.join("run/blkholefs")).unwrap().count(), 0);
    bench.umount();
}

/// A record of a version that wrote only the process id.
#[test]
fn a_record_of_an_older_version_is_read() {
    needs!(root);
    let bench = Bench::new();
    let daemon = bench.mount(&[]);
    let record = Path::new("/run/blkholefs").join(bench.mounted().unwrap()[2].replace(':', "-"));
    // The same file, so that the daemon has the lock of it.
    fs::write(&record, format!("{daemon}\n")).unwrap();
    fs::remove_file(bench.socket(daemon)).unwrap();
    let status = bench.status();
    assert_eq!((&status["spec"], &status["pid"]), (&json!(bench.device.path()), &json!(daemon)), "{status}");
    assert_eq!((&status["state"], &status["options"]), (&json!("no-answer"), &Value::Null));
    assert!(status["no-answer-because"].as_str().unwrap().contains("it has no socket"));
    let words: [OsString; 2] = ["-v".into(), bench.mnt().into()];
    crate::bench::assert_ended(daemon, &bench.run("umount.blkholefs", words));
}
