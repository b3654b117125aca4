//! systemd as the first process of a namespace: the automount of an fstab line, and the service of `mount-helpers/systemd/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::image::Image;
use crate::common::loop_device::Loop;
use crate::common::readme::indented;
use crate::common::{MIB, needs, run};

/// For a slow kernel; the idle timeout of the automount is part of it.
const TIMEOUT: Duration = Duration::from_secs(240);

const GENERATOR: &str = "/usr/lib/systemd/system-generators/systemd-fstab-generator";

/// What becomes systemd: /usr/sbin gets the helpers, /run is empty.
const FIRST_PROCESS: &str = r#"
set -eu
mount --make-rprivate /
mkdir farm farm/real farm/sbin
mount --bind /usr/sbin farm/real
ln -s "$PWD"/farm/real/* farm/sbin/
for name in mount.blkholefs umount.blkholefs mount.fuse.blkholefs umount.fuse.blkholefs blkholefs; do
    ln -sf "$PROGRAM" farm/sbin/$name
done
mount --bind farm/sbin /usr/sbin
mount -t tmpfs tmpfs /run
# The console is reserved for the output of the tests.
mount --bind /dev/null /dev/console
export container=test SYSTEMD_UNIT_PATH=$PWD/units SYSTEMD_LOG_TARGET=kmsg
exec systemd --system --unit=test.target --show-status=0
"#;

/// systemd in its own namespaces. Dropping this value ends it.
struct Systemd {
    process: Child,
    directory: tempfile::TempDir,
}

impl Systemd {
    /// Starts systemd with the units in `units` of this directory and a service that runs a script.
    fn start(directory: tempfile::TempDir, wants: &str, script: &str) -> Self {
        let path = |name: &str| directory.path().join(name);
        fs::write(path("script"), script).unwrap();
        let target = format!("[Unit]\nRequires=test.service {wants}\n");
        fs::write(path("units/test.target"), target).unwrap();
        // The output is renamed when it is complete.
        let service = format!(
            "[Unit]\nDefaultDependencies=no\nAfter={wants}\n[Service]\nType=oneshot\nTimeoutStartSec=infinity\n\
             WorkingDirectory={0}\nExecStart=/bin/sh -c 'sh script >output 2>&1; mv output result'\n",
            directory.path().display()
        );
        fs::write(path("units/test.service"), service).unwrap();
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--cgroup", "--uts", "--ipc"]);
        command.args(["sh", "-c", FIRST_PROCESS]).current_dir(directory.path()).stdin(Stdio::null());
        command.env("PROGRAM", env!("CARGO_BIN_EXE_blkholefs"));
        let log = fs::File::create(path("log")).unwrap();
        let process = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        Self { process, directory }
    }

    /// What the script printed.
    fn result(&mut self) -> String {
        let path = |name: &str| self.directory.path().join(name);
        let deadline = Instant::now() + TIMEOUT;
        while !path("result").exists() {
            let text = |name: &str| fs::read_to_string(path(name)).unwrap_or_default();
            let ended = self.process.try_wait().unwrap();
            let failed = ended.is_some() || Instant::now() > deadline;
            assert!(!failed, "{ended:?}: {}\nsystemd: {}", text("output"), text("log"));
            std::thread::sleep(Duration::from_millis(50));
        }
        fs::read_to_string(path("result")).unwrap()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A directory for systemd, with a place to mount on and an image to mount.
fn prepare() -> (tempfile::TempDir, Image) {
    let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    for name in ["units", "mnt"] {
        fs::create_dir(directory.path().join(name)).unwrap();
    }
    (directory, Image::with_data(MIB, &[0..MIB / 4]))
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-helpers/systemd").join(name)
}

#[test]
#[ignore = "needs a kernel of its own: run tests/run"]
fn automount_of_an_fstab_line_mounts_and_expires() {
    needs!(programs["systemd", "unshare", GENERATOR]);
    run("modprobe", ["-a", "autofs4", "fuse"]);
    let (directory, image) = prepare();
    let place = directory.path().join("mnt");
    let units = directory.path().join("units");
    let line = format!(
        "{} {} blkholefs ro,noauto,x-systemd.automount,x-systemd.idle-timeout=3 0 0\n",
        image.path().display(),
        place.display()
    );
    fs::write(directory.path().join("fstab"), line).unwrap();
    let generator = [&format!("SYSTEMD_FSTAB={}/fstab", directory.path().display()), GENERATOR];
    let arguments = generator.into_iter().map(AsRef::<std::ffi::OsStr>::as_ref).chain([units.as_os_str(); 3]);
    run("env", arguments);
    let name = run("systemd-escape", ["--path".as_ref(), place.as_os_str()]);
    let name = name.trim_end();
    let script = format!(
        r#"
        timeout 60 cmp mnt/{file} {image} && echo read
        ps -eo pgid=,sid=,pid=,args= | grep -c '[m]ount.blkholefs'
        until ! grep -q ' fuse.blkholefs ' /proc/self/mountinfo; do sleep 0.1; done && echo expired
        timeout 60 cmp mnt/{file} {image} && echo read again
        systemctl --quiet stop '{name}.automount' '{name}.mount' && echo stopped
        ! grep ' - fuse.blkholefs ' /proc/self/mountinfo
        "#,
        file = image.path().file_name().unwrap().display(),
        image = image.path().display(),
    );
    let mut systemd = Systemd::start(directory, &format!("{name}.automount"), &script);
    assert_eq!(systemd.result(), "read\n1\nexpired\nread again\nstopped\n");
}

/// The line of the README for an NBD export.
#[test]
#[ignore = "needs a kernel of its own: run tests/run"]
fn a_network_mount_waits_for_the_network() {
    needs!(programs["systemd", "unshare", GENERATOR]);
    let (directory, _image) = prepare();
    let lines = indented("README.md", "Use it");
    let line = lines.iter().find(|line| line.starts_with("nbd://")).expect("a line of fstab");
    fs::write(directory.path().join("fstab"), format!("{line}\n")).unwrap();
    let units = directory.path().join("units");
    let table = format!("SYSTEMD_FSTAB={}/fstab", directory.path().display());
    run("env", [table.as_ref(), GENERATOR.as_ref()].into_iter().chain([units.as_os_str(); 3]));
    let script = r#"
        systemctl show --property=After --value mnt-export.mount | tr ' ' '\n' >after
        grep -x -e network-online.target -e remote-fs-pre.target after | sort
    "#;
    let mut systemd = Systemd::start(directory, "", script);
    assert_eq!(systemd.result(), "network-online.target\nremote-fs-pre.target\n");
}

#[test]
#[ignore = "needs a kernel of its own: run tests/run"]
fn service_is_reloaded_stopped_and_cleared_away() {
    needs!(programs["systemd", "unshare"]);
    let (directory, image) = prepare();
    let device = Loop::new(image.path());
    // There is no udev that would report devices to systemd here.
    let unit = fs::read_to_string(source("blkholefs@.service")).unwrap();
    let unit: String = unit.lines().filter(|line| !line.ends_with(".device")).flat_map(|line| [line, "\n"]).collect();
    let unit = unit.replace("[Unit]", "[Unit]\nDefaultDependencies=no");
    fs::write(directory.path().join("units/blkholefs@.service"), unit).unwrap();
    let script = format!(
        r#"
        unit=blkholefs@dev-{name} place=/run/blkholefs-dev-{name}
        systemctl start $unit && cmp $place/{name} /dev/{name} && echo started
        blkholefs status --json $place | grep -o '"state": "[a-z]*"'
        systemctl reload $unit && cmp $place/{name} /dev/{name} && echo reloaded
        systemctl stop $unit && ! [ -e $place ] && echo stopped
        systemctl start $unit && echo started
        systemctl kill --signal=KILL $unit
        until ! systemctl is-active --quiet $unit && ! [ -e $place ]; do sleep 0.1; done && echo cleared away
        "#,
        name = device.name(),
    );
    let mut systemd = Systemd::start(directory, "", &script);
    let expected = "started\n\"state\": \"serving\"\nreloaded\nstopped\nstarted\ncleared away\n";
    assert_eq!(systemd.result(), expected);
}
