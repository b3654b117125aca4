//! Views of a device in a mount: a compact image, what changed since a snapshot, used space only.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

#[path = "views/boot.rs"]
mod boot;
#[path = "views/compact.rs"]
mod compact;
#[path = "views/names.rs"]
mod names;
#[path = "views/since.rs"]
mod since;
#[path = "support/thin_image.rs"]
#[allow(dead_code, reason = "only the makers of images are needed here")]
mod thin_image;
#[path = "views/used.rs"]
mod used;

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use common::mount::Mount;
use common::run;

/// The view of a mount with one file whose name ends so.
fn view(mount: &Mount, ending: &str) -> PathBuf {
    let mut name = OsString::from(mount.file());
    name.push(ending);
    PathBuf::from(name)
}

/// QEMU finds no fault in an image, and the same bytes in it as in a device or raw image.
fn check_image(image: &Path, device: &Path) {
    let image = image.to_str().expect("temporary paths are text");
    run("qemu-img", ["check", "-q", image]);
    let device = device.to_str().expect("temporary paths are text");
    run("qemu-img", ["compare", "-q", "-f", "qcow2", "-F", "raw", image, device]);
}

/// `length` bytes at `offset`.
fn read_at(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).expect("the range can be read");
    bytes
}
