//! A mount that autofs requests, as with `x-systemd.automount` in fstab. The kernel identifies the automount daemon
//! and the mount command by their process group (`fs/autofs/autofs_i.h: autofs_oz_mode`). Other processes wait for
//! the mount.

use std::fs::{self, File};
use std::io::{PipeReader, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Output, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::getpgrp;

use crate::bench::Bench;
use crate::common::check::check;
use crate::common::{needs, wait_until};

/// `struct autofs_v5_packet` of `include/uapi/linux/auto_fs.h`, as the kernel writes it into the pipe.
const PACKET_SIZE: usize = 304;
/// `autofs_ptype_missing_direct` of the same file.
const MISSING_DIRECT: u32 = 5;

// AUTOFS_IOC_READY and AUTOFS_IOC_FAIL; both take the token of a packet.
nix::ioctl_write_int_bad!(ioc_ready, 0x9360);
nix::ioctl_write_int_bad!(ioc_fail, 0x9361);

/// A direct autofs mount on `mnt`. The process group of this process is the automount daemon.
struct Autofs<'a> {
    bench: &'a Bench,
    /// The directory of autofs itself, even if another mount covers it.
    root: File,
    packets: PipeReader,
}

impl<'a> Autofs<'a> {
    /// `None` on a kernel without autofs.
    fn new(bench: &'a Bench) -> Option<Self> {
        let known = fs::read_to_string("/proc/filesystems").unwrap();
        if !known.lines().any(|line| line.ends_with("\tautofs")) {
            eprintln!("skipped: this test needs a kernel with autofs");
            return None;
        }
        let (packets, writer) = std::io::pipe().unwrap();
        let data = format!("fd={},pgrp={},minproto=5,maxproto=5,direct", writer.as_raw_fd(), getpgrp());
        mount(Some("test"), &bench.mnt(), Some("autofs"), MsFlags::empty(), Some(data.as_str())).unwrap();
        Some(Self { bench, root: File::open(bench.mnt()).unwrap(), packets })
    }

    /// Waits for the kernel's mount request and returns its token.
    fn request(&mut self) -> u32 {
        let mut packet = [0; PACKET_SIZE];
        // A packet is one write of less than PIPE_BUF.
        self.packets.read_exact(&mut packet).unwrap();
        let word = |at: usize| u32::from_ne_bytes(packet[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (5, MISSING_DIRECT), "protocol and type");
        word(8)
    }

    fn answer(&self, token: u32, mounted: bool) {
        let answer = if mounted { ioc_ready } else { ioc_fail };
        // SAFETY: both calls take a number, and the descriptor is open.
        unsafe { answer(self.root.as_raw_fd(), token.cast_signed()) }.expect("the token of a pending request");
    }
}

impl Drop for Autofs<'_> {
    fn drop(&mut self) {
        let _ = umount2(&self.bench.mnt(), MntFlags::MNT_DETACH);
    }
}

/// A command outside of the process group of the automount daemon.
fn command_in_other_group(program: &str) -> Command {
    let mut command = Command::new(program);
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits until a process ends. Returns false after the time limit of [`wait_until`].
fn wait_for_exit(child: &mut Child) -> bool {
    wait_until(|| child.try_wait().unwrap().is_some())
}

fn output(mut child: Child, what: &str) -> Output {
    assert!(wait_for_exit(&mut child), "{what} hangs");
    child.wait_with_output().unwrap()
}

#[test]
fn automount_is_served_while_the_others_wait() {
    needs!(root);
    let bench = Bench::new();
    let Some(mut autofs) = Autofs::new(&bench) else { return };
    let mut reader = command_in_other_group("cmp").args([&bench.file(), bench.device.path()]).spawn().unwrap();
    let token = autofs.request();
    let mut helper = Command::new(bench.bin("mount.blkholefs"));
    helper.arg(bench.device.path()).arg(bench.mnt()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut helper = helper.spawn().unwrap();
    let mounts = wait_for_exit(&mut helper);
    assert_eq!(reader.try_wait().unwrap(), None, "the reader waits for the automount daemon's answer");
    autofs.answer(token, mounts);
    assert!(mounts, "the mount waits for itself");
    assert!(helper.wait().unwrap().success());
    let compared = output(reader, "the reader");
    assert!(compared.status.success(), "{compared:?}");
    check(&bench.file(), bench.device.path());
    bench.umount();
    drop(autofs);
}

/// A failed mount is removed before the reply to the kernel.
#[test]
fn failed_automount_fails_the_access() {
    needs!(root);
    let bench = Bench::new();
    let Some(mut autofs) = Autofs::new(&bench) else { return };
    let reader = command_in_other_group("cat").arg(bench.file()).spawn().unwrap();
    let token = autofs.request();
    let mut helper = Command::new("sh");
    helper.args(["-c", "ulimit -n 10; exec \"$@\"", "sh"]).arg(bench.bin("mount.blkholefs"));
    helper.arg(bench.device.path()).arg(bench.mnt()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut helper = helper.spawn().unwrap();
    let ended = wait_for_exit(&mut helper);
    autofs.answer(token, false);
    assert!(ended, "the failed mount waits for itself");
    assert_eq!(helper.wait().unwrap().code(), Some(2));
    assert_eq!(output(reader, "the reader").status.code(), Some(1));
    drop(autofs);
}

/// The unmount command for an automount that is not mounted must not trigger the mount.
#[test]
fn umount_does_not_trigger_the_automount() {
    needs!(root);
    let bench = Bench::new();
    let Some(mut autofs) = Autofs::new(&bench) else { return };
    let mut child =
        command_in_other_group(bench.bin("umount.blkholefs").to_str().unwrap()).arg(bench.mnt()).spawn().unwrap();
    let ended = wait_for_exit(&mut child);
    if !ended {
        let token = autofs.request();
        autofs.answer(token, false);
    }
    let output = child.wait_with_output().unwrap();
    assert!(ended, "umount waits for a mount");
    assert_eq!(output.status.code(), Some(32), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("its type is autofs"), "{output:?}");
    drop(autofs);
}
