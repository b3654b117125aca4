//! The Debian package of `cargo deb`.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::bench::{Bench, Ran};
use crate::common::{needs, requires, run, try_run};
use crate::tree::{Entry, Tree, files, installed, program, source, tree};

/// Makes the package as packagers do, but with the program of the tests and little compression, which takes the time.
fn make(directory: &Path) -> String {
    let package = directory.join("blkholefs.deb");
    let mut command = Command::new(env!("CARGO"));
    command.args(["deb", "--no-build", "--fast", "--no-dbgsym", "--strip", "--quiet", "--output"]).arg(&package);
    command.env("CARGO_TARGET_DIR", program().ancestors().nth(2).unwrap()).current_dir(source(""));
    let ran = Ran::of(&mut command);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{ran:?}");
    package.into_os_string().into_string().unwrap()
}

/// What `mount-helpers/install` makes, with the names and forms that Debian's policy wants.
fn expected() -> Tree {
    let mut tree = Tree::new();
    for (path, entry) in installed() {
        let name = path.strip_prefix("/usr/share/doc/blkholefs/").unwrap_or_default();
        let (path, entry) = match (name, entry) {
            ("LICENSE-MIT", entry) => (path.replace(name, "copyright"), entry),
            ("LICENSE-APACHE", _) => continue,
            ("CHANGELOG.md", entry) => (path.replace(name, "changelog.gz"), entry),
            (_, entry) if !path.starts_with("/usr/share/man/") => (path, entry),
            (_, Entry::Link(target)) => (path + ".gz", Entry::Link(target + ".gz")),
            (_, entry) => (path + ".gz", entry),
        };
        tree.insert(path, entry);
    }
    tree
}

#[test]
fn package_has_what_is_installed_by_hand() {
    needs!(programs["cargo-deb", "dpkg-deb", "dpkg-shlibdeps", "strip", "xz"]);
    let directory = tempfile::tempdir().unwrap();
    let package = make(directory.path());
    let content = directory.path().join("content");
    run("dpkg-deb", ["--extract".as_ref(), package.as_ref(), content.as_os_str()]);
    assert_eq!(files(&tree(&content)), expected());
    let licence = fs::read_to_string(content.join("usr/share/doc/blkholefs/copyright")).unwrap();
    assert_eq!(licence, fs::read_to_string(source("mount-helpers/packages/copyright")).unwrap());

    let field = |name: &str| run("dpkg-deb", ["--field", &package, name]).trim_end().to_owned();
    assert_eq!(field("Package"), "blkholefs");
    assert_eq!(field("Version"), concat!(env!("CARGO_PKG_VERSION"), "-1"));
    assert_eq!(field("Recommends"), "fuse3");
    let depends = field("Depends");
    assert!(depends.starts_with("libc6 (>= ") && !depends.contains(','), "{depends}");
    // A second line of the summary would be part of the description.
    assert_eq!(field("Description").lines().next(), Some(env!("CARGO_PKG_DESCRIPTION")));
    run("dpkg-deb", ["--control".as_ref(), package.as_ref(), directory.path().join("control").as_os_str()]);
    let control: Vec<_> = tree(&directory.path().join("control")).into_keys().collect();
    assert_eq!(control, ["/control"], "no script runs as root");
}

/// A root over that of this system, where a package is installed without a change of the system. $PWD is the same there.
const PRIVATE_ROOT: &str = r#"
set -eu
umask 022
mount --make-rprivate /
mkdir root
mount -t tmpfs none root
mkdir root/upper root/work root/root
mount -t overlay -o "lowerdir=/,upperdir=$PWD/root/upper,workdir=$PWD/root/work" none root/root
for directory in dev proc sys; do mount --rbind /$directory root/root/$directory; done
mkdir -p "root/root$PWD"
mount --bind "$PWD" "root/root$PWD"
# Images of containers leave out manuals.
rm -f root/root/etc/dpkg/dpkg.cfg.d/*
chroot root/root sh -euc "cd '$PWD'; $SCRIPT"
# What is left of the package. /run is empty after the next start of the machine. A device is how overlayfs notes that a file
# of this system is gone.
find root/upper -name '*blkholefs*' -not -type c -not -path 'root/upper/run/*' -not -path "root/upper$PWD*"
"#;

/// Runs in the private root. man(1) keeps pages of 80 columns, others not.
const SCRIPT: &str = r#"
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin MANPAGER=cat MANWIDTH=100
dpkg --install blkholefs.deb >dpkg.log
dpkg --verify blkholefs
mount -a -T fstab
findmnt -rno SOURCE,FSTYPE --real -M mnt
cmp $DEV mnt/$(basename $DEV)
for page in blkholefs mount.blkholefs umount.blkholefs mount.fuse.blkholefs umount.fuse.blkholefs; do
    man 8 $page | sed -n 1p | cut -d ' ' -f 1
done
systemd-analyze verify --man=no --recursive-errors=no blkholefs@dev-loop0.service
umount -c mnt
mount -t fuse.blkholefs $DEV mnt
umount mnt
dpkg --purge blkholefs >>dpkg.log
dpkg --status blkholefs >status 2>&1 || echo purged
"#;

/// Whether the kernel has the file system of the private root.
fn has_overlay() -> bool {
    let known = || fs::read_to_string("/proc/filesystems").unwrap().contains("\toverlay\n");
    known() || try_run("modprobe", ["overlay"], "").is_ok_and(|_| known())
}

#[test]
fn package_mounts_from_fstab_and_leaves_nothing() {
    needs!(root, programs["cargo-deb", "dpkg", "dpkg-shlibdeps", "strip", "xz"]);
    needs!(programs["findmnt", "man", "systemd-analyze", "unshare"]);
    if !has_overlay() && !requires(&["overlayfs"]) {
        return;
    }
    let bench = Bench::new();
    make(&bench.path(""));
    let line =
        format!("{} {} blkholefs ro,x-systemd.automount 0 0\n", bench.device.path().display(), bench.mnt().display());
    fs::write(bench.path("fstab"), line).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", PRIVATE_ROOT]).current_dir(bench.path("")).env("SCRIPT", SCRIPT);
    let ran = Ran::of(command.env("DEV", bench.device.path()).env("LC_ALL", "C"));
    let log = fs::read_to_string(bench.path("dpkg.log")).unwrap_or_default();
    let mount = "MOUNT.BLKHOLEFS(8)\n".repeat(4);
    let expected = format!("{} fuse.blkholefs\nBLKHOLEFS(8)\n{mount}purged\n", bench.device.path().display());
    assert_eq!((ran.code, ran.out, ran.err), (0, expected, String::new()), "{log}");
    let status = fs::read_to_string(bench.path("status")).unwrap();
    assert!(status.contains("not installed"), "{status}");
}
