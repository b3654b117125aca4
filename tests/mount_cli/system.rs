//! mount(8), umount(8) and findmnt(8) themselves, with the helpers installed in a private mount namespace.

use std::fs;
use std::process::Command;

use crate::bench::{Bench, NAMES, Ran};
use crate::common::needs;

/// Makes /usr/sbin a directory of links to its files, so that helpers can be added without a change of the host.
const INSTALL: &str = r#"
set -eu
mount --make-rprivate /
mount -t tmpfs none farm
mkdir farm/real farm/sbin
mount --bind /usr/sbin farm/real
ln -s "$PWD"/farm/real/* farm/sbin/
for name in $NAMES; do ln -sf "$PROGRAM" farm/sbin/$name; done
mount --bind farm/sbin /usr/sbin
[ -e /sbin/mount.blkholefs ]
"#;

impl Bench {
    /// Runs a script where the helpers are installed; `$DEV` is the device, `$PWD/mnt` the place, `$PWD/fstab` a table
    /// with `fstab` in it.
    pub fn script(&self, fstab: &str, script: &str) -> Ran {
        fs::create_dir_all(self.path("farm")).unwrap();
        fs::write(self.path("fstab"), fstab).unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &[INSTALL, script].concat()]).current_dir(self.path(""));
        command.env("NAMES", NAMES.join(" ")).env("PROGRAM", env!("CARGO_BIN_EXE_blkholefs"));
        let ran = Ran::of(command.env("DEV", self.device.path()).env("LC_ALL", "C"));
        assert_eq!(ran.code, 0, "{ran:?}");
        ran
    }

    pub fn fstab_line(&self, options: &str) -> String {
        format!("{} {} blkholefs {options} 0 0\n", self.device.path().display(), self.mnt().display())
    }
}

#[test]
fn fstab_line_works_twice_in_a_row() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount"]);
    let bench = Bench::new();
    let ran = bench.script(
        &bench.fstab_line("ro,nofail,allow_other,x-systemd.device-timeout=10s"),
        r#"
        mount -a -T fstab
        findmnt -rno SOURCE,FSTYPE --real -M "$PWD/mnt"
        mount -a -T fstab
        grep -c " $PWD/mnt " /proc/self/mountinfo
        findmnt -rno TARGET -S "$DEV"
        umount "$PWD/mnt"
        mount -T fstab "$PWD/mnt"
        umount "$DEV"
        ! pgrep -f "mount.blkholefs.*$PWD/mnt"
        "#,
    );
    let (device, place) = (bench.device.path().display(), bench.mnt());
    let expected = format!("{device} fuse.blkholefs\n1\n{}\n", place.display());
    assert_eq!((ran.out, ran.err), (expected, String::new()));
}

/// As for every file system, `nofail` ignores a missing device, but not a device that cannot be mounted.
#[test]
fn nofail_is_for_missing_devices() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount"]);
    let bench = Bench::new();
    let missing = bench.fstab_line("ro,nofail").replace(bench.device.path().to_str().unwrap(), "/dev/nonexistent");
    bench.script(&missing, "mount -a -T fstab; ! mountpoint -q mnt");
    let wrong = bench.script(&bench.fstab_line("ro,nofail,frob"), "mount -a -T fstab || echo $?");
    assert!(wrong.out == "32\n" && wrong.err.contains("frob"), "{wrong:?}");
    let required = missing.replace(",nofail", "");
    assert_eq!(bench.script(&required, "mount -a -T fstab || echo $?").out, "32\n");
}

#[test]
fn mount_by_type_and_by_subtype() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount"]);
    let bench = Bench::new();
    let ran = bench.script(
        "",
        r#"
        for type in blkholefs fuse.blkholefs; do
            mount -t $type "$DEV" mnt -o 'allow_other,umask=0077'
            stat -c %a "mnt/$(basename "$DEV")"
            umount mnt -c
        done
        mount -f -t blkholefs "$DEV" mnt
        mount -v -t blkholefs "$DEV" mnt 2>&1 >/dev/null | grep -o 'mounting /dev'
        umount -l mnt
        "#,
    );
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("400\n400\nmounting /dev\n", ""));
}

/// mount(8) adds no text to the messages of the helper and returns its exit code.
#[test]
fn failures_reach_the_user_of_mount() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount"]);
    let bench = Bench::new();
    let ran = bench.script(
        "",
        r#"
        try() { "$@" && echo "worked: $*" || echo $?; }
        try mount -t blkholefs "$DEV" mnt -o frob
        try mount -t blkholefs /nonexistent mnt
        try mount -t blkholefs "$DEV" nonexistent
        try mount -t blkholefs "$DEV" mnt
        try mount -t blkholefs "$DEV" mnt -o remount,ro
        umount mnt
        "#,
    );
    let device = bench.device.path().display();
    assert_eq!(ran.out, format!("1\n32\n32\nworked: mount -t blkholefs {device} mnt\n1\n"), "{ran:?}");
    let lines: Vec<_> = ran.err.lines().collect();
    for text in ["unknown option 'frob'", "/nonexistent: cannot open", "nonexistent", "unmount it and mount it again"] {
        assert!(lines.iter().any(|line| line.contains(text)), "{text}: {ran:?}");
    }
    assert_eq!(lines.len(), 4, "{ran:?}");
}
