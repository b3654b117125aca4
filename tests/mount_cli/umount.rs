//! Unmounting: what `umount.blkholefs` waits for, and what it refuses.

use std::fs::File;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bench::Bench;
use crate::common::loop_device::Loop;
use crate::common::{requires_root, run, wait_until};

/// The point of it: what comes after `umount.blkholefs` finds the device free, each time.
#[test]
fn device_is_free_at_once() {
    if !requires_root() {
        return;
    }
    let bench = Bench::new();
    for _ in 0..20 {
        let device = Loop::new(bench.image.path());
        bench.run("mount.blkholefs", [device.path(), &bench.mnt()]).succeeds();
        drop(File::open(bench.mnt().join(device.name())).unwrap());
        bench.umount();
        assert_eq!(bench.daemon(), None, "the daemon ended before umount returned");
        run("losetup", ["--detach".as_ref(), device.path().as_os_str()]);
        // Somebody who looks for a free loop device may hold it open for a moment, or have bound it to something else.
        let backing = format!("/sys/block/{}/loop/backing_file", device.name());
        let image = bench.image.path().to_str().unwrap();
        assert!(wait_until(|| std::fs::read_to_string(&backing).unwrap_or_default().trim_end() != image));
        std::mem::forget(device);
    }
}

/// A daemon that takes long is waited for; one that another mount still needs is not.
#[test]
fn umount_waits_for_the_daemon() {
    if !requires_root() {
        return;
    }
    let bench = Bench::new();
    let daemon = bench.mount(&[]);
    let signal = |signal| kill(Pid::from_raw(i32::try_from(daemon).unwrap()), signal).unwrap();
    signal(Signal::SIGSTOP);
    let mut command = Command::new(bench.bin("umount.blkholefs"));
    let mut umount = command.arg(bench.mnt()).stderr(Stdio::piped()).spawn().unwrap();
    assert!(wait_until(|| bench.mounted().is_none()));
    assert_eq!(umount.try_wait().unwrap(), None, "it does not return before the daemon ended");
    signal(Signal::SIGCONT);
    let output = umount.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn one_of_two_places_keeps_the_daemon() {
    if !requires_root() {
        return;
    }
    let bench = Bench::new();
    let daemon = bench.mount(&[]);
    std::fs::create_dir(bench.path("second")).unwrap();
    run("mount", ["--bind".as_ref(), bench.mnt().as_os_str(), bench.path("second").as_os_str()]);
    bench.umount();
    assert_eq!(bench.daemon(), Some(daemon));
    bench.run("umount.blkholefs", [bench.path("second")]).succeeds();
}

#[test]
fn busy_mount_stays_unless_detached() {
    if !requires_root() {
        return;
    }
    let bench = Bench::new();
    bench.mount(&[]);
    let open = File::open(bench.file()).unwrap();
    bench.run("umount.blkholefs", ["mnt"]).fails(32, "cannot unmount: Device or resource busy");
    assert!(bench.mounted().is_some());
    bench.run("umount.blkholefs", ["mnt", "-l"]).succeeds();
    assert_eq!(bench.mounted(), None);
    assert!(bench.daemon().is_some(), "it serves the open file");
    drop(open);
    bench.assert_nothing_left();
}

#[test]
fn only_our_mounts_are_unmounted() {
    if !requires_root() {
        return;
    }
    let bench = Bench::new();
    bench.run("umount.blkholefs", ["mnt"]).fails(32, "mnt: not mounted");
    bench.run("umount.blkholefs", ["/nonexistent"]).fails(32, "/nonexistent: not mounted");
    bench.run("umount.blkholefs", ["/proc"]).fails(32, "its type is proc");
    bench.run("umount.blkholefs", ["mnt", "-x"]).fails(1, "invalid option '-x'");
    bench.run("umount.blkholefs", [""; 0]).fails(1, "expected one directory");
}
