//! Random changes through the mount and to the device at the same time.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::thread;

use crate::common::check::{check, check_holes, map_holes};
use crate::common::image::{Image, discard};
use crate::common::random::{Random, seeds};
use crate::common::{KIB, MIB, needs};
use crate::{PUNCH, Writable, fallocate};

const SIZE: u64 = 16 * MIB;
const SLOT: u64 = 64 * KIB;

/// A change of `range`, by the mount or by the device.
fn change(random: &mut Random, file: &File, device: Option<&File>, path: &std::path::Path, range: Range<u64>) {
    let bytes = random.bytes(range.end - range.start);
    match device {
        None if random.one_in(3) => fallocate(file, PUNCH, range.start, range.end - range.start).expect("inside"),
        None => file.write_all_at(&bytes, range.start).expect("a write inside the file"),
        Some(_) if random.one_in(3) => discard(path, range),
        Some(device) => {
            let mut memory = vec![0; bytes.len() + 4096];
            let start = memory.as_ptr().align_offset(4096);
            memory[start..][..bytes.len()].copy_from_slice(&bytes);
            device.write_all_at(&memory[start..][..bytes.len()], range.start).expect("a write inside the device");
        }
    }
}

/// Each slot of 64 KiB belongs to the mount or to the device; both write at the same time, and a third thread walks over the
/// map. After each round all of it is compared.
#[test]
fn mount_and_device_are_written_at_the_same_time() {
    needs!(root, programs["blkdiscard"]);
    for seed in seeds(900, 2) {
        let written = Writable::device(SIZE, &[]);
        let device =
            OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(written.itself()).expect("a device");
        for round in 0..6 {
            thread::scope(|scope| {
                for by_device in [false, true] {
                    let (written, device) = (&written, &device);
                    scope.spawn(move || {
                        let file = written.open();
                        let mut random = Random::new(seed * 100 + round * 2 + u64::from(by_device));
                        for _ in 0..40 {
                            let slot = random.within(0..SIZE / SLOT / 2) * 2 + u64::from(by_device);
                            let unit = if by_device { 512 } else { 1 };
                            let inside = random.range(SLOT, unit);
                            let range = slot * SLOT + inside.start..slot * SLOT + inside.end;
                            change(&mut random, &file, by_device.then_some(device), written.itself(), range);
                        }
                    });
                }
                scope.spawn(|| (0..5).for_each(|_| drop(map_holes(written.file()))));
            });
            check(written.file(), written.itself());
        }
    }
}

/// While other slots are written, the holes that a slot of one's own has are zeros on the device.
#[test]
fn holes_of_a_range_that_nobody_writes_are_true_while_others_write() {
    needs!(root, programs["blkdiscard"]);
    let written = Writable::device(SIZE, &[]);
    let mut random = Random::new(5);
    let file = written.open();
    for round in 0..6 {
        for _ in 0..20 {
            let range = random.range(SIZE / 2, 1);
            change(&mut random, &file, None, written.itself(), range);
        }
        thread::scope(|scope| {
            scope.spawn(|| {
                let (file, mut random) = (written.open(), Random::new(round));
                for _ in 0..50 {
                    let range = random.range(SIZE / 2, 1);
                    let range = range.start + SIZE / 2..range.end + SIZE / 2;
                    change(&mut random, &file, None, written.itself(), range);
                }
            });
            let mut map = map_holes(written.file());
            map.retain_mut(|extent| {
                extent.1.end = extent.1.end.min(SIZE / 2);
                extent.1.start < extent.1.end
            });
            check_holes(&map, written.itself());
        });
    }
    check(written.file(), written.itself());
}

/// The same for images, whose file is written through the mount and directly.
#[test]
fn mount_and_image_are_written_in_turn() {
    needs!(root);
    let written = Writable::image(SIZE);
    let mut random = Random::new(6);
    let (file, image): (File, &Image) = (written.open(), &written.image);
    for _ in 0..10 {
        for _ in 0..10 {
            let range = random.range(SIZE, 1);
            if random.one_in(3) {
                image.write(range);
            } else {
                change(&mut random, &file, None, written.itself(), range);
            }
        }
        check(written.file(), written.itself());
    }
}
