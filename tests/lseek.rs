//! lseek(2) on the files of a mount: exact, at every offset, for every layout.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use common::check::{Extent, Kind, map_holes, map_of, open, seek_data, seek_hole};
use common::image::Image;
use common::mount::{LoopMount, Mount};
use common::random::Random;
use common::{GIB, KIB, MIB, needs};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// The result that lseek must return on a file with this map.
fn expected(map: &[Extent], offset: u64, kind: Kind) -> Option<u64> {
    let size = map.last().map_or(0, |extent| extent.1.end);
    if offset >= size {
        return None;
    }
    let found = map.iter().find(|extent| extent.0 == kind && extent.1.end > offset);
    match kind {
        Kind::Data => found.map(|extent| extent.1.start.max(offset)),
        Kind::Hole => Some(found.map_or(size, |extent| extent.1.start.max(offset))),
    }
}

fn check_at(file: &File, map: &[Extent], offset: u64) {
    assert_eq!(seek_data(file, offset), expected(map, offset, Kind::Data), "SEEK_DATA {offset} in {map:?}");
    assert_eq!(seek_hole(file, offset), expected(map, offset, Kind::Hole), "SEEK_HOLE {offset} in {map:?}");
}

/// The layouts of the kernel series' `test.py`: the device's map is the image's.
#[test]
fn the_layouts_of_the_kernel_series_have_exact_maps() {
    needs!(root);
    let layouts: [(u64, &[Range<u64>]); 4] = [
        (GIB, &[0..4 * KIB, 256 * MIB..256 * MIB + 64 * KIB, GIB - KIB..GIB]),
        (GIB, &[128 * MIB..128 * MIB + 4 * KIB, 512 * MIB..512 * MIB + 64 * KIB]),
        (MIB, &[0..MIB]),
        (GIB, &[]),
    ];
    for (size, data) in layouts {
        let source = LoopMount::new(size, data);
        // The file system of the image allocates blocks of 4 KiB.
        let data: Vec<_> = data.iter().map(|range| range.start / 4096 * 4096..range.end).collect();
        assert_eq!(map_holes(source.file()), map_of(size, &data));
        assert_eq!(map_holes(source.file()), map_holes(source.image.path()));
        source.check();
    }
}

#[test]
fn seeks_at_and_beside_each_boundary_are_exact() {
    needs!(root);
    let mut data: Vec<_> = (1..40).map(|n| n * 64 * KIB..n * 64 * KIB + n % 5 * 4 * KIB + 4 * KIB).collect();
    data.push(4 * MIB - 8 * KIB..4 * MIB);
    let source = LoopMount::new(4 * MIB, &data);
    let map = map_of(4 * MIB, &data);
    let file = open(source.file());
    for boundary in map.iter().flat_map(|extent| [extent.1.start, extent.1.end]) {
        for offset in [boundary.saturating_sub(1), boundary, boundary + 1, boundary + 511, boundary + 4095] {
            check_at(&file, &map, offset);
        }
    }
    let mut random = Random::new(1);
    for _ in 0..2000 {
        check_at(&file, &map, random.within(0..4 * MIB + 10));
    }
}

/// Seeks at the last byte and beyond the end, for files that end with data or with a hole. The cases are from the
/// review of the kernel series.
#[test]
fn seeks_at_and_behind_the_end_are_exact() {
    needs!(root);
    for (data, last_data, last_hole) in [(MIB - 4 * KIB..MIB, Some(MIB - 1), MIB), (0..4 * KIB, None, MIB - 1)] {
        let source = LoopMount::new(MIB, &[data]);
        let file = open(source.file());
        assert_eq!(seek_data(&file, MIB - 1), last_data);
        assert_eq!(seek_hole(&file, MIB - 1), Some(last_hole));
        for offset in [MIB, MIB + 1, GIB, i64::MAX as u64] {
            assert_eq!((seek_data(&file, offset), seek_hole(&file, offset)), (None, None), "{offset}");
        }
        for offset in [-1, -4096, i64::MIN] {
            for whence in [Whence::SeekData, Whence::SeekHole] {
                assert_eq!(lseek(&file, offset, whence), Err(Errno::ENXIO), "{offset}");
            }
        }
    }
}

/// Sizes that are no multiple of the 4 KiB that holes are aligned to, and the smallest ones.
#[test]
fn holes_are_aligned_to_4_kib_for_any_size() {
    needs!(root);
    for size in [512, 1024, 4096, 4096 + 512, 12 * KIB - 512, MIB + 512] {
        for data in [vec![], vec![0..512], vec![size - 512..size], vec![0..size]] {
            let source = LoopMount::new(size, &data);
            for Extent(kind, range) in map_holes(source.file()) {
                let aligned = range.start % 4096 == 0 && (range.end % 4096 == 0 || range.end == size);
                assert!(kind == Kind::Data || aligned, "hole {range:?} of a device of {size}");
            }
            source.check();
        }
    }
}

#[test]
fn seeks_are_exact_beyond_2_gib_4_gib_and_8_tib() {
    needs!(root);
    let size = 15 * 1024 * GIB;
    let at = |offset: u64| offset..offset + 64 * KIB;
    let data =
        [at(2 * GIB - 32 * KIB), at(4 * GIB - 32 * KIB), at(4 * GIB + MIB), at(8 * 1024 * GIB), at(size - 64 * KIB)];
    let source = LoopMount::new(size, &data);
    assert_eq!(map_holes(source.file()), map_of(size, &data));
    let file = open(source.file());
    let map = map_of(size, &data);
    for range in &data {
        for offset in [range.start - 1, range.start, range.start + 1, range.end - 1, range.end] {
            check_at(&file, &map, offset);
        }
    }
}

/// The descriptor's position moves as lseek(2) specifies, and the other values of whence work as on any file.
#[test]
fn a_seek_moves_the_position_of_the_descriptor() {
    needs!(root);
    let source = LoopMount::new(MIB, &[64 * KIB..128 * KIB]);
    let mut file = open(source.file());
    let mut byte = [0];
    assert_eq!(seek_data(&file, 0), Some(64 * KIB));
    file.read_exact(&mut byte).expect("data can be read");
    assert_ne!(byte, [0]);
    assert_eq!(file.stream_position().expect("a position"), 64 * KIB + 1);
    assert_eq!(seek_hole(&file, 64 * KIB + 1), Some(128 * KIB));
    file.read_exact(&mut byte).expect("a hole can be read");
    assert_eq!(byte, [0]);
    // A seek that fails does not change the position.
    assert_eq!(seek_data(&file, 128 * KIB), None);
    assert_eq!(file.stream_position().expect("a position"), 128 * KIB + 1);
    assert_eq!(file.seek(SeekFrom::End(-1)).expect("SEEK_END works"), MIB - 1);
    assert_eq!(file.seek(SeekFrom::Current(-1)).expect("SEEK_CUR works"), MIB - 2);
}

/// Concurrent seeks on several files return the result of their own file.
#[test]
fn seeks_on_many_files_at_once_are_exact() {
    needs!(root);
    let sources: Vec<_> =
        (1..5).map(|n| LoopMount::new(4 * MIB, &[n * 512 * KIB..n * 512 * KIB + n * 4 * KIB])).collect();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let sources = &sources;
            scope.spawn(move || {
                let index = thread % sources.len();
                let n = index as u64 + 1;
                let map = map_of(4 * MIB, &[n * 512 * KIB..n * 512 * KIB + n * 4 * KIB]);
                let file = open(sources[index].file());
                let mut random = Random::new(thread as u64);
                let mut bytes = vec![0; 8192];
                for _ in 0..300 {
                    let offset = random.within(0..4 * MIB - 8192);
                    check_at(&file, &map, offset);
                    file.read_exact_at(&mut bytes, offset).expect("a read inside the file");
                    let data = bytes.iter().enumerate().all(|(i, &byte)| {
                        let at = offset + i as u64;
                        (byte != 0) == map.iter().any(|extent| extent.0 == Kind::Data && extent.1.contains(&at))
                    });
                    assert!(data, "wrong bytes at {offset}");
                }
            });
        }
    });
}

/// An image file needs no loop device.
#[test]
fn an_image_file_can_be_mounted_without_a_loop_device() {
    needs!(root);
    let data = [0..64 * KIB, MIB..MIB + 4096, 3 * MIB..4 * MIB];
    let image = Image::with_data(4 * MIB, &data);
    let mount = Mount::new(image.path());
    assert_eq!(map_holes(mount.file()), map_of(4 * MIB, &data));
    common::check::check(mount.file(), image.path());
}
