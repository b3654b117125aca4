//! `umount.blkholefs`, which umount(8) runs, and `blkholefs umount`: unmounts, and waits until the daemon has closed the
//! device, so that `losetup -d` or `lvremove` can follow.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::unistd::{Pid, geteuid};

use crate::error::{Error, Result};
use crate::mount::argv::{self, UmountRequest};
use crate::mount::fusermount;
use crate::mount::helper::finish;
use crate::mount::namespace::Namespace;
use crate::mount::release::{Daemon, ReleaseOutcome};
use crate::mount::{logging, point, record};
use crate::output::say;
use crate::spec::{Tag, absolute};
use crate::sys::device::DeviceId;
use crate::sys::mountinfo::{self, MountEntry};

const HELPER_USAGE: &str = "\
Usage: umount.blkholefs DIR|SPEC [-flnrvhV] [-N NAMESPACE] [-t TYPE]

Unmounts DIR, or what was mounted from SPEC, and waits until the daemon has
closed the device. See mount.blkholefs(8).

  -f  abort pending requests          -l  detach the mount although it is in use
  -n, -r  ignored, for umount(8)      -v  print what is done
  -N  unmount in this mount namespace";

const COMMAND_USAGE: &str = "\
Usage: blkholefs umount [-flv] DIR

Unmounts DIR, and waits until the daemon has closed the device. See
blkholefs(8).

  -f  abort pending requests
  -l  detach the mount although it is in use
  -v  print what is done";

/// Runs `umount.blkholefs` with the words after its name.
pub fn main(name: &str, args: &[OsString]) -> ExitCode {
    finish(name, HELPER_USAGE, argv::umount(args), |request| run(name, &request))
}

/// Runs `blkholefs umount` with the words after that.
pub fn command(args: &[OsString]) -> ExitCode {
    finish("blkholefs", COMMAND_USAGE, argv::umount(args), |request| run("blkholefs", &request))
}

fn run(name: &str, request: &UmountRequest) -> Result<u8> {
    let target = target(&request.target)?;
    let namespace = Namespace::open(request.namespace.as_deref())?;
    let mount = namespace.within(|| find(&point::list()?, &target, &request.target, geteuid().as_raw()))?;
    // Looked up before the unmount: after that, another mount may have the device number.
    let daemon = if request.lazy { None } else { Daemon::of(&mount) };
    namespace.within(|| unmount(&mount.point, request))?;
    if let Some(records) = record::directory() {
        // Removes the record if the daemon was killed. If that fails, the next mount removes it.
        let _ = record::remove_stale(&records);
    }
    if request.verbose {
        say(format_args!("{name}: {} unmounted", mount.point.display()));
    }
    let Some(daemon) = daemon else { return Ok(0) };
    let outcome = daemon.wait();
    let others = namespace.within(|| Ok(others(&point::list()?, mount.device))).unwrap_or_default();
    if let Some(warning) = warning(&outcome, daemon.pid(), &others) {
        say(format_args!("{name}: {}: {}", mount.point.display(), logging::one_line(&warning)));
    } else if request.verbose && outcome == ReleaseOutcome::Idle {
        say(format_args!(
            "{name}: the daemon (process {}) serves {}, and has no device open",
            daemon.pid(),
            place(&others)
        ));
    }
    Ok(0)
}

/// The absolute path of what is to be unmounted: for a tag that of the device that has it, which is the source of the mount.
fn target(typed: &Path) -> Result<PathBuf> {
    match Tag::parse(typed.as_os_str())? {
        Some(tag) => tag.device(),
        None => absolute(typed),
    }
}

/// The other mountpoints of a file system, in the namespace of the list.
fn others(list: &[MountEntry], device: DeviceId) -> Vec<PathBuf> {
    list.iter()
        .filter(|mount| mount.is_blkholefs() && mount.device == device)
        .map(|mount| mount.point.clone())
        .collect()
}

fn place(others: &[PathBuf]) -> String {
    match others {
        [] => "a mount in another namespace".to_owned(),
        [first, ..] => format!("the mount on {}", first.display()),
    }
}

/// The warning that a device is not free although the mount is gone.
fn warning(outcome: &ReleaseOutcome, daemon: Pid, others: &[PathBuf]) -> Option<String> {
    let (open, reason) = match outcome {
        ReleaseOutcome::Ended | ReleaseOutcome::Idle => return None,
        ReleaseOutcome::InUse(open) => (open, format!("serves {}", place(others))),
        ReleaseOutcome::Hangs(open) => (open, "does not end".to_owned()),
    };
    let open: Vec<_> = open.iter().map(|path| path.display().to_string()).collect();
    let holds = if open.is_empty() { String::new() } else { format!(" and holds {}", open.join(", ")) };
    Some(format!("unmounted, but the daemon (process {daemon}) {reason}{holds}"))
}

/// The mount at `target`, made by any user, or else the newest mount with the source `typed` that `user` made. Mounts of
/// other users are not found by their source, because every user can choose any text for it.
fn find(list: &[MountEntry], target: &Path, typed: &Path, user: u32) -> Result<MountEntry> {
    // A path lookup may wait for a daemon that hangs or for an automount, and fails for a mount whose daemon died. None is
    // needed when the path is typed as in the kernel's list.
    let is_listed = list.iter().any(|mount| mount.point == target);
    let place = if is_listed { None } else { fs::canonicalize(target).ok() };
    if let Some(mount) = mountinfo::top(list, place.as_deref().unwrap_or(target)) {
        if mount.is_blkholefs() {
            return Ok(mount.clone());
        }
        let kind = mount.fs_type.display();
        return Err(Error::failed(format!("not a mount of blkholefs, its type is {kind}")).on(typed));
    }
    let is_source = |mount: &&MountEntry| mount.is_blkholefs() && (mount.source == typed || mount.source == target);
    let Some(mount) = list.iter().filter(is_source).rfind(|mount| mount.owner == Some(user)) else {
        let error = Error::failed("not mounted").on(typed);
        return Err(match list.iter().rfind(is_source) {
            Some(foreign) => error.hint(format!(
                "{} is another user's mount with that name; to unmount it, name the directory",
                foreign.point.display()
            )),
            None => error,
        });
    };
    // The kernel unmounts the topmost mount of a path.
    if mountinfo::top(list, &mount.point) != Some(mount) {
        return Err(Error::failed("cannot unmount: something else is mounted over it").on(&mount.point));
    }
    Ok(mount.clone())
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

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &[u8] = b"\
22 1 253:0 / / rw - ext4 /dev/vda rw\n\
40 22 0:45 / /nowhere/a ro - fuse.blkholefs /dev/x ro,user_id=0,group_id=0\n\
41 22 0:46 / /nowhere/b ro - fuse.blkholefs /dev/x ro,user_id=0\n\
42 22 0:47 / /nowhere/c ro - fuse.sshfs host: ro\n\
43 22 0:48 / /nowhere/d ro - fuse.blkholefs nbd://h/e ro,user_id=0\n\
44 22 0:49 / /nowhere/e ro - fuse.blkholefs /dev/x ro,user_id=1000\n\
45 22 0:50 / /nowhere/f ro - fuse.blkholefs /dev/y ro,user_id=1000\n\
46 22 0:51 / /nowhere/g ro - fuse.blkholefs /dev/z ro,user_id=0\n\
47 46 0:52 / /nowhere/g rw - tmpfs tmpfs rw\n";

    fn found_by(typed: &str, user: u32) -> std::result::Result<u64, String> {
        let list = mountinfo::parse(LIST);
        let target = std::path::absolute(typed).unwrap();
        find(&list, &target, Path::new(typed), user).map(|mount| mount.id).map_err(|error| error.to_string())
    }

    fn found(typed: &str) -> std::result::Result<u64, String> {
        found_by(typed, 0)
    }

    #[test]
    fn a_mount_is_found_by_its_mountpoint_and_by_its_source() {
        assert_eq!(found("/nowhere/a"), Ok(40));
        assert_eq!(found("/nowhere/a/"), Ok(40));
        assert_eq!(found("/dev/x"), Ok(41), "the newest");
        assert_eq!(found("nbd://h/e"), Ok(43));
        assert!(found("/").unwrap_err().contains("type is ext4"));
        assert!(found("/nowhere/c").unwrap_err().contains("fuse.sshfs"));
        assert_eq!(found("/nowhere/z").unwrap_err(), "/nowhere/z: not mounted");
        assert_eq!(found("host:").unwrap_err(), "host:: not mounted");
    }

    /// A user who mounts with fusermount3 can choose any source.
    #[test]
    fn the_source_of_another_users_mount_finds_nothing() {
        assert_eq!(found("/dev/y").unwrap_err(), "/dev/y: not mounted");
        assert_eq!(found("/nowhere/f"), Ok(45), "by its mountpoint");
        assert_eq!(found_by("/dev/y", 1000), Ok(45));
        assert_eq!(found_by("/dev/x", 1000), Ok(44));
        assert_eq!(found_by("nbd://h/e", 1000).unwrap_err(), "nbd://h/e: not mounted");
    }

    #[test]
    fn a_mount_that_covers_another_is_not_unmounted_instead() {
        assert!(found("/dev/z").unwrap_err().contains("something else is mounted over it"));
        assert!(found("/nowhere/g").unwrap_err().contains("its type is tmpfs"));
    }

    #[test]
    fn a_warning_has_the_open_devices_and_the_reason() {
        let pid = Pid::from_raw(7);
        let open = || vec![PathBuf::from("/dev/loop1")];
        let at = [PathBuf::from("/m")];
        let text = |outcome, others: &[PathBuf]| warning(&outcome, pid, others);
        assert_eq!(text(ReleaseOutcome::Ended, &[]), None);
        assert_eq!(text(ReleaseOutcome::Idle, &at), None);
        assert_eq!(
            text(ReleaseOutcome::InUse(open()), &at).unwrap(),
            "unmounted, but the daemon (process 7) serves the mount on /m and holds /dev/loop1"
        );
        assert!(
            text(ReleaseOutcome::InUse(open()), &[]).unwrap().contains("serves a mount in another namespace and holds")
        );
        assert_eq!(
            text(ReleaseOutcome::Hangs(vec![]), &[]).unwrap(),
            "unmounted, but the daemon (process 7) does not end"
        );
    }
}
