//! The used space of images of disks and file systems, and copies of images without their free space.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use blkholefs::testing::filesystem::ReadBytes;
use blkholefs::testing::filesystem::detect::{UsedSpace, used_space};
use blkholefs::testing::map::{ExtentKind, view};
use blkholefs::testing::units::Bytes;

/// An image as a device.
pub struct ImageDevice(pub File);

impl ImageDevice {
    pub fn open(path: &Path) -> Self {
        Self(File::open(path).expect("an image"))
    }
}

impl ReadBytes for ImageDevice {
    fn len(&self) -> Bytes {
        Bytes::new(self.0.metadata().expect("the size of a file").len())
    }

    fn read_exact(&self, offset: Bytes, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset.get())
    }
}

/// The used space of an image, or why it is refused.
pub fn used_of(path: &Path) -> Result<UsedSpace, String> {
    used_space(&ImageDevice::open(path)).map_err(|reason| reason.to_string())
}

/// The free ranges of an image.
pub fn free_ranges(used: &UsedSpace) -> Vec<Range<u64>> {
    let runs = view::runs(&*used.map, Bytes::new(1), Bytes::ZERO..used.map.len());
    let free = runs.filter(|(_, extent)| extent.kind == ExtentKind::Free);
    free.map(|(start, extent)| start.get()..extent.end.get()).collect()
}

/// Copies the data of an image, as a program copies the file that shows the used space only: the free space, whose ranges are
/// returned, is a hole of the copy.
pub fn copy_without_free_space(image: &Path, copy: &Path) -> Vec<Range<u64>> {
    let used = used_of(image).unwrap_or_else(|reason| panic!("{}: {reason}", image.display()));
    let (source, target) = (File::open(image).expect("the image"), File::create(copy).expect("a copy"));
    target.set_len(used.map.len().get()).expect("a length");
    let mut buffer = vec![0; 1 << 20];
    for (start, extent) in view::runs(&*used.map, Bytes::new(1), Bytes::ZERO..used.map.len()) {
        let mut at = start.get();
        while extent.kind.is_data() && at < extent.end.get() {
            let count = (extent.end.get() - at).min(buffer.len() as u64);
            let part = &mut buffer[..count as usize];
            source.read_exact_at(part, at).expect("a read");
            target.write_all_at(part, at).expect("a write");
            at += count;
        }
    }
    free_ranges(&used)
}

/// Changes the byte at a position.
pub fn flip(path: &Path, at: u64, bits: u8) {
    let file = File::options().read(true).write(true).open(path).expect("an image");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ bits], at).expect("a write");
}
