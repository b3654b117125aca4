//! Ordinary users who mount their own images through fusermount3.

use std::ffi::OsStr;
use std::fs;
use std::process::Command;

use crate::bench::{Bench, Ran, assert_ended};
use crate::common::{needs, run, wait_until};

/// A directory of the user `nobody` with an image and a mountpoint.
struct Home(Bench);

impl Home {
    fn new() -> Self {
        let bench = Bench::new();
        let home = bench.path("home");
        fs::create_dir(&home).unwrap();
        // The targets of the links may be in a directory that other users cannot access.
        // A program that this process had open for writing could not be run while another test starts a child.
        run("cp", [env!("CARGO_BIN_EXE_blkholefs").as_ref(), home.join("blkholefs").as_os_str()]);
        fs::copy(bench.image.path(), home.join("my,image")).unwrap();
        fs::create_dir(home.join("mnt")).unwrap();
        fs::create_dir(home.join("run")).unwrap();
        fs::write(home.join("file"), "").unwrap();
        run("chown", ["-R".as_ref(), "nobody".as_ref(), home.as_os_str()]);
        Self(bench)
    }

    fn run<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Ran {
        let home = self.0.path("home");
        let mut command = Command::new("setpriv");
        command.args(["--reuid=nobody", "--regid=65534", "--clear-groups"]).arg(home.join("blkholefs")).args(words);
        // The runtime directory of the session, which contains the record of the daemon.
        Ran::of(command.current_dir(&home).env("XDG_RUNTIME_DIR", home.join("run")))
    }
}

#[test]
fn user_mounts_what_the_user_can_read() {
    needs!(root, programs["fusermount3", "setpriv"]);
    let home = Home::new();
    let bench = &home.0;
    let place = bench.path("home/mnt");
    home.run(["mount", "my,image", "mnt"]).succeeds();
    let line = crate::bench::mount_at("/proc/self/mountinfo", &place).expect("it is mounted");
    assert_eq!(line[line.len() - 3..line.len() - 1], ["fuse.blkholefs", "my,image"]);
    assert!(line[5].starts_with("ro,nosuid,nodev"), "{line:?}");
    assert!(fs::metadata(&place).is_err(), "root has no access either");
    let seen = "cmp mnt/my,image my,image && stat -c %A mnt/my,image";
    let ran = Ran::of(
        Command::new("setpriv")
            .args(["--reuid=nobody", "--regid=65534", "--clear-groups", "sh", "-c", seen])
            .current_dir(bench.path("home")),
    );
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{ran:?}");
    assert_eq!(ran.out, "-r--------\n");
    let daemon = bench.daemon().expect("a daemon");
    assert_ended(daemon, &home.run(["umount", "-v", "mnt"]));
    assert_eq!(crate::bench::mount_at("/proc/self/mountinfo", &place), None);
}

#[test]
fn user_mounts_on_a_file_and_ends_it_with_a_signal() {
    needs!(root, programs["fusermount3", "setpriv"]);
    let home = Home::new();
    let bench = &home.0;
    home.run(["mount", "my,image", bench.path("home/file").to_str().unwrap()]).succeeds();
    let pid = bench.daemon().expect("a daemon").to_string();
    run("kill", ["-TERM", &pid]);
    let place = bench.path("home/file");
    assert!(wait_until(|| crate::bench::mount_at("/proc/self/mountinfo", &place).is_none()));
    bench.assert_nothing_left();
}

#[test]
fn users_limits_are_one_line_each() {
    needs!(root, programs["fusermount3", "setpriv"]);
    let home = Home::new();
    let device = home.0.device.path().to_str().unwrap();
    home.run(["mount", device, "mnt"]).fails(32, &format!("{device}: cannot open: Permission denied"));
    home.run(["mount", "my,image", "../mnt"]).fails(32, "cannot mount: user has no write access");
    home.run(["mount", "my,image", "mnt", "-o", "uid=0"]).fails(1, "only root");
    let config = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    if !config.lines().any(|line| line.trim() == "user_allow_other") {
        home.run(["mount", "my,image", "mnt", "-o", "allow_other"]).fails(32, "user_allow_other");
    }
    home.0.assert_nothing_left();
}

/// A user writes to an image of the user's own, and to nothing else.
#[test]
fn user_writes_to_what_the_user_can_write() {
    needs!(root, programs["fusermount3", "setpriv"]);
    let home = Home::new();
    let bench = &home.0;
    let shell = |script: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=nobody", "--regid=65534", "--clear-groups", "sh", "-c", script]);
        Ran::of(command.current_dir(bench.path("home")))
    };
    let write =
        "printf abc 1<>mnt/my,image && stat -c %A mnt/my,image && cmp mnt/my,image my,image && head -c 3 my,image";
    home.run(["mount", "my,image", "mnt", "-o", "rw"]).succeeds();
    let place = bench.path("home/mnt");
    let line = crate::bench::mount_at("/proc/self/mountinfo", &place).expect("it is mounted");
    assert!(line[5].starts_with("rw,nosuid,nodev"), "{line:?}");
    let ran = shell(write);
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("-rw-------\nabc", ""));
    home.run(["umount", "mnt"]).succeeds();
    // One that the user can only read. The file has no permission to write then.
    run("chown", ["root".as_ref(), bench.path("home/my,image").as_os_str()]);
    run("chmod", ["644".as_ref(), bench.path("home/my,image").as_os_str()]);
    home.run(["mount", "my,image", "mnt", "-o", "rw"]).succeeds();
    let ran = shell(write);
    assert!(ran.code != 0 && ran.err.contains("Permission denied"), "{ran:?}");
    home.run(["umount", "mnt"]).succeeds();
}

/// A user who mounts with fusermount3 chooses the source name. With such a name, root's umount must not unmount the
/// user's mount.
#[test]
fn root_does_not_take_a_users_mount_for_its_own() {
    needs!(root, programs["fusermount3", "setpriv"]);
    let home = Home::new();
    let bench = &home.0;
    let place = bench.path("home/mnt");
    fs::copy(bench.image.path(), bench.path("my,image")).unwrap();
    home.run(["mount", "my,image", "mnt"]).succeeds();
    let there = || crate::bench::mount_at("/proc/self/mountinfo", &place).is_some();
    let ran = bench.run("umount.blkholefs", ["my,image"]);
    assert!(there(), "{ran:?}");
    ran.fails(32, "my,image: not mounted");
    bench.run("mount.blkholefs", ["my,image", "mnt"]).succeeds();
    bench.run("umount.blkholefs", ["my,image"]).succeeds();
    assert!(there() && bench.mounted().is_none(), "root's own mount is unmounted, although the other one is older");
    bench.run("umount.blkholefs", [&place]).succeeds();
    assert!(!there(), "the user's mount is unmounted by its mountpoint");
    assert!(wait_until(|| bench.daemon().is_none()));
}

/// A set-user-ID copy would give root's rights to every user.
#[test]
fn setuid_copy_refuses_to_run() {
    needs!(root, programs["fusermount3", "setpriv"]);
    let home = Home::new();
    let program = home.0.path("home/blkholefs");
    run("chown", ["root".as_ref(), program.as_os_str()]);
    run("chmod", ["4755".as_ref(), program.as_os_str()]);
    let options = run("findmnt", ["-no".as_ref(), "OPTIONS".as_ref(), "--target".as_ref(), program.as_os_str()]);
    if options.trim_end().split(',').any(|word| word == "nosuid") {
        return eprintln!("skipped: this test needs a temporary directory that is not mounted nosuid");
    }
    home.run(["mount", "my,image", "mnt"]).fails(1, "must not be installed setuid");
    home.run(["umount", "mnt"]).fails(1, "must not be installed setuid");
}
