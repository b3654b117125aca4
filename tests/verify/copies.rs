//! Copies that are true, and copies with a mistake.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::common::image::{Image, open_for_writing};
use crate::common::loop_device::Loop;
use crate::common::{KIB, MIB, needs, run};
use crate::{DATA, HOLE_BYTES, SIZE, against};

/// Copies of an image: with its holes, without any, and with as many as there can be.
fn copies(image: &Path) -> [Image; 3] {
    ["auto", "never", "always"].map(|sparse| {
        let copy = Image::new(0);
        let option = format!("--sparse={sparse}");
        run("cp", [option.as_ref(), image.as_os_str(), copy.path().as_os_str()]);
        copy
    })
}

#[test]
fn true_copies_agree() {
    needs!(root);
    // With written zeros, which a copy may have as a hole. Images with the same data have the same bytes.
    let [image, same] = [(); 2].map(|()| {
        let image = Image::with_data(SIZE, &DATA);
        open_for_writing(image.path()).write_all_at(&[0; 64 * KIB as usize], 5 * MIB).expect("a write");
        image
    });
    let device = Loop::new(image.path());
    let [_, dense, sparse] = copies(image.path());
    let (holes, data) = (HOLE_BYTES - 64 * KIB, SIZE - HOLE_BYTES + 64 * KIB);
    let expected =
        [(&same, [holes, 0, 0, data]), (&dense, [0, holes, 0, data]), (&sparse, [holes, 0, 64 * KIB, data - 64 * KIB])];
    for (copy, [both, only_device, only_copy, data]) in expected {
        let verified = against(copy.path(), device.path());
        let counts = format!(
            "hole in both: {both}; hole in the device only: {only_device}; hole in the copy only: {only_copy}; data in both: {data}"
        );
        let paths = (device.path().display(), copy.path().display());
        let last = format!("{}: {}: {SIZE} bytes are the same", paths.0, paths.1);
        assert_eq!(verified.agreed(), [counts, last]);
    }
    // The other way round, and a device as the copy.
    against(image.path(), dense.path()).agreed();
    let second = Loop::new(dense.path());
    against(second.path(), device.path()).agreed();
}

#[test]
fn what_is_a_hole_in_both_is_not_read() {
    needs!(root);
    let image = Image::with_data(SIZE, &DATA);
    let device = Loop::new(image.path());
    let [same, ..] = copies(image.path());
    let before = device.bytes_read();
    against(same.path(), device.path()).agreed();
    // The last sector is read through the page cache, which may read more.
    let read = device.bytes_read() - before;
    assert!((SIZE - HOLE_BYTES..SIZE - HOLE_BYTES + 8 * KIB).contains(&read), "{read}");
}

#[test]
fn one_wrong_byte_is_found_wherever_it_is() {
    let image = Image::with_data(SIZE, &DATA);
    let [same, dense, sparse] = copies(image.path());
    let bounds = DATA.iter().flat_map(|range| [range.start, range.end]);
    let near = bounds.flat_map(|at| [at.saturating_sub(1), at, at + 1]);
    let mut places: Vec<u64> = near.chain([MIB - 1, MIB, 2 * MIB + 77, SIZE - 1]).filter(|at| *at < SIZE).collect();
    places.sort_unstable();
    places.dedup();
    let flip_each = |copy: &Image| {
        let file = fs::File::options().read(true).write(true).open(copy.path()).expect("a copy");
        for at in &places {
            let mut byte = [0];
            file.read_exact_at(&mut byte, *at).expect("a byte");
            file.write_all_at(&[byte[0] ^ 1], *at).expect("a write");
            let verified = against(copy.path(), image.path());
            let lines = verified.failed();
            assert_eq!(lines[0], format!("different: 1 byte at {at}"));
            assert!(lines[2].ends_with(": 1 byte different") && lines.len() == 3, "{lines:?}");
            file.write_all_at(&byte, *at).expect("a write");
        }
        against(copy.path(), image.path()).agreed();
    };
    // Each difference is read again after pauses.
    std::thread::scope(|scope| {
        for copy in [&same, &dense, &sparse] {
            scope.spawn(|| flip_each(copy));
        }
    });
}

#[test]
fn neighbouring_differences_are_one_and_many_are_counted() {
    let image = Image::with_data(SIZE, &DATA);
    let copy = Image::new(SIZE);
    fs::copy(image.path(), copy.path()).expect("a copy");
    copy.write(MIB - 8192..MIB + 8192);
    for index in 0..20 {
        copy.write(4 * MIB + index * 16 * KIB..4 * MIB + index * 16 * KIB + 1);
    }
    let verified = against(copy.path(), image.path());
    let lines = verified.failed();
    assert_eq!(lines[0], format!("different: 16384 bytes at {}", MIB - 8192));
    assert_eq!(lines[1], format!("different: 1 byte at {}", 4 * MIB));
    assert_eq!(lines[10], "different: 11 bytes more");
}

#[test]
fn another_length_is_a_difference() {
    let image = Image::with_data(SIZE, &DATA);
    let [same, ..] = copies(image.path());
    for (len, compared) in [(SIZE - 512, SIZE - 512), (SIZE - 1, SIZE - 1), (SIZE + 1, SIZE), (MIB, MIB), (0, 0)] {
        same.resize(len);
        let verified = against(same.path(), image.path());
        let lines = verified.failed();
        let expected = format!("{len} bytes long, and the device {SIZE} bytes; {compared} bytes are the same");
        assert!(lines[1].ends_with(&expected), "{lines:?}");
        same.resize(SIZE);
        fs::copy(image.path(), same.path()).expect("a copy");
    }
}
