//! What findmnt(8), umount(8) and mount.fuse3(8) do with our mounts and lines of fstab, as mount.blkholefs(8) says in its section "WHAT
//! OTHER PROGRAMS SAY".

use std::fs;
use std::process::Command;

use crate::bench::{Bench, Ran};
use crate::common::check::check;
use crate::common::{needs, run};

/// The exit code and the complaints of `findmnt --verify`, each without the place and the reason in parentheses.
fn verified(bench: &Bench, line: &str) -> (i32, Vec<String>) {
    fs::write(bench.path("table"), line).unwrap();
    let mut command = Command::new("findmnt");
    let ran = Ran::of(command.args(["--verify", "--tab-file"]).arg(bench.path("table")).env("LC_ALL", "C"));
    let complaints = ran.out.lines().filter_map(|line| {
        let complaint = line.trim().strip_prefix('[').filter(|complaint| !complaint.starts_with(' '))?;
        Some(complaint.split(" (").next().unwrap_or(complaint).replace("] ", ": "))
    });
    (ran.code, complaints.collect())
}

/// Warnings only, unless there is a file system on the device that findmnt knows.
#[test]
fn findmnt_verify_warns() {
    needs!(root, programs["findmnt", "mkfs.ext4"]);
    let bench = Bench::new();
    let unsupported = |kind: &str| format!("W: {kind} seems unsupported by the current kernel");
    let undetected = "W: cannot detect on-disk filesystem type".to_owned();
    for options in ["ro,nofail,x-systemd.automount", "writable,noauto", "ro,name=disk"] {
        let line = bench.fstab_line(options);
        assert_eq!(verified(&bench, &line), (0, vec![unsupported("blkholefs"), undetected.clone()]), "{options}");
        let line = line.replace(" blkholefs ", " fuse.blkholefs ");
        assert_eq!(verified(&bench, &line), (0, vec![unsupported("fuse.blkholefs"), undetected.clone()]));
    }
    let device = bench.device.path().to_str().unwrap();
    let with_spec = |spec: &str| bench.fstab_line("ro").replace(device, spec);
    for spec in ["/dev", bench.image.path().to_str().unwrap()] {
        let expected = vec![
            format!("W: non-bind mount source {spec} is a directory or regular file"),
            unsupported("blkholefs"),
            undetected.clone(),
        ];
        assert_eq!(verified(&bench, &with_spec(spec)), (0, expected));
    }
    let unreachable = "W: unreachable source: nbd://h/x: No such file or directory".to_owned();
    let expected = vec![unreachable, unsupported("blkholefs"), undetected];
    assert_eq!(verified(&bench, &with_spec("nbd://h/x")), (0, expected));
    let uri = "nbd+unix:///x?socket=/s";
    let (code, complaints) = verified(&bench, &with_spec(uri));
    assert_eq!((code, complaints[0].as_str()), (1, format!("E: unsupported source tag: {uri}").as_str()));
    run("mkfs.ext4", ["-q".as_ref(), bench.device.path().as_os_str()]);
    let differs = "E: blkholefs does not match with on-disk ext4".to_owned();
    assert_eq!(verified(&bench, &bench.fstab_line("ro")), (1, vec![unsupported("blkholefs"), differs]));
    let line = format!("blkholefs#{device} {} fuse ro 0 0\n", bench.mnt().display());
    assert_eq!(verified(&bench, &line), (0, vec![]));
    let page = include_str!("../../mount-helpers/man/mount.blkholefs.8").replace("\\-", "-");
    for said in [
        "[W] blkholefs seems unsupported by the current kernel",
        "[W] cannot detect on-disk filesystem type",
        "[E] blkholefs does not match with on-disk ext4",
        "non-bind mount source ... is a directory or regular file",
        "unreachable source",
        "unsupported source tag",
    ] {
        assert!(page.contains(said), "{said}");
    }
}

/// The type of a mount is fuse.blkholefs in the kernel's table, however it was made.
#[test]
fn umount_by_type_takes_the_kernels_type() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount", "mountpoint"]);
    let bench = Bench::new();
    let ran = bench.script(
        "",
        r#"
        # The copies of the mounts of other tests. Without them, each of these commands is about one mount.
        findmnt -rno TARGET -t fuse.blkholefs | while read -r place; do umount -i -l "$place" || true; done
        for options in ro ro,x-word; do
            for by in blkholefs fuse.blkholefs; do
                mount -t $by "$DEV" mnt -o $options
                umount -a -t blkholefs
                umount -a -t fuse
                mountpoint -q mnt && echo mounted
                umount -a -t fuse.blkholefs
                mountpoint -q mnt || echo unmounted
            done
        done
        "#,
    );
    assert_eq!(ran.out, "mounted\nunmounted\n".repeat(4), "{ran:?}");
}

/// The program that refuses to unmount names itself: umount(8), or the helper that it runs.
#[test]
fn umount_runs_the_helper_for_a_relative_path_and_for_a_file() {
    needs!(root, programs["unshare", "mount", "umount"]);
    let bench = Bench::new();
    let ran = bench.script(
        "",
        r#"
        touch file
        refused() { umount "$@" 2>&1 | sed 's/:.*//; q'; }
        mount -t blkholefs "$DEV" mnt
        exec 5<"mnt/$(basename "$DEV")"
        refused "$PWD/mnt"
        refused mnt
        exec 5<&-
        mount -t blkholefs "$DEV" file
        exec 5<file
        refused "$PWD/file"
        exec 5<&-
        umount "$PWD/mnt" "$PWD/file"
        "#,
    );
    assert_eq!(ran.out, "umount\numount.fuse.blkholefs\numount.fuse.blkholefs\n", "{ran:?}");
}

/// Runs a script where mount(8) finds mount.fuse3 for the type fuse, and mount.fuse3 finds the program.
fn script_with_mount_fuse(bench: &Bench, fstab: &str, script: &str) -> Ran {
    let links = "ln -sf \"$PROGRAM\" farm/sbin/blkholefs\nln -sf mount.fuse3 farm/sbin/mount.fuse\n";
    bench.script(fstab, &format!("{links}{script}"))
}

/// `mount -t fuse` and, without our helper, `mount -t fuse.blkholefs` run the program through mount.fuse3.
#[test]
fn mount_fuse_runs_the_program() {
    needs!(root, programs["unshare", "mount", "umount", "mount.fuse3", "findmnt"]);
    let bench = Bench::new();
    let ran = script_with_mount_fuse(
        &bench,
        "",
        r#"
        shows() { findmnt -rno SOURCE,FSTYPE,VFS-OPTIONS mnt; cmp "$DEV" "mnt/${1:-$(basename "$DEV")}"; umount mnt -c; }
        mount -t fuse "blkholefs#$DEV" mnt
        shows
        mount -t fuse "blkholefs#$DEV" mnt -o ro,mode=0400,nofail,name=disk
        stat -c %a mnt/disk
        shows disk
        mount -t fuse "blkholefs#$DEV" mnt -o nodev,nosuid,writable
        shows
        mount -t fuse "mount.blkholefs#$DEV" mnt -o rw
        shows
        rm farm/sbin/mount.fuse.blkholefs
        mount -t fuse.blkholefs "$DEV" mnt
        shows
        "#,
    );
    let device = bench.device.path().display();
    let line = |options: &str| format!("{device} fuse.blkholefs {options}\n");
    let plain = line("ro,nosuid,nodev,noexec,relatime");
    let writable = line("rw,nosuid,nodev,noexec,relatime");
    assert_eq!((ran.out, ran.err), (format!("{plain}400\n{plain}{writable}{}", plain.repeat(2)), String::new()));
}

/// mount(8) does not know the mount again by a source that has `blkholefs#` before it.
#[test]
fn the_type_fuse_in_fstab_is_mounted_once() {
    needs!(root, programs["unshare", "mount", "umount", "mount.fuse3", "df"]);
    let bench = Bench::new();
    let line = format!("blkholefs#{} {} fuse ro 0 0\n", bench.device.path().display(), bench.mnt().display());
    let ran = script_with_mount_fuse(
        &bench,
        &line,
        r#"
        mount -a -T fstab
        mount -a -T fstab || echo $?
        df --output=source -t fuse.blkholefs mnt | tail -n 1
        df -t blkholefs mnt || true
        umount mnt
        "#,
    );
    assert_eq!(ran.out, format!("32\n{}\n", bench.device.path().display()), "{ran:?}");
    let texts = ["is already mounted here", "unmount it first", "no file systems processed"];
    assert!(ran.err.lines().zip(texts).all(|(line, text)| line.contains(text)), "{ran:?}");
    assert_eq!(ran.err.lines().count(), texts.len(), "{ran:?}");
}

/// `umount` as a SPEC would unmount what is there, and report that as a mount.
#[test]
fn a_spec_of_mount_fuse_is_no_command() {
    needs!(root, programs["unshare", "mount", "umount", "mount.fuse3", "findmnt"]);
    let bench = Bench::new();
    let ran = script_with_mount_fuse(
        &bench,
        "",
        r#"
        for name in umount map; do
            cp "$DEV" $name
            mount -t fuse "blkholefs#$name" mnt
            cmp $name mnt/$name
            mount -t fuse "blkholefs#umount" mnt || echo $?
            findmnt -rno SOURCE mnt
            umount mnt -c
            rm $name
        done
        "#,
    );
    assert_eq!(ran.out, "32\numount\n32\nmap\n", "{ran:?}");
    assert!(ran.err.starts_with("blkholefs: ") && ran.err.contains(": umount is already mounted here\n"), "{ran:?}");
}

/// With `setuid=`, mount.fuse3 runs the program as that user, who mounts what this user can read.
#[test]
fn mount_fuse_mounts_for_another_user() {
    needs!(root, programs["unshare", "mount", "umount", "mount.fuse3", "fusermount3"]);
    let bench = Bench::new();
    let ran = script_with_mount_fuse(
        &bench,
        "",
        r#"
        cp "$DEV" image
        chmod 644 image
        chown nobody mnt
        mount -t fuse "blkholefs#$PWD/image" mnt -o ro,setuid=nobody
        grep " $PWD/mnt " /proc/self/mountinfo | grep -o user_id=65534
        umount mnt
        ! mount -t fuse "blkholefs#$DEV" mnt -o ro,setuid=nobody
        "#,
    );
    assert_eq!(ran.out, "user_id=65534\n", "{ran:?}");
    let device = bench.device.path().display();
    assert_eq!(ran.err, format!("blkholefs: {device}: cannot open: Permission denied\n"));
}

/// The exit codes and messages are those of the helper.
#[test]
fn mount_fuse_fails_as_the_helper_does() {
    needs!(root, programs["unshare", "mount", "umount", "mount.fuse3"]);
    let bench = Bench::new();
    let ran = script_with_mount_fuse(
        &bench,
        "",
        r#"
        try() { "$@" || echo $?; }
        try mount -t fuse "blkholefs#$DEV" mnt -o frob
        try mount -t fuse blkholefs#/nonexistent mnt
        try mount -t fuse "blkholefs#$DEV" mnt -o drop_privileges
        try mount -t fuse blkholefs mnt
        ! mountpoint -q mnt
        "#,
    );
    assert_eq!(ran.out, "1\n32\n1\n1\n", "{ran:?}");
    for text in [
        "blkholefs: unknown option 'frob'",
        "blkholefs: /nonexistent: cannot open: No such file or directory",
        "blkholefs: option 'drop_privileges' of mount.fuse3 is not possible: ",
        "blkholefs: there is no command '",
    ] {
        assert!(ran.err.lines().any(|line| line.starts_with(text)), "{text}: {ran:?}");
    }
}

/// The words of a command stay its words, also where they look like those of mount.fuse3.
#[test]
fn a_command_is_no_spec() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    fs::create_dir(bench.path("map")).unwrap();
    bench.run("blkholefs", ["map", device, "-o", "ro"]).fails(1, "option 'ro' is for mounts");
    bench.run("blkholefs", ["./map", "mnt", "-o", "frob"]).fails(1, "unknown option 'frob'");
    bench.run("blkholefs", [device, "mnt", "-o", "rw,dev,suid"]).succeeds();
    assert!(bench.mounted().unwrap()[5].starts_with("ro,nosuid,nodev,noexec"));
    check(&bench.file(), bench.device.path());
    bench.umount();
}
