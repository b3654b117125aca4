//! Writing through a mount with `-o rw`.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

#[path = "write/calls.rs"]
mod calls;
#[path = "write/claims.rs"]
mod claims;
#[path = "write/coherence.rs"]
mod coherence;
#[path = "write/copies.rs"]
mod copies;
#[path = "write/maps.rs"]
mod maps;
#[path = "write/permissions.rs"]
mod permissions;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use common::image::Image;
use common::loop_device::Loop;
use common::mount::Mount;

/// A device or image, and a mount of it that can be written.
struct Writable {
    mount: Mount,
    device: Option<Loop>,
    image: Image,
}

impl Writable {
    /// A loop device over an image of `size` bytes that is one hole, with additional options for losetup(8).
    fn device(size: u64, options: &[&str]) -> Self {
        let image = Image::new(size);
        let device = Loop::with_options(image.path(), options);
        Self { mount: mount(device.path()), device: Some(device), image }
    }

    /// An image of `size` bytes that is one hole.
    fn image(size: u64) -> Self {
        let image = Image::new(size);
        Self { mount: mount(image.path()), device: None, image }
    }

    /// The device or image itself.
    fn itself(&self) -> &Path {
        self.device.as_ref().map_or(self.image.path(), Loop::path)
    }

    fn file(&self) -> &Path {
        self.mount.file()
    }

    fn open(&self) -> File {
        open_rw(self.file(), 0)
    }

    fn check(&self) {
        common::check::check(self.file(), self.itself());
    }
}

/// One of each kind, with their names in messages.
fn each_kind(size: u64) -> [(&'static str, Writable); 3] {
    [
        ("sectors of 512", Writable::device(size, &[])),
        ("sectors of 4096", Writable::device(size, &["--sector-size", "4096"])),
        ("image", Writable::image(size)),
    ]
}

fn mount(spec: &Path) -> Mount {
    Mount::writable(spec)
}

fn try_open(path: &Path, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
}

/// Opens for reading and writing.
fn open_rw(path: &Path, flags: i32) -> File {
    try_open(path, flags).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The errno of a failed call.
fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().map(|error| error.raw_os_error().expect("an error of the system"))
}

fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> Result<(), Errno> {
    let (offset, len) = (i64::try_from(offset).expect("an offset"), i64::try_from(len).expect("a length"));
    // SAFETY: the call takes no pointers, and the descriptor is open.
    Errno::result(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) }).map(drop)
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// A directory of links to devices, to be mounted.
fn links(devices: &[(&str, &Path)]) -> (tempfile::TempDir, Mount, impl Fn(&str) -> PathBuf + use<>) {
    let nodes = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    for (name, device) in devices {
        std::os::unix::fs::symlink(device, nodes.path().join(name)).expect("the directory is ours");
    }
    let mount = mount(nodes.path());
    let directory = mount.directory().to_owned();
    (nodes, mount, move |name: &str| directory.join(name))
}
