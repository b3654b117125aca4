//! Command lines: the effect of each argument, and the messages for invalid ones.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use crate::bench::{Bench, Ran};
use crate::common::check::check;
use crate::common::{MIB, image, needs};

#[test]
fn helper_mounts_with_type_source_and_flags() {
    needs!(root);
    let bench = Bench::new();
    bench.mount(&["-o", "ro"]);
    let line = bench.mounted().expect("it is mounted");
    assert_eq!(line[5], "ro,nosuid,nodev,noexec,relatime");
    let device = bench.device.path().to_str().unwrap();
    assert_eq!(line[line.len() - 3..], ["fuse.blkholefs", device, "ro,user_id=0,group_id=0,default_permissions"]);
    check(&bench.file(), bench.device.path());
    bench.umount();
}

#[test]
fn options_reach_the_mount() {
    needs!(root);
    let bench = Bench::new();
    bench.mount(&[
        "-sn",
        "-o",
        "ro,exec,suid,noatime,nofail,_netdev,user",
        "-o",
        "allow_other,max_read=65536,umask=077,",
    ]);
    let line = bench.mounted().expect("it is mounted");
    assert_eq!(line[5], "ro,nodev,noatime");
    assert_eq!(line[line.len() - 1], "ro,user_id=0,group_id=0,default_permissions,allow_other,max_read=65536");
    assert_eq!(fs::metadata(bench.file()).unwrap().mode() & 0o077, 0);
    bench.umount();
}

/// With `direct_io`, the page cache keeps no bytes, so an open file shows later writes.
#[test]
fn direct_io_keeps_no_bytes() {
    needs!(root);
    let bench = Bench::new();
    bench.mount(&["-o", "direct_io"]);
    check(&bench.file(), bench.device.path());
    let file = File::open(bench.file()).unwrap();
    let hole = MIB / 4..MIB / 2;
    let mut bytes = [1; 512];
    file.read_exact_at(&mut bytes, hole.start).unwrap();
    assert_eq!(bytes, [0; 512]);
    image::write(bench.device.path(), hole.clone());
    file.read_exact_at(&mut bytes, hole.start).unwrap();
    assert_ne!(bytes, [0; 512]);
    drop(file);
    bench.umount();
}

#[test]
fn both_names_and_both_orders() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    for words in [[device, "mnt", "-o", "ro"], ["-o", "ro", device, "mnt"]] {
        bench.run("mount.fuse.blkholefs", words).succeeds();
        assert!(bench.mounted().is_some());
        bench.run("umount.fuse.blkholefs", [bench.mnt()]).succeeds();
        bench.run("blkholefs", ["mount"].into_iter().chain(words)).succeeds();
        bench.run("blkholefs", ["umount", "mnt"]).succeeds();
        bench.assert_nothing_left();
    }
}

#[test]
fn fake_does_everything_but_mount() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    bench.run("mount.blkholefs", [device, "mnt", "-f", "-o", "rw"]).succeeds();
    bench.assert_nothing_left();
    let ran = bench.run("mount.blkholefs", [device, "mnt", "-fv", "-o", "rw"]);
    assert_eq!(ran.code, 0);
    assert!(ran.err.contains(&format!("would mount {device} on ")), "{ran:?}");
    bench.run("mount.blkholefs", ["/nonexistent", "mnt", "-f"]).fails(32, "/nonexistent: cannot open: No such file");
    bench.run("mount.blkholefs", [device, "mnt", "-f", "-o", "frob"]).fails(1, "unknown option 'frob'");
}

#[test]
fn sloppy_warns_and_mounts() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    let warned = bench.run("mount.blkholefs", [device, "mnt", "-s", "-o", "frob,ro"]);
    assert_eq!((warned.code, warned.err.as_str()), (0, "mount.blkholefs: unknown option 'frob', ignored\n"));
    bench.umount();
}

#[test]
fn help_and_version() {
    needs!(root);
    let bench = Bench::new();
    for (name, words) in [
        ("mount.blkholefs", vec!["-h"]),
        ("umount.blkholefs", vec!["--help"]),
        ("blkholefs", vec!["mount", "--help"]),
        ("blkholefs", vec!["umount", "-h"]),
    ] {
        let usage =
            if name == "blkholefs" { format!("Usage: blkholefs {} ", words[0]) } else { format!("Usage: {name} ") };
        let ran = bench.run(name, words);
        assert!(ran.code == 0 && ran.out.starts_with(&usage) && ran.err.is_empty(), "{ran:?}");
        assert!(ran.out.lines().all(|line| line.len() <= 80), "wider than a terminal: {ran:?}");
    }
    let version = format!("mount.blkholefs {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(bench.run("mount.blkholefs", ["-V"]).out, version);
}

/// Each invalid input gives a message of one line and the right exit code, and leaves no mount.
#[test]
fn wrong_input() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    for (words, code, text) in [
        (&[][..], 1, "expected a device and a directory"),
        (&[device], 1, "expected a device and a directory"),
        (&[device, "mnt", "more"], 1, "expected a device and a directory"),
        (&[device, "mnt", "-x"], 1, "invalid option '-x'"),
        (&[device, "mnt", "-o"], 1, "'-o'"),
        (&[device, "mnt", "-t", "ext4"], 1, "'ext4'"),
        (&[device, "mnt", "-o", "alow_other"], 1, "did you mean allow_other"),
        (&[device, "mnt", "-o", "uid=me"], 1, "option 'uid=me'"),
        (&[device, "mnt", "-o", "remount,ro"], 1, "unmount it and mount it again"),
        (&[device, "mnt", "-N", "/nonexistent"], 1, "/nonexistent: cannot enter this mount namespace"),
        (&["/nonexistent", "mnt"], 32, "/nonexistent: cannot open: No such file"),
        (&["a\nb", "mnt"], 32, "a\\nb: cannot open"),
        (&["/dev/null", "mnt"], 32, "/dev/null: "),
        (&[device, "nonexistent"], 32, "/nonexistent: cannot mount here: No such file"),
        (&[device, "/dev/null"], 32, "neither a directory nor a regular file"),
        (&["mnt", device], 32, "the device comes first, and then the directory"),
        (&["/dev/nonexistent", "mnt"], 32, "lvchange -ay -K VG/VOLUME"),
        (&[device, "bin/blkholefs/x"], 32, "cannot mount here: Not a directory"),
    ] {
        let ran = bench.run("mount.blkholefs", words);
        ran.fails(code, text);
        assert!(ran.err.starts_with("mount.blkholefs: "), "{ran:?}");
        bench.assert_nothing_left();
    }
    bench.run("blkholefs", ["mount", "-s", device, "mnt"]).fails(1, "blkholefs: invalid option '-s'");
}

/// `map` and `info` mount nothing: an option of a mount is an error, and so is an option without the one that it needs.
#[test]
fn commands_without_a_mount_refuse_options_of_mounts() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    for command in ["map", "info"] {
        for (words, text) in [
            (&["-o", "allow_other"][..], format!("option 'allow_other' is for mounts, and means nothing to {command}")),
            (&["-o", "static"], format!("option 'static' is for mounts, and means nothing to {command}")),
            (&["-o", "ro"], format!("option 'ro' is for mounts, and means nothing to {command}")),
            (
                &["-o", "nbd=nbd://h/", "-o", "uid=1"],
                format!("option 'uid' is for mounts, and means nothing to {command}"),
            ),
            (&["-o", "frob"], "unknown option 'frob'".to_owned()),
            (&["-o", "nbd=http://h/"], "the scheme http is not supported".to_owned()),
            (&["--volume", "1"], "--volume is the volume of a thin pool, and needs -o thin_metadata=META".to_owned()),
        ] {
            bench.run("blkholefs", [command].iter().chain(words).chain([&device])).fails(1, &text);
        }
        bench.run("blkholefs", [command, "nbd+vsock://1/"]).fails(1, "the scheme nbd+vsock is not supported");
        let ran = bench.run("blkholefs", [command, device]);
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{ran:?}");
    }
    bench.run("mount.blkholefs", ["http://h/x", "mnt", "-o", "nofail"]).fails(1, "the scheme http is not supported");
}

#[test]
fn directory_is_mounted_once() {
    needs!(root);
    let bench = Bench::new();
    let daemon = bench.mount(&[]);
    let device = bench.device.path().to_str().unwrap();
    bench.run("mount.blkholefs", [device, "mnt"]).fails(32, &format!("{device} is already mounted here"));
    assert_eq!(bench.daemon(), Some(daemon));
    bench.umount();
}

/// A mountpoint that is a regular file shows the device as that file.
#[test]
fn file_as_mountpoint() {
    needs!(root);
    let bench = Bench::new();
    fs::remove_dir(bench.mnt()).unwrap();
    fs::write(bench.mnt(), "below").unwrap();
    bench.mount(&[]);
    check(&bench.mnt(), bench.device.path());
    bench.umount();
    assert_eq!(fs::read_to_string(bench.mnt()).unwrap(), "below");
    bench
        .run("mount.blkholefs", ["/dev", bench.mnt().to_str().unwrap()])
        .fails(32, "a directory cannot be mounted on a file");
}

/// A name with characters that the kernel or a parser treats as separators is one name.
#[test]
fn odd_names() {
    needs!(root);
    let bench = Bench::new();
    for name in ["a,b=c", "a b", "a\\040b", "-o", "a\nb", "x\"y"] {
        let image = bench.path(name);
        fs::copy(bench.image.path(), &image).unwrap();
        let ran = bench.run("mount.blkholefs", ["--".into(), image.clone(), bench.mnt()]);
        ran.succeeds();
        check(&bench.mnt().join(name), &image);
        let listed = Ran::of(std::process::Command::new("findmnt").args(["-no", "SOURCE"]).arg(bench.mnt()));
        // findmnt writes a character that is not printable as \x and two digits.
        assert_eq!(listed.out.trim_end().replace("\\x0a", "\n"), image.to_str().unwrap(), "{listed:?}");
        bench.umount_by(&["--".into(), image]);
        bench.assert_nothing_left();
    }
}
