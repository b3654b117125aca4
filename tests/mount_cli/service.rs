//! The unit of `mount-helpers/systemd/`, without systemd. The test runs its commands in the order in which systemd
//! would.

use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bench::{Bench, Ran, mount_at};
use crate::common::check::check;
use crate::common::{needs, wait_until};

const UNIT: &str = include_str!("../../mount-helpers/systemd/blkholefs@.service");

/// The values of a key, with the specifiers of a unit for the bench's device replaced.
fn values(bench: &Bench, key: &str) -> Vec<String> {
    let instance = bench.device.path().to_str().unwrap()[1..].replace('/', "-");
    let replaced = |value: &str| {
        let value = value.replace("%f", bench.device.path().to_str().unwrap()).replace("%i", &instance);
        value.replace("%t", bench.path("run").to_str().unwrap())
    };
    let lines = UNIT.lines().filter_map(|line| line.split_once('='));
    lines.filter(|(name, _)| *name == key).map(|(_, value)| replaced(value)).collect()
}

/// The command of a line: words between blanks, as this unit has no others.
fn command(bench: &Bench, line: &str) -> Command {
    let words: Vec<_> = line.trim_start_matches('-').split(' ').collect();
    let program = if words[0] == "/usr/sbin/blkholefs" { bench.bin("blkholefs") } else { words[0].into() };
    let mut command = Command::new(program);
    command.args(&words[1..]).stdin(Stdio::null());
    command
}

fn run_all(bench: &Bench, key: &str, main: u32) {
    let lines = values(bench, key);
    assert!(!lines.is_empty(), "{key}");
    for line in lines {
        let ran = Ran::of(&mut command(bench, &line.replace("$MAINPID", &main.to_string())));
        assert!(ran.code == 0 || line.starts_with('-'), "{line}: {ran:?}");
    }
}

#[test]
fn unit_starts_reloads_and_stops() {
    needs!(root);
    let bench = Bench::new();
    fs::create_dir(bench.path("run")).unwrap();
    let manager = UnixDatagram::bind(bench.path("manager")).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    for killed in [false, true] {
        run_all(&bench, "ExecStartPre", 0);
        let mut start = command(&bench, &values(&bench, "ExecStart")[0]);
        start.env("NOTIFY_SOCKET", bench.path("manager")).stderr(File::create(bench.path("log")).unwrap());
        let mut main = start.spawn().unwrap();
        manager.recv(&mut [0; 64]).expect("the service reports that it is ready");
        let place = PathBuf::from(start.get_args().last().unwrap());
        let there = || mount_at("/proc/self/mountinfo", &place).is_some();
        check(&place.join(bench.device.name()), bench.device.path());
        run_all(&bench, "ExecReload", main.id());
        assert!(wait_until(|| fs::read_to_string(bench.path("log")).unwrap().contains("dropped the maps")));
        assert!(there());
        let signal = if killed { Signal::SIGKILL } else { Signal::SIGTERM };
        kill(Pid::from_raw(i32::try_from(main.id()).unwrap()), signal).unwrap();
        main.wait().unwrap();
        assert_eq!(there(), killed);
        run_all(&bench, "ExecStopPost", 0);
        assert!(!there() && !place.exists(), "{}", place.display());
    }
}

/// systemd makes the directories of a unit again before each of its commands, which fails where one is the mount.
#[test]
fn no_directory_of_the_unit_is_the_mount() {
    needs!(root);
    let bench = Bench::new();
    let start = command(&bench, &values(&bench, "ExecStart")[0]);
    let place = Path::new(start.get_args().last().unwrap());
    for directory in values(&bench, "RuntimeDirectory") {
        assert!(!bench.path("run").join(directory).starts_with(place), "{}", place.display());
    }
}

#[test]
fn systemd_reads_the_units() {
    needs!(programs["systemd-analyze"]);
    let units = tempfile::tempdir().unwrap();
    let service = UNIT.replace("/usr/sbin/blkholefs", env!("CARGO_BIN_EXE_blkholefs"));
    fs::write(units.path().join("blkholefs@dev-loop0.service"), service).unwrap();
    let mount = include_str!("../../mount-helpers/systemd/mnt-thin.mount");
    fs::write(units.path().join("mnt-thin.mount"), mount).unwrap();
    for unit in ["blkholefs@dev-loop0.service", "mnt-thin.mount"] {
        let mut command = Command::new("systemd-analyze");
        command.args(["verify", "--man=no", "--recursive-errors=no"]).arg(units.path().join(unit));
        Ran::of(&mut command).succeeds();
    }
}
