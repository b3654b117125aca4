//! `umount.blkholefs`, which umount(8) runs, and `blkholefs umount`: unmounts, and waits until the daemon let go of the
//! device, so that what comes next (`losetup -d`, `lvremove`) finds it free.

use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Pid, geteuid};

use crate::error::{Error, Result};
use crate::mount::argv::{self, UmountRequest};
use crate::mount::fusermount;
use crate::mount::helper::finish;
use crate::mount::mountinfo::{self, MountEntry};
use crate::mount::namespace::Namespace;
use crate::mount::{point, record};
use crate::sys::process;

const USAGE: &str = "\
Usage: umount.blkholefs DIR|SPEC [-flnrvhV] [-N NAMESPACE] [-t TYPE]

Unmounts DIR, or what was mounted from SPEC, and waits until the daemon closed the
device. See mount.blkholefs(8).

  -f  abort requests that wait        -l  detach now, end when nobody uses it
  -n, -r  nothing, for umount(8)      -v  say what is done
  -N  unmount in this mount namespace";

/// How long a daemon may take to end. Closing devices takes milliseconds; what takes longer is a device that hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs `umount.blkholefs` or `blkholefs umount` with the words after the name.
pub fn main(name: &str, args: &[OsString]) -> ExitCode {
    finish(name, USAGE, argv::umount(args), run)
}

fn run(name: &str, request: UmountRequest) -> Result<u8> {
    let target = std::path::absolute(&request.target)
        .map_err(|e| Error::failed("cannot find the current directory").on(&request.target).because(e))?;
    let namespace = Namespace::open(request.namespace.as_deref())?;
    let (mount, others) = namespace.within(|| {
        let list = point::list()?;
        let mount = find(&list, &target, &request.target)?;
        let others = list.iter().any(|entry| entry.device == mount.device && entry.id != mount.id);
        Ok((mount, others))
    })?;
    // Looked up before the unmount: after it, the number may be another mount's.
    let daemon = if others || request.lazy { None } else { daemon_of(&mount) };
    namespace.within(|| unmount(&mount.point, &request))?;
    if let Some(records) = record::directory() {
        // What a killed daemon left; if it stays, the next mount removes it.
        let _ = record::remove_stale(&records);
    }
    if request.verbose {
        eprintln!("{name}: {} unmounted", mount.point.display());
    }
    if let Some((pid, process)) = daemon
        && !ended(&process)
    {
        let patience = PATIENCE.as_secs();
        eprintln!("{name}: unmounted, but after {patience} s the daemon (process {pid}) still holds the device");
    }
    Ok(0)
}

/// The mount at `target`, or else the newest one that was made from `typed`.
fn find(list: &[MountEntry], target: &Path, typed: &Path) -> Result<MountEntry> {
    // A path into a mount whose daemon died cannot be resolved, and need not be.
    let place = fs::canonicalize(target).unwrap_or_else(|_| PathBuf::from(target));
    if let Some(mount) = mountinfo::top(list, &place) {
        if mount.is_ours() {
            return Ok(mount.clone());
        }
        let kind = mount.fs_type.display();
        return Err(Error::failed(format!("not a mount of blkholefs, its type is {kind}")).on(typed));
    }
    let is_source = |mount: &&MountEntry| mount.is_ours() && (mount.source == typed || mount.source == target);
    list.iter().rfind(is_source).cloned().ok_or_else(|| Error::failed("not mounted").on(typed))
}

fn unmount(place: &Path, request: &UmountRequest) -> Result<()> {
    if !geteuid().is_root() {
        return fusermount::unmount(place, request.lazy);
    }
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    flags.set(MntFlags::MNT_FORCE, request.force);
    flags.set(MntFlags::MNT_DETACH, request.lazy);
    umount2(place, flags).map_err(|e| {
        let error = Error::failed("cannot unmount").on(place).because(e);
        if e == Errno::EBUSY { error.hint("find its users with fuser -vm, or detach it with -l") } else { error }
    })
}

fn daemon_of(mount: &MountEntry) -> Option<(Pid, OwnedFd)> {
    let pid = record::daemon_of(&record::directory()?, mount.device)?;
    // A process that ended in between needs no waiting.
    process::pidfd_open(pid).ok().map(|process| (pid, process))
}

/// Waits for the end of a process; whether it came in time.
fn ended(process: &OwnedFd) -> bool {
    let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    let mut events = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    poll(&mut events, timeout).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &[u8] = b"\
22 1 253:0 / / rw - ext4 /dev/vda rw\n\
40 22 0:45 / /nowhere/a ro - fuse.blkholefs /dev/x ro\n\
41 22 0:46 / /nowhere/b ro - fuse.blkholefs /dev/x ro\n\
42 22 0:47 / /nowhere/c ro - fuse.sshfs host: ro\n\
43 22 0:48 / /nowhere/d ro - fuse.blkholefs nbd://h/e ro\n";

    fn found(typed: &str) -> std::result::Result<u64, String> {
        let list = mountinfo::parse(LIST);
        let target = std::path::absolute(typed).unwrap();
        find(&list, &target, Path::new(typed)).map(|mount| mount.id).map_err(|error| error.to_string())
    }

    #[test]
    fn a_mount_is_found_by_its_place_and_by_its_source() {
        assert_eq!(found("/nowhere/a"), Ok(40));
        assert_eq!(found("/nowhere/a/"), Ok(40));
        assert_eq!(found("/dev/x"), Ok(41), "the newest");
        assert_eq!(found("nbd://h/e"), Ok(43));
        assert!(found("/").unwrap_err().contains("type is ext4"));
        assert!(found("/nowhere/c").unwrap_err().contains("fuse.sshfs"));
        assert_eq!(found("/nowhere/z").unwrap_err(), "/nowhere/z: not mounted");
        assert_eq!(found("host:").unwrap_err(), "host:: not mounted");
    }

    #[test]
    fn a_process_that_ended_is_noticed() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = process::pidfd_open(Pid::from_raw(i32::try_from(child.id()).unwrap())).unwrap();
        assert!(ended(&process));
        child.wait().unwrap();
    }
}
