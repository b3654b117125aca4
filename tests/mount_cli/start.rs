//! The start of a daemon: it gives a working mount, or an error that leaves nothing.

use std::fs;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bench::{Bench, Ran};
use crate::common::check::check;
use crate::common::{needs, wait_until};

/// Mounts under a limit of ulimit(1), with a separate directory for records, and prints the faults that it finds.
const SWEEP: &str = r#"
set -u
mount --make-rprivate /
mkdir -p /run/blkholefs
mount -t tmpfs none /run/blkholefs
file=mnt/$(basename "$DEV")
expected=$(printf ' 786432 75.0%% 0 data\n 262144 25.0%% 3 hole,zero')
served=0 refused=0
for limit in $LIMITS; do
    (ulimit $KIND $limit && exec bin/mount.blkholefs "$DEV" mnt) >out 2>err
    code=$?
    if [ $code = 0 ]; then
        served=$((served + 1))
        [ "$(stat -c %s $file)" = 1048576 ] || echo "$limit: stat"
        cmp $file "$DEV" || echo "$limit: read"
# Not xfs_io: it looks at every mount, also at those of other tests whose daemons are stopped.
        [ "$(bin/blkholefs map --totals $file | tr -s ' ')" = "$expected" ] || echo "$limit: lseek"
        bin/umount.blkholefs mnt || echo "$limit: umount"
    else
        refused=$((refused + 1))
        [ -s err ] || echo "$limit: $code, and nothing is said"
    fi
    ! grep " $PWD/mnt " /proc/self/mountinfo || { echo "$limit: $code, still mounted"; umount -l mnt; }
    # If another mount of this machine takes the device number of the one that is gone, it looks as if that were mounted at
    # another place. Then umount waits for the device and not for the end of the daemon.
    for _ in $(seq 500); do [ -z "$(ls -A -I times /run/blkholefs)" ] && break; sleep 0.01; done
    [ -z "$(ls -A -I times /run/blkholefs)" ] || { echo "$limit: $code, a record is left"; rm -f /run/blkholefs/*; }
done
[ $served -gt 0 ] && [ $refused -gt 0 ] || echo "$served served, $refused refused"
"#;

fn sweep(kind: &str, limits: impl Iterator<Item = u32>) {
    needs!(root, programs["unshare", "cmp"]);
    let bench = Bench::new();
    let limits: Vec<_> = limits.map(|limit| limit.to_string()).collect();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", SWEEP]).current_dir(bench.path("")).env("DEV", bench.device.path());
    let ran = Ran::of(command.env("KIND", kind).env("LIMITS", limits.join(" ")));
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("", ""));
    bench.assert_nothing_left();
}

#[test]
fn few_descriptors_are_enough_or_an_error() {
    sweep("-n", 3..=64);
}

#[test]
fn little_address_space_is_enough_or_an_error() {
    // In KiB.
    sweep("-v", (1..=40).map(|step| step * 30_000));
}

/// A record cannot be written because of a file size limit. The signal of this limit kills a process by default.
#[test]
fn no_room_for_a_record_is_a_warning() {
    needs!(root);
    let bench = Bench::new();
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -f 0; exec \"$@\"", "sh"]).arg(bench.bin("mount.blkholefs"));
    let ran = Ran::of(command.arg(bench.device.path()).arg(bench.mnt()));
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.err.contains("no record, umount will not wait: File too large"), "{ran:?}");
    check(&bench.file(), bench.device.path());
    bench.umount();
    assert!(wait_until(|| bench.daemon().is_none()));
}

/// The start of each thread of the daemon fails in turn.
#[test]
fn thread_that_does_not_start_is_an_error() {
    needs!(root, programs["strace"]);
    let bench = Bench::new();
    // The counts are of each thread: the main thread starts two, one of them the others.
    for count in 1..=8 {
        let inject = format!("inject=clone3:error=EAGAIN:when={count}");
        let mut command = Command::new("strace");
        command.args(["-f", "-o", "/dev/null", "-e", "trace=clone3", "-e", &inject]);
        command.arg(bench.bin("mount.blkholefs")).arg(bench.device.path()).arg(bench.mnt());
        Ran::of(&mut command).fails(2, "Resource temporarily unavailable");
        bench.assert_nothing_left();
    }
}

/// A daemon that is killed after mount(2) cannot remove its mount, so the command that waits for the daemon removes it.
#[test]
fn killed_start_leaves_nothing() {
    needs!(root, programs["strace"]);
    let bench = Bench::new();
    let mut command = Command::new("strace");
    command.args(["-f", "-o", "/dev/null", "-e", "trace=capset", "-e", "inject=capset:signal=KILL"]);
    command.arg(bench.bin("mount.blkholefs")).arg(bench.device.path()).arg(bench.mnt());
    Ran::of(&mut command).fails(32, "the daemon was killed by SIGKILL");
    bench.assert_nothing_left();
}

/// Of two concurrent helpers for one mountpoint, one mounts and the other one reports the mount. The record names the
/// serving daemon.
#[test]
fn two_helpers_make_one_mount() {
    needs!(root);
    let bench = Bench::new();
    for round in 0..40 {
        let start = || {
            let mut command = Command::new(bench.bin("mount.blkholefs"));
            command.arg(bench.device.path()).arg(bench.mnt()).stdin(Stdio::null()).stderr(Stdio::piped());
            command.spawn().unwrap()
        };
        let pair = [start(), start()].map(|child| child.wait_with_output().unwrap());
        let mut codes = pair.each_ref().map(|output| output.status.code());
        codes.sort_unstable();
        let messages: String = pair.iter().map(|output| String::from_utf8_lossy(&output.stderr)).collect();
        assert_eq!(codes, [Some(0), Some(32)], "round {round}: {messages}");
        assert!(messages.contains("is already mounted here"), "round {round}: {messages}");
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let place = format!(" {} ", bench.mnt().display());
        assert_eq!(table.lines().filter(|line| line.contains(&place)).count(), 1, "round {round}");
        let daemon = i32::try_from(bench.server(&bench.mnt())).unwrap();
        kill(Pid::from_raw(daemon), Signal::SIGTERM).unwrap();
        assert!(wait_until(|| bench.mounted().is_none()), "round {round}: the record names another process");
    }
}
