//! Unmounting: the conditions that `umount.blkholefs` waits for, and the requests that it refuses.

use std::fs::File;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bench::{Bench, Ran, assert_ended};
use crate::common::loop_device::Loop;
use crate::common::{needs, run, wait_until};
use crate::daemon::Other;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The device is always free when `umount.blkholefs` returns.
#[test]
fn device_is_free_at_once() {
    needs!(root);
    let bench = Bench::new();
    for _ in 0..20 {
        let device = Loop::new(bench.image.path());
        bench.run("mount.blkholefs", [device.path(), &bench.mnt()]).succeeds();
        drop(File::open(bench.mnt().join(device.name())).unwrap());
        let daemon = bench.server(&bench.mnt());
        assert_ended(daemon, &bench.run("umount.blkholefs", ["-v", "mnt"]));
        run("losetup", ["--detach".as_ref(), device.path().as_os_str()]);
        // Another process may hold the loop device open while it searches for a free one, or may have bound it to
        // another file.
        let backing = format!("/sys/block/{}/loop/backing_file", device.name());
        let image = bench.image.path().to_str().unwrap();
        assert!(wait_until(|| std::fs::read_to_string(&backing).unwrap_or_default().trim_end() != image));
        std::mem::forget(device);
    }
}

/// umount waits for a slow daemon, but not for a daemon that serves another mount.
#[test]
fn umount_waits_for_the_daemon() {
    needs!(root);
    let bench = Bench::new();
    let daemon = bench.mount(&[]);
    let signal = |signal| kill(Pid::from_raw(i32::try_from(daemon).unwrap()), signal).unwrap();
    signal(Signal::SIGSTOP);
    let mut command = Command::new(bench.bin("umount.blkholefs"));
    let mut umount = command.arg("-v").arg(bench.mnt()).stderr(Stdio::piped()).spawn().unwrap();
    assert!(wait_until(|| bench.mounted().is_none()));
    let early = umount.try_wait().unwrap();
    signal(Signal::SIGCONT);
    let output = umount.wait_with_output().unwrap();
    let ran = Ran { code: output.status.code().unwrap(), out: String::new(), err: text(&output.stderr) };
    match early {
        // The daemon cannot have ended yet.
        Some(_) => assert!(ran.err.contains("serves a mount in another namespace"), "{ran:?}"),
        None => assert_ended(daemon, &ran),
    }
}

#[test]
fn the_daemon_runs_until_its_last_mountpoint_is_unmounted() {
    needs!(root);
    let bench = Bench::new();
    let daemon = bench.mount(&[]);
    std::fs::create_dir(bench.path("second")).unwrap();
    run("mount", ["--bind".as_ref(), bench.mnt().as_os_str(), bench.path("second").as_os_str()]);
    bench.umount();
    assert_eq!(bench.daemon(), Some(daemon));
    bench.run("umount.blkholefs", [bench.path("second")]).succeeds();
}

/// If another namespace has a copy of the mount, the daemon continues to serve it, and the device is free.
#[test]
fn umount_does_not_wait_for_an_idle_daemon() {
    needs!(root);
    let bench = Bench::new();
    let daemon = bench.mount(&[]);
    let other = Other::new();
    let ran = bench.run("umount.blkholefs", ["-v", "mnt"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let expected = format!("the daemon (process {daemon}) serves a mount in another namespace, and has no device open");
    assert!(ran.err.contains(&expected), "{ran:?}");
    assert_eq!(bench.daemon(), Some(daemon));
    drop(other);
    bench.assert_nothing_left();
}

/// A file that is open through a second mount holds the device, which umount reports. If the file is closed soon,
/// umount waits for that.
#[test]
fn umount_waits_for_the_device() {
    needs!(root);
    let bench = Bench::new();
    let second = bench.path("second");
    std::fs::create_dir(&second).unwrap();
    for closes in [false, true] {
        let daemon = bench.mount(&[]);
        run("mount", ["--bind".as_ref(), bench.mnt().as_os_str(), second.as_os_str()]);
        let open = File::open(second.join(bench.device.name())).unwrap();
        let mut command = Command::new(bench.bin("umount.blkholefs"));
        let umount = command.arg(bench.mnt()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
        assert!(wait_until(|| bench.mounted().is_none()));
        let open = (!closes).then_some(open);
        let output = umount.wait_with_output().unwrap();
        let messages = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{messages}");
        let holds = format!(
            "unmounted, but the daemon (process {daemon}) serves the mount on {} and holds {}\n",
            second.display(),
            bench.device.path().display()
        );
        match closes {
            true => assert_eq!(messages, ""),
            false => assert!(messages.ends_with(&holds), "{messages}"),
        }
        drop(open);
        bench.run("umount.blkholefs", [&second]).succeeds();
        bench.assert_nothing_left();
    }
}

/// The source refers to a mount that another mount covers. umount.blkholefs must not unmount the covering mount.
#[test]
fn what_covers_a_mount_stays() {
    needs!(root);
    let bench = Bench::new();
    bench.mount(&[]);
    run("mount", ["-t".as_ref(), "tmpfs".as_ref(), "over".as_ref(), bench.mnt().as_os_str()]);
    let ran = bench.run("umount.blkholefs", [bench.device.path()]);
    let top = bench.mounted().unwrap();
    assert!(top.contains(&"tmpfs".to_owned()), "{top:?}");
    ran.fails(32, "something else is mounted over it");
    Ran::of(Command::new("umount").arg(bench.mnt())).succeeds();
    bench.umount();
}

#[test]
fn busy_mount_stays_unless_detached() {
    needs!(root);
    let bench = Bench::new();
    bench.mount(&[]);
    let open = File::open(bench.file()).unwrap();
    bench.run("umount.blkholefs", ["mnt"]).fails(32, "cannot unmount: Device or resource busy");
    assert!(bench.mounted().is_some());
    bench.run("umount.blkholefs", ["mnt", "-l"]).succeeds();
    assert_eq!(bench.mounted(), None);
    assert!(bench.daemon().is_some(), "the daemon serves the open file");
    drop(open);
    bench.assert_nothing_left();
}

#[test]
fn only_our_mounts_are_unmounted() {
    needs!(root);
    let bench = Bench::new();
    bench.run("umount.blkholefs", ["mnt"]).fails(32, "mnt: not mounted");
    bench.run("umount.blkholefs", ["/nonexistent"]).fails(32, "/nonexistent: not mounted");
    bench.run("umount.blkholefs", ["/proc"]).fails(32, "its type is proc");
    bench.run("umount.blkholefs", ["mnt", "-x"]).fails(1, "invalid option '-x'");
    bench.run("umount.blkholefs", [""; 0]).fails(1, "expected one directory");
}
