//! A name can refer to different devices over time. A reader never gets the bytes of another device.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};

use common::check::{check, check_same_bytes, map_holes, map_of, open, seek_hole};
use common::image::{Image, open_for_writing};
use common::loop_device::Loop;
use common::mount::Mount;
use common::{MIB, ioctl, needs, run, wait_until};

/// A directory with a symbolic link `disk`, whose target can be changed.
struct Links(tempfile::TempDir);

impl Links {
    fn to(device: &Path) -> Self {
        let links = Self(tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory"));
        symlink(device, links.name()).expect("the directory is ours");
        links
    }

    fn name(&self) -> PathBuf {
        self.0.path().join("disk")
    }

    fn point_to(&self, device: &Path) {
        let new = self.0.path().join("new");
        symlink(device, &new).expect("the directory is ours");
        fs::rename(new, self.name()).expect("the directory is ours");
    }
}

/// The page cache of the mount belongs to the inode, so two open devices must not share an inode.
#[test]
fn an_open_file_keeps_its_device_when_the_name_leads_to_another() {
    needs!(root);
    let images = [Image::with_data(MIB, &[0..MIB]), Image::new(2 * MIB)];
    open_for_writing(images[1].path()).write_all_at(&[7; 65536], 0).expect("a write");
    let [first, second] = [0, 1].map(|index: usize| Loop::new(images[index].path()));
    for directory_spec in [true, false] {
        let links = Links::to(first.path());
        let spec = if directory_spec { links.0.path().to_owned() } else { links.name() };
        let mount = Mount::new(&spec);
        let file = mount.directory().join("disk");
        let early = open(&file);
        assert_eq!(map_holes(&file).len(), 1);
        // Opens at once, while the kernel still caches the name.
        links.point_to(second.path());
        let late = open(&file);
        let mut bytes = [[0; 4096]; 2];
        early.read_exact_at(&mut bytes[0], 32768).expect("the old device can be read");
        late.read_exact_at(&mut bytes[1], 32768).expect("the new device can be read");
        assert_eq!(bytes[1], [7; 4096], "the new device's bytes");
        assert_ne!(bytes[0], bytes[1], "the old device's bytes");
        assert_eq!(early.metadata().expect("stat").len(), MIB, "the open file's device");
        assert_eq!(late.metadata().expect("stat").len(), 2 * MIB);
        assert_eq!(seek_hole(&early, 0), Some(MIB));
        assert_eq!(seek_hole(&late, 0), Some(65536));
        assert!(wait_until(|| fs::metadata(&file).expect("stat").len() == 2 * MIB));
        check_same_bytes(&file, second.path());
        drop((early, late));
        check(&file, second.path());
        assert_eq!(map_holes(&file), map_of(2 * MIB, &[0..65536]));
    }
}

/// An inode number with rights for a user is never reused for a device without rights for that user.
#[test]
fn a_device_with_other_rights_has_another_inode_number() {
    needs!(root);
    let nodes = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    let images = [Image::new(MIB), Image::new(MIB), Image::new(MIB)];
    let devices = [0, 1, 2].map(|index: usize| Loop::new(images[index].path()));
    let paths = ["open", "same", "closed"].map(|name| nodes.path().join(name));
    for (device, path) in devices.iter().zip(&paths) {
        run("cp", ["--archive".as_ref(), device.path().as_os_str(), path.as_os_str()]);
    }
    run("chmod", ["0644".as_ref(), paths[0].as_os_str(), paths[1].as_os_str()]);
    run("chmod", ["0600".as_ref(), paths[2].as_os_str()]);
    let links = Links::to(&paths[0]);
    let mount = Mount::new(links.0.path());
    let file = mount.directory().join("disk");
    let number = || fs::metadata(&file).expect("stat").ino();
    let mode = || fs::metadata(&file).expect("stat").mode() & 0o777;
    let first = number();
    // The descriptor keeps the inode in the kernel, because the number of a dropped inode may be used again.
    let _held = File::options().read(true).custom_flags(libc::O_PATH).open(&file).expect("the file is there");
    links.point_to(&paths[1]);
    assert_eq!((number(), mode()), (first, 0o444), "the number stays if the rights stay");
    links.point_to(&paths[2]);
    assert!(wait_until(|| mode() == 0o400));
    assert_ne!(number(), first);
}

/// With an access control list, the group bits of the mode are the mask and not the rights of the group.
#[test]
fn with_an_access_control_list_only_the_owner_may_read() {
    needs!(root);
    const NOBODY: u32 = u32::MAX;
    // user::rw- user:1000:r-- group::--- mask::rw- other::r-- (`include/uapi/linux/posix_acl_xattr.h`)
    let entries = [(1, 6, NOBODY), (2, 4, 1000), (4, 0, NOBODY), (0x10, 6, NOBODY), (0x20, 4, NOBODY)];
    let entry = |(tag, rights, id): (u16, u16, u32)| {
        [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let list = [2_u32.to_le_bytes().to_vec(), entries.map(entry).concat()].concat();
    let image = Image::new(MIB);
    let device = Loop::new(image.path());
    let nodes = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    let node = nodes.path().join("disk");
    run("cp", ["--archive".as_ref(), device.path().as_os_str(), node.as_os_str()]);
    for spec in [&*node, image.path()] {
        ioctl::set_acl(spec, &list);
        assert_eq!(fs::metadata(spec).expect("stat").mode() & 0o777, 0o664);
        let mount = Mount::new(spec);
        assert_eq!(fs::metadata(mount.file()).expect("stat").mode() & 0o777, 0o400, "{}", spec.display());
        let file = open(mount.file());
        assert_eq!(file.metadata().expect("stat").mode() & 0o777, 0o400, "{}", spec.display());
    }
}
