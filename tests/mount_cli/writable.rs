//! Which mounts can be written: by mount(8) and fstab, by the helper alone, and by ordinary users.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::process::Command;

use crate::bench::{Bench, Ran};
use crate::common::needs;

/// Prints what findmnt(8) shows first of the options, and whether the file can be opened for writing.
const SHOW: &str = r#"
show() {
    findmnt -rno OPTIONS -M "$PWD/mnt" | cut -d, -f1
    if printf abc 2>/dev/null 1<>"mnt/$(basename "$DEV")"; then echo written; else echo refused; fi
    umount mnt -c
}
"#;

/// Mounts with a command and perhaps a line of fstab. Only what [`SHOW`] prints is printed.
fn shows(bench: &Bench, fstab: &str, mount: &str, expected: &str) {
    let ran = bench.script(fstab, &[SHOW, mount, "; show"].concat());
    assert_eq!((&*ran.out, &*ran.err), (expected, ""), "{fstab}{mount}");
}

#[test]
fn a_line_of_fstab_is_written_only_if_it_says_writable() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount"]);
    let bench = Bench::new();
    for (options, expected) in [
        ("defaults", "ro\nrefused\n"),
        ("ro", "ro\nrefused\n"),
        ("rw", "ro\nrefused\n"),
        ("noatime,nofail", "ro\nrefused\n"),
        ("writable", "rw\nwritten\n"),
        ("rw,writable,nofail", "rw\nwritten\n"),
        ("noauto,x-systemd.automount,writable", "rw\nwritten\n"),
        ("writable,ro", "ro\nrefused\n"),
        ("ro,writable", "ro\nrefused\n"),
    ] {
        shows(&bench, &bench.fstab_line(options), r#"mount -T fstab "$PWD/mnt""#, expected);
    }
}

#[test]
fn mount_puts_rw_first_and_a_shell_does_not() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount", "sh"]);
    let bench = Bench::new();
    for (line, expected) in [
        (r#"mount -t blkholefs "$DEV" mnt"#, "ro\nrefused\n"),
        (r#"mount -t blkholefs "$DEV" mnt -o rw"#, "ro\nrefused\n"),
        (r#"mount -w -t blkholefs "$DEV" mnt"#, "ro\nrefused\n"),
        (r#"mount -t blkholefs "$DEV" mnt -o writable"#, "rw\nwritten\n"),
        (r#"mount -r -t blkholefs "$DEV" mnt -o writable"#, "ro\nrefused\n"),
        (r#"(exec mount -t blkholefs "$DEV" mnt)"#, "ro\nrefused\n"),
        (r#"mount.blkholefs "$DEV" mnt"#, "ro\nrefused\n"),
        (r#"mount.blkholefs "$DEV" mnt -o rw"#, "rw\nwritten\n"),
        (r#"mount.blkholefs "$DEV" mnt -o noatime,rw"#, "rw\nwritten\n"),
        (r#"mount.blkholefs "$DEV" mnt -o rw,ro"#, "ro\nrefused\n"),
        (r#"sh -c 'exec env mount.blkholefs "$DEV" mnt -o rw'"#, "rw\nwritten\n"),
        (r#"nohup mount.blkholefs "$DEV" mnt -o rw"#, "rw\nwritten\n"),
    ] {
        shows(&bench, "", line, expected);
    }
}

/// Another program with the library of mount(8): it is not clear who wrote `rw`, so it means nothing, and a line says so.
#[test]
fn a_program_with_the_library_of_mount_is_not_asked_to_write() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount"]);
    let bench = Bench::new();
    let script = |options: &str| {
        let line = format!(
            r#"cp "$(readlink -f "$(command -v mount)")" tool; ./tool -t blkholefs "$DEV" mnt {options}; show"#
        );
        bench.script("", &[SHOW, &line].concat())
    };
    let ran = script("");
    assert_eq!(ran.out, "ro\nrefused\n", "{ran:?}");
    assert!(ran.err.contains("'writable'") && ran.err.lines().count() == 1, "{ran:?}");
    let ran = script("-o writable");
    assert_eq!((&*ran.out, &*ran.err), ("rw\nwritten\n", ""));
}

/// mount(8) of busybox passes neither `ro` nor `rw` on.
#[test]
fn busybox_mounts_for_reading_unless_writable_is_given() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount", "busybox"]);
    let bench = Bench::new();
    for (options, expected) in [
        ("", "ro\nrefused\n"),
        ("-o rw", "ro\nrefused\n"),
        ("-o ro", "ro\nrefused\n"),
        ("-o writable", "rw\nwritten\n"),
    ] {
        shows(&bench, "", &format!("busybox mount -t blkholefs {options} \"$DEV\" mnt"), expected);
    }
}

/// What a view shows must not change, and neither must what was promised not to.
#[test]
fn options_that_exclude_writing() {
    needs!(root);
    let bench = Bench::new();
    for option in ["static", "compact", "used"] {
        let ran = bench
            .run("blkholefs", ["mount", "-o", &format!("rw,{option}"), bench.device.path().to_str().unwrap(), "mnt"]);
        ran.fails(1, "rw is not possible with");
    }
}

/// A mount on a regular file is written too.
#[test]
fn a_file_as_the_mountpoint_is_written() {
    needs!(root);
    let bench = Bench::new();
    let place = bench.path("place");
    fs::write(&place, "").unwrap();
    bench.run("mount.blkholefs", [bench.device.path(), &place, "-o".as_ref(), "rw".as_ref()]).succeeds();
    let file = OpenOptions::new().write(true).open(&place).unwrap();
    file.write_all_at(b"abc", 511).unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert_eq!(fs::read(bench.device.path()).unwrap()[511..514], *b"abc");
    OpenOptions::new().write(true).truncate(true).open(&place).unwrap();
    assert!(fs::read(&place).unwrap().iter().all(|&byte| byte == 0));
    bench.umount_by(&[place]);
}

/// The unmount waits until what was written is flushed and the claim is gone.
#[test]
fn the_device_is_free_after_the_unmount() {
    needs!(root, programs["dd", "blockdev"]);
    let bench = Bench::new();
    for _ in 0..5 {
        bench.mount(&["-o", "rw"]);
        let output = format!("of={}", bench.file().display());
        let dd = Ran::of(Command::new("dd").args(["if=/dev/urandom", "bs=64k", "count=16", "status=none", &output]));
        assert_eq!(dd.code, 0, "{dd:?}");
        bench.umount();
        let flags = nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_EXCL;
        nix::fcntl::open(bench.device.path(), flags, nix::sys::stat::Mode::empty()).expect("nobody claims it");
    }
}
