//! The backups that the README describes, typed as they are there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::common::image::Image;
use crate::common::loop_device::Loop;
use crate::common::{MIB, needs, run};
use crate::lvm::Group;

/// The size of the volume, smaller than in the README: comparisons read all of it.
const SIZE: &str = "256M";

/// The commands of the section "Views", in the order of the page.
fn commands() -> Vec<String> {
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).expect("the README");
    let section = page.split("\n## ").find(|section| section.starts_with("Views\n")).expect("a section about views");
    section.lines().filter_map(|line| line.strip_prefix("    ")).map(ToOwned::to_owned).collect()
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn backups_are_restored() {
    needs!(root, programs["rclone", "restic", "qemu-img", "scp"]);
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).into_os_string().into_string().unwrap();
    for name in ["bin", "backup", "mnt", "data"] {
        fs::create_dir(at(name)).unwrap();
    }
    for name in ["blkholefs", "mount.blkholefs"] {
        symlink(env!("CARGO_BIN_EXE_blkholefs"), Path::new(&at("bin")).join(name)).unwrap();
    }
    let group = Group::new("vg");
    group.lvm(&["lvcreate", "--quiet", "-T", "-L", "400M", "vg/pool"]);
    group.lvm(&["lvcreate", "--quiet", "-T", "-V", SIZE, "-n", "data", "vg/pool"]);
    run("mkfs.ext4", ["-q", "/dev/vg/data"]);
    run("mount", ["/dev/vg/data", &at("data")]);
    let image = Image::new(200 * MIB);
    run("mkfs.ext4", ["-q".as_ref(), image.path().as_os_str()]);
    let home = Loop::new(image.path());
    run("dmsetup", ["create", "home", "--table", &format!("0 409600 linear {} 0", home.path().display())]);

    let mut script = format!(
        "set -eux\nexport LVM_SYSTEM_DIR={} LVM_SUPPRESS_FD_WARNINGS=1 PATH={}:$PATH\n\
         export RCLONE_CONFIG={} RESTIC_REPOSITORY={} RESTIC_PASSWORD=word\nrestic -q init\n",
        group.configuration().display(),
        at("bin"),
        at("rclone.conf"),
        at("restic"),
    );
    for (number, command) in commands().into_iter().enumerate() {
        // Every day has new files, and an old one less.
        if command.starts_with("lvcreate -s") {
            script += &format!("head -c 5M /dev/urandom >{0}/{number}; cp {0}/{number} {0}/copy; sync\n", at("data"));
        }
        let command = command.replace("/backup", &at("backup")).replace(" /mnt", &format!(" {}", at("mnt")));
        let command = command.replace("-V 1G", &format!("-V {SIZE}"));
        script += &(command + "\n");
    }
    let backup = at("backup");
    script += &format!(
        "cmp /dev/vg/restored /dev/vg/wednesday\n\
         qemu-img compare -q -F raw {backup}/tuesday.qcow2 /dev/vg/tuesday\n\
         restic dump latest {}/tuesday.qcow2 | cmp - {backup}/tuesday.qcow2\n\
         e2fsck -fn {backup}/home.img\n\
         test $(stat -c %b {backup}/home.img) -lt $(($(stat -c %s {backup}/home.img) / 1024))\n\
         qemu-img rebase -b '' {backup}/wednesday.since-tuesday.qcow2\n\
         qemu-img compare -q -F raw {backup}/wednesday.since-tuesday.qcow2 /dev/vg/wednesday\n\
         qemu-img commit -q {backup}/tuesday.since-monday.qcow2\n\
         cmp {backup}/monday /dev/vg/tuesday\n",
        at("mnt"),
    );
    run("bash", ["-c", &script]);
    run("dmsetup", ["remove", "home"]);
    run("umount", [at("data")]);
}
