//! A device whose size is no multiple of its sectors.

use std::os::unix::fs::FileExt as _;

use super::MIB;
use super::check::{Extent, Kind, map_holes, open};
use super::mount::LoopMount;

/// The last sector of this device is not whole. Some kernels can read it, through the page cache only, and others cannot.
pub fn a_partial_last_sector_is_data() {
    const WHOLE: u64 = MIB - 4096;
    let source = LoopMount::with_options(WHOLE + 1536, &[], &["--sector-size=4096"]);
    let map = [Extent(Kind::Hole, 0..WHOLE), Extent(Kind::Data, WHOLE..WHOLE + 1536)];
    assert_eq!(map_holes(source.file()), map);
    // Held open, so that its page cache stays.
    let device = open(source.device.path());
    for (round, offset) in [WHOLE, WHOLE + 511, WHOLE - 4096, WHOLE - 100, 0, WHOLE + 1535].into_iter().enumerate() {
        let (mut expected, mut bytes) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        let can_be_read = device.read_at(&mut [0; 512], WHOLE).is_ok();
        // The page cache of the device is the older one from here on.
        source.image.write(WHOLE + round as u64..WHOLE + 1536);
        open(source.image.path()).read_at(&mut expected, offset).expect("the image can be read");
        let read = open(source.file()).read_at(&mut bytes, offset);
        match read {
            Ok(count) if can_be_read => {
                assert_eq!(count as u64, WHOLE + 1536 - offset);
                assert!(bytes == expected, "stale or wrong bytes at {offset}");
            }
            // The sectors before it may be returned alone.
            Ok(count) => assert!(offset + count as u64 <= WHOLE && bytes[..count] == expected[..count]),
            Err(_) => {
                assert_eq!(read.err().and_then(|error| error.raw_os_error()), Some(libc::EIO));
                assert!(!can_be_read, "the device can be read there");
            }
        }
    }
    assert_eq!(map_holes(source.file()), map);
    let mut bytes = [1; 4096];
    open(source.file()).read_exact_at(&mut bytes, WHOLE - 4096).expect("all before it can be read");
    assert_eq!(bytes, [0; 4096]);
}
