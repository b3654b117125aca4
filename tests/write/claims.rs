//! A device that is open for writing is claimed, and one that is claimed is not opened for writing.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::common::image::Image;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::{MIB, needs, run, wait_until};
use crate::{Writable, errno, links, mount, open_rw, try_open};

/// Claims a device, as mount(8) and mkfs(8) do.
fn claim(device: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device)
}

pub fn is_free(device: &Path) -> bool {
    match claim(device) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::EBUSY), "{error}");
            false
        }
    }
}

#[test]
fn a_claim_lasts_from_the_first_open_to_the_last_close() {
    needs!(root);
    let written = Writable::device(MIB, &[]);
    let device = written.itself();
    let reader = File::open(written.file()).expect("it opens");
    assert!(is_free(device), "a reader claims nothing");
    for _ in 0..20 {
        let first = written.open();
        let second = open_rw(written.file(), libc::O_DIRECT);
        assert!(!is_free(device));
        drop(first);
        second.write_all_at(b"x", 0).expect("a write inside the file");
        assert!(!is_free(device), "one is still open");
        drop(second);
        // The kernel sends the release after close(2) has returned.
        assert!(wait_until(|| is_free(device)), "nothing is open for writing");
    }
    nix::unistd::truncate(written.file(), 0).expect("it is emptied");
    assert!(is_free(device), "truncate(2) has claimed it only for its own time");
    let held = claim(device).expect("it is free");
    assert_eq!(errno(try_open(written.file(), 0)), Some(libc::EBUSY));
    assert_eq!(nix::unistd::truncate(written.file(), 0), Err(nix::errno::Errno::EBUSY));
    assert_eq!(nix::unistd::truncate(written.file(), MIB.cast_signed()), Err(nix::errno::Errno::EBUSY));
    reader.read_exact_at(&mut [0; 10], 0).expect("it can be read");
    drop(held);
    written.open();
}

/// A mounted ext4, until this value is dropped.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(device: &Path, place: &'a Path) -> Self {
        run("mount", ["-o".as_ref(), "ro,noload".as_ref(), device.as_os_str(), place.as_os_str()]);
        Self(place)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        run("umount", [self.0]);
    }
}

#[test]
fn a_mounted_device_is_only_read() {
    needs!(root, programs["mkfs.ext4", "mount", "umount"]);
    let image = Image::new(32 * MIB);
    run("mkfs.ext4", ["-q".as_ref(), image.path().as_os_str()]);
    let mut device = Loop::with_options(image.path(), &["--partscan"]);
    let partition = device.add_partition(1, 0, 32 * MIB / 512);
    let (_nodes, _shown, file) = links(&[("disk", device.path()), ("partition", &partition)]);
    let place = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    for used in [device.path(), &partition] {
        let _mounted = Mounted::new(used, place.path());
        for name in ["disk", "partition"] {
            assert_eq!(errno(try_open(&file(name), 0)), Some(libc::EBUSY), "{name}, {} is mounted", used.display());
            assert_eq!(errno(File::create(file(name))), Some(libc::EBUSY), "{name}");
            assert_eq!(std::fs::read(file(name)).expect("it can be read").len() as u64, 32 * MIB, "{name}");
        }
    }
    drop(open_rw(&file("partition"), 0));
    assert!(wait_until(|| is_free(device.path())));
    let held = open_rw(&file("disk"), 0);
    assert_eq!(errno(try_open(&file("partition"), 0)), Some(libc::EBUSY), "a part of a claimed disk");
    drop(held);
}

#[test]
fn two_mounts_do_not_write_to_one_device() {
    needs!(root);
    let image = Image::new(MIB);
    let device = Loop::new(image.path());
    let (one, two): (Mount, Mount) = (mount(device.path()), mount(device.path()));
    let held = open_rw(one.file(), 0);
    assert_eq!(errno(try_open(two.file(), 0)), Some(libc::EBUSY));
    let reader = File::open(two.file()).expect("it can be read");
    reader.read_exact_at(&mut [0; 10], 0).expect("it can be read");
    drop(held);
    assert!(wait_until(|| try_open(two.file(), 0).is_ok()), "the claim of the first mount is gone");
}

/// Two names of one device in one mount are one claim.
#[test]
fn two_names_share_a_claim() {
    needs!(root);
    let image = Image::new(MIB);
    let device = Loop::new(image.path());
    let (_nodes, _mount, file) = links(&[("one", device.path()), ("two", device.path())]);
    let (one, two) = (open_rw(&file("one"), 0), open_rw(&file("two"), 0));
    drop(one);
    two.write_all_at(b"x", 0).expect("a write inside the file");
    assert!(!is_free(device.path()));
    drop(two);
    assert!(wait_until(|| is_free(device.path())));
}

/// Many opens and closes at the same time: an open never fails for a claim of this mount.
#[test]
fn opens_and_closes_at_the_same_time_are_one_claim() {
    needs!(root);
    let written = Writable::device(MIB, &[]);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let path = written.file();
            scope.spawn(move || {
                for _ in 0..200 {
                    let file = open_rw(path, 0);
                    file.write_all_at(b"x", 0).expect("a write inside the file");
                    drop(file);
                    File::open(path).and_then(|file| file.sync_all()).expect("a reader may flush");
                }
            });
        }
    });
    assert!(wait_until(|| is_free(written.itself())));
}

/// A device that cannot be written at all.
#[test]
fn a_read_only_device_is_not_opened_for_writing() {
    needs!(root);
    let image = Image::new(MIB);
    let device = Loop::with_options(image.path(), &["--read-only"]);
    let mount = mount(device.path());
    let refused = errno(try_open(mount.file(), 0));
    assert!(matches!(refused, Some(libc::EACCES | libc::EROFS | libc::EPERM)), "{refused:?}");
    File::open(mount.file()).expect("it can be read");
}

/// The loop device can be detached as soon as the mount is gone (the fixtures panic if not).
#[test]
fn nothing_is_held_after_the_unmount() {
    needs!(root);
    for _ in 0..5 {
        let written = Writable::device(MIB, &[]);
        written.open().write_all_at(&[1; 100_000], 0).expect("a write inside the file");
        let Writable { mount, device, image: _image } = written;
        drop(mount);
        let device = device.expect("a loop device");
        assert!(is_free(device.path()));
    }
}
