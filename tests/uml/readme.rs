//! The backups of `docs/backups.md` and the restore of the README, typed as they are there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::common::image::{Image, write};
use crate::common::loop_device::Loop;
use crate::common::readme::indented;
use crate::common::{MIB, needs, run};
use crate::lvm::Group;

/// The size of the volumes, smaller than on the page: comparisons read all of them.
const SIZE: &str = "256M";

/// The page with the backups.
const PAGE: &str = "docs/backups.md";

/// Makes the program callable by both of its names in the directory `bin`.
fn install(bin: &Path) {
    fs::create_dir(bin).unwrap();
    for name in ["blkholefs", "mount.blkholefs"] {
        symlink(env!("CARGO_BIN_EXE_blkholefs"), bin.join(name)).unwrap();
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn backups_are_restored() {
    needs!(root, programs["rclone", "restic", "qemu-img", "scp"]);
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).into_os_string().into_string().unwrap();
    for name in ["backup", "mnt", "data"] {
        fs::create_dir(at(name)).unwrap();
    }
    install(at("bin").as_ref());
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
    let commands = ["Back up a thin volume", "Back up the used space of any device"].map(|title| indented(PAGE, title));
    for (number, command) in commands.concat().into_iter().enumerate() {
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

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_copy_is_restored_through_the_mount() {
    needs!(root, programs["cp", "sync"]);
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).into_os_string().into_string().unwrap();
    for name in ["backup", "mnt"] {
        fs::create_dir(at(name)).unwrap();
    }
    install(at("bin").as_ref());
    let group = Group::new("vg");
    group.lvm(&["lvcreate", "--quiet", "-T", "-L", "400M", "-c", "64k", "vg/pool"]);
    group.lvm(&["lvcreate", "--quiet", "-T", "-V", SIZE, "-n", "thin", "vg/pool"]);
    let copy = Image::with_data(256 * MIB, &[0..MIB, 100 * MIB..105 * MIB]);
    fs::copy(copy.path(), at("backup/thin.img")).unwrap();
    // Old data, of which the copy has holes in place.
    write(&group.volume("thin"), 50 * MIB..110 * MIB);

    let commands = indented("README.md", "Restore").join("\n");
    let commands = commands.replace("/backup", &at("backup")).replace(" /mnt", &format!(" {}", at("mnt")));
    let environment =
        format!("set -eux\nexport LVM_SYSTEM_DIR={} PATH={}:$PATH\n", group.configuration().display(), at("bin"));
    let check = format!("\ncmp {} /dev/vg/thin\nblkholefs map --totals /dev/vg/thin\n", at("backup/thin.img"));
    let printed = run("bash", ["-c", &(environment + &commands + &check)]);
    assert!(printed.contains(&format!("{}", 6 * MIB)), "only the data of the copy is mapped: {printed}");
}
