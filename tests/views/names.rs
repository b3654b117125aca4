//! The names of views, in each kind of mount.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::check_image;
use crate::common::image::Image;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::nbd::directory;
use crate::common::{MIB, needs};

/// The names in a directory, sorted.
pub fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn each_file_of_a_directory_has_its_view_and_an_exact_file_wins() {
    needs!(root, programs["qemu-img"]);
    let (one, two) = (Image::with_data(8 * MIB, &[0..MIB]), Image::with_data(4 * MIB, &[MIB..2 * MIB]));
    let (one, two) = (Loop::new(one.path()), Loop::new(two.path()));
    let devices = directory();
    symlink(one.path(), devices.path().join("disk")).unwrap();
    // The name of the view of the other one.
    symlink(two.path(), devices.path().join("disk.qcow2")).unwrap();
    fs::create_dir(devices.path().join("below")).unwrap();
    symlink(two.path(), devices.path().join("below/two")).unwrap();

    let mount = Mount::with_options(devices.path(), &["-o", "compact"]);
    assert_eq!(names(mount.directory()), ["below", "disk", "disk.qcow2", "disk.qcow2.qcow2"]);
    assert_eq!(names(&mount.directory().join("below")), ["two", "two.qcow2"]);
    assert_eq!(fs::metadata(mount.directory().join("disk.qcow2")).unwrap().len(), 4 * MIB, "the device");
    check_image(&mount.directory().join("disk.qcow2.qcow2"), two.path());
    check_image(&mount.directory().join("below/two.qcow2"), two.path());
    for none in ["nothing.qcow2", ".qcow2", "below.qcow2", "disk.used", "disk.qcow2.qcow2.qcow2"] {
        let error = fs::metadata(mount.directory().join(none)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{none}");
    }
}
