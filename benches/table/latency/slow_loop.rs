//! A loop device whose reads take 2 ms, against the slow image that it is made of.

use std::path::PathBuf;
use std::time::Duration;

use super::slow_image::SlowImage;
use super::{Client, directory};
use crate::Bench;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::measure::{Contender, Table, rounds};
use crate::shape::{Shape, forget};

/// What each read takes.
const DELAY: Duration = Duration::from_millis(2);

/// A loop device over a slow image, whose reads of the image are direct: nothing of the image stays in a page cache.
pub struct SlowLoop {
    pub device: Loop,
    pub image: SlowImage,
    pub directory: tempfile::TempDir,
}

impl SlowLoop {
    /// A device of this shape.
    pub fn new(bench: &Bench, shape: Shape) -> Self {
        let directory = directory(bench);
        let path = directory.path().join("image");
        shape.write(&path);
        let image = SlowImage::new(&path, DELAY);
        let device = Loop::with_options(&image.file(), &["--direct-io=on", "--read-only"]);
        let direct = std::fs::read_to_string(format!("/sys/block/{}/loop/dio", device.name()));
        assert_eq!(direct.expect("a loop device").trim(), "1", "the reads of the loop device are direct");
        Self { device, image, directory }
    }

    /// A new mount of the device, of which the page cache holds nothing, and the file in it.
    pub fn mount(&self) -> (Mount, PathBuf) {
        forget(self.device.path());
        let mount = Mount::new(self.device.path());
        let file = mount.file().to_owned();
        (mount, file)
    }
}

/// Sparse copies.
pub fn all(bench: &Bench, table: &mut Table) {
    let slow = &SlowLoop::new(bench, Shape::new(2 << 30, 320, 64 << 10));
    let to = &slow.directory.path().join("copy");
    // Not tar: an image on FUSE has no times that prove anything, so the device seems to change, and tar fails.
    for (client, target) in [(Client::Cp, Some(0.5)), (Client::Reader, None)] {
        let contenders = vec![
            Contender::new("ours", move || {
                let (_mount, file) = slow.mount();
                client.read(&file, to)
            }),
            Contender::new("the slow image itself", move || client.read(&slow.image.file(), to)),
        ];
        let case = format!("{}, loop, 2 ms, 320 extents of 64 KiB in 2 GiB", client.name());
        table.add(&case, "s", &rounds(bench.rounds(), contenders), &[target]);
    }
}
