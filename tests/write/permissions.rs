//! Who may write: owners, groups and permissions of the files, and the rights of the daemon.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::image::Image;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::{MIB, ioctl, needs, run};
use crate::{errno, open_rw, try_open};

const NOBODY: u32 = 65534;

/// A node of a device, or a copy of an image, with an owner and permissions, that other users can reach.
fn node(place: &Path, name: &str, device: &Loop, owner: u32, mode: u32) -> PathBuf {
    let path = place.join(name);
    let number = fs::metadata(device.path()).expect("the device is there").rdev();
    let kind = nix::sys::stat::SFlag::S_IFBLK;
    nix::sys::stat::mknod(&path, kind, nix::sys::stat::Mode::from_bits_truncate(0o600), number).expect("root may");
    own(&path, owner, mode);
    path
}

fn own(path: &Path, owner: u32, mode: u32) {
    std::os::unix::fs::chown(path, Some(owner), Some(owner)).expect("root may");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("root may");
}

fn place() -> tempfile::TempDir {
    let place = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).expect("the directory is ours");
    place
}

/// Whether the user nobody can write to a file, by the errno of the shell's message.
fn write_by_nobody(file: &Path) -> Result<(), String> {
    let script = format!("printf x 1<>'{}'", file.display());
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", &script])
        .output()
        .expect("it starts");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn mode(file: &Path) -> u32 {
    fs::metadata(file).expect("it has attributes").mode() & 0o777
}

#[test]
fn those_write_who_may_write_to_the_node() {
    needs!(root, programs["setpriv"]);
    let (image, place) = (Image::new(MIB), place());
    let device = Loop::new(image.path());
    // The owner and permissions of the node, the options, and whether nobody may write.
    let cases = [
        (NOBODY, 0o600, "", true),
        (NOBODY, 0o400, "", false),
        (0, 0o600, "", false),
        (0, 0o644, "", false),
        (0, 0o666, "", true),
        (NOBODY, 0o600, ",mode=0400", false),
        (0, 0o666, ",umask=0222", false),
        (NOBODY, 0o600, ",umask=0077", true),
        (0, 0o600, ",uid=65534", true),
        (0, 0o400, ",uid=65534", false),
        (0, 0o660, ",gid=65534", true),
    ];
    for (number, (owner, bits, options, may_write)) in cases.into_iter().enumerate() {
        let node = node(place.path(), &format!("node{number}"), &device, owner, bits);
        let mount = Mount::with_options(&node, &["-o", &format!("rw,allow_other{options}")]);
        // The directory of the mountpoint is of the test's own user.
        fs::set_permissions(mount.directory().parent().expect("a parent"), fs::Permissions::from_mode(0o1777)).ok();
        let written = write_by_nobody(mount.file());
        let what = format!("{owner} {bits:o} {options}: {written:?}");
        assert_eq!(written.is_ok(), may_write, "{what}");
        assert!(may_write || written.is_err_and(|error| error.contains("Permission denied")), "{what}");
        open_rw(mount.file(), 0).write_all_at(b"x", 0).expect("root may write");
    }
}

#[test]
fn a_mount_for_one_user_is_not_for_others() {
    needs!(root, programs["setpriv"]);
    let (image, place) = (Image::new(MIB), place());
    let device = Loop::new(image.path());
    let node = node(place.path(), "node", &device, NOBODY, 0o666);
    let mount = crate::mount(&node);
    assert!(write_by_nobody(mount.file()).is_err_and(|error| error.contains("Permission denied")));
}

#[test]
fn a_read_only_mount_has_no_permission_to_write() {
    needs!(root);
    let (image, place) = (Image::new(MIB), place());
    let device = Loop::new(image.path());
    let node = node(place.path(), "node", &device, 0, 0o666);
    assert_eq!(mode(Mount::new(&node).file()), 0o444);
    assert_eq!(mode(crate::mount(&node).file()), 0o666);
}

/// Of a node with an access control list only the rights of the owner are kept, since the rights of others are not in the mode.
#[test]
fn access_control_lists_leave_the_rights_of_the_owner() {
    needs!(root);
    let image = Image::new(MIB);
    own(image.path(), 0, 0o666);
    let mount = crate::mount(image.path());
    assert_eq!(mode(mount.file()), 0o666);
    drop(mount);
    // Version 2; owner rw-, user 65534 ---, group rw-, mask rw-, others rw-.
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, u32::MAX), (2, 0, NOBODY), (4, 6, u32::MAX), (16, 6, u32::MAX), (32, 6, u32::MAX)];
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        list.extend(tag.to_le_bytes().into_iter().chain(rights.to_le_bytes()).chain(id.to_le_bytes()));
    }
    ioctl::set_acl(image.path(), &list);
    assert_eq!(mode(crate::mount(image.path()).file()), 0o600);
}

/// The daemon of root writes to the images of other users, as root can.
#[test]
fn root_writes_to_images_of_other_users() {
    needs!(root);
    let image = Image::new(MIB);
    own(image.path(), NOBODY, 0o600);
    let mount = crate::mount(image.path());
    open_rw(mount.file(), 0).write_all_at(b"abc", 5).expect("root may write");
    let mut bytes = [0; 3];
    File::open(image.path()).and_then(|file| file.read_exact_at(&mut bytes, 5)).expect("it can be read");
    assert_eq!(&bytes, b"abc");
}

#[test]
fn what_cannot_be_written_is_refused_at_the_open() {
    needs!(root, programs["chattr"]);
    let image = Image::new(MIB);
    let mount = crate::mount(image.path());
    run("chattr", ["+i".as_ref(), image.path().as_os_str()]);
    let refused = errno(try_open(mount.file(), 0));
    run("chattr", ["-i".as_ref(), image.path().as_os_str()]);
    assert_eq!(refused, Some(libc::EPERM), "an immutable image");
    open_rw(mount.file(), 0);
}
