//! The targets of a table, alone and together.

use std::ops::Range;

use crate::common::check::{self, Extent, Kind, check, check_holes, map_holes, map_of, open, seek_data, seek_hole};
use crate::common::dm::{Dm, sectors};
use crate::common::image::{Image, write};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::{KIB, MIB};

/// A loop device over an image of its own.
pub struct Disk {
    pub device: Loop,
    image: Image,
}

impl Disk {
    pub fn new(size: u64, data: &[Range<u64>]) -> Self {
        let image = Image::with_data(size, data);
        Self { device: Loop::new(image.path()), image }
    }

    /// Makes a range of the image a hole without a request to the device.
    pub fn punch(&self, range: Range<u64>) {
        self.image.punch(range);
    }

    pub fn path(&self) -> std::path::Display<'_> {
        self.device.path().display()
    }
}

pub fn assert_map(device: &Dm, data: &[Range<u64>]) {
    let mount = Mount::new(device.path());
    check::assert_map(mount.file(), &map_of(sectors(device.path()) * 512, data));
    check(mount.file(), device.path());
}

pub fn assert_dense(device: &Dm) {
    let mount = Mount::new(device.path());
    let map = map_holes(mount.file());
    assert!(matches!(map[..], [Extent(Kind::Data, _)]), "{map:?}");
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn linear_has_the_holes_of_its_range() {
    let disk = Disk::new(8 * MIB, &[0..4 * KIB, 2 * MIB..3 * MIB, 8 * MIB - 4 * KIB..8 * MIB]);
    let whole = Dm::linear(disk.device.path());
    assert_map(&whole, &[0..4 * KIB, 2 * MIB..3 * MIB, 8 * MIB - 4 * KIB..8 * MIB]);
    let part = Dm::new(&format!("0 4096 linear {} 2048", disk.path()));
    assert_map(&part, &[MIB..2 * MIB]);
    // Three sectors in: the data reaches into more blocks of this device than of the one below.
    let odd = Dm::new(&format!("0 8192 linear {} 3", disk.path()));
    assert_map(&odd, &[0..4 * KIB, 2 * MIB - 4 * KIB..3 * MIB]);
    let twice = Dm::new(&format!("0 2048 linear {} 2048", part.path().display()));
    assert_map(&twice, &[0..MIB]);
}

/// A table that does not fit into one reply of the kernel: a volume of many segments.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_table_longer_than_one_reply_is_read_completely() {
    const SEGMENTS: u64 = 500;
    let disk = Disk::new(4 * MIB, &[0..4 * MIB]);
    let table: Vec<String> = (0..SEGMENTS)
        .map(|segment| match segment % 2 {
            0 => format!("{} 8 zero", segment * 8),
            _ => format!("{} 8 linear {} {}", segment * 8, disk.path(), segment * 8),
        })
        .collect();
    let device = Dm::new(&table.join("\n"));
    let data: Vec<_> = (1..SEGMENTS).step_by(2).map(|segment| segment * 4 * KIB..(segment + 1) * 4 * KIB).collect();
    assert_map(&device, &data);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn striped_has_the_holes_of_its_legs() {
    let data = [0..4 * KIB, 256 * KIB..384 * KIB, MIB - 4 * KIB..MIB];
    for (count, chunk) in [(2, 4 * KIB), (2, 64 * KIB), (3, 8 * KIB), (3, 12 * KIB), (1, 4 * KIB)] {
        // The legs differ, and a row that is not complete is left out.
        let disks: Vec<_> = (0..count).map(|leg| Disk::new(MIB + 64 * KIB, &data[leg % 3..])).collect();
        let rows = MIB / chunk;
        let legs: String = disks.iter().map(|disk| format!(" {} 0", disk.path())).collect();
        let size = rows * chunk * count as u64;
        let device = Dm::new(&format!("0 {} striped {count} {}{legs}", size / 512, chunk / 512));
        let mut expected: Vec<Range<u64>> = Vec::new();
        for offset in (0..size).step_by(4096) {
            let (leg, row) = ((offset / chunk) as usize % count, offset / chunk / count as u64);
            let below = row * chunk + offset % chunk;
            if data[leg % 3..].iter().any(|range| range.contains(&below)) {
                match expected.last_mut() {
                    Some(last) if last.end == offset => last.end = offset + 4096,
                    _ => expected.push(offset..offset + 4096),
                }
            }
        }
        assert_map(&device, &expected);
    }
}

/// Chunks that are no multiple of the 4 KiB that holes are aligned to.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn striped_by_odd_chunks_has_only_true_holes() {
    let disks = [Disk::new(MIB, &[0..4 * KIB]), Disk::new(MIB, &[512 * KIB..516 * KIB])];
    let device = Dm::new(&format!("0 4080 striped 2 12 {} 1 {} 3", disks[0].path(), disks[1].path()));
    let mount = Mount::new(device.path());
    let map = map_holes(mount.file());
    assert!(map.iter().any(|extent| extent.0 == Kind::Hole && extent.1.end - extent.1.start > 512 * KIB), "{map:?}");
    check(mount.file(), device.path());
}

/// dm-zero reads as zeros, so it is a hole. (The kernel series reports data, to test the default.)
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn zero_is_a_hole() {
    assert_map(&Dm::new("0 2097152 zero"), &[]);
}

/// The largest size that a device can have.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn seeks_on_the_largest_device_are_exact() {
    let disk = Disk::new(MIB, &[0..MIB]);
    let most = i64::MAX as u64 / 512;
    let table = format!("0 {} zero\n{} 2048 linear {} 0", most - 2048, most - 2048, disk.path());
    let device = Dm::new(&table);
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    let start = (most - 2048) * 512;
    let first = start / 4096 * 4096;
    assert_eq!((seek_hole(&file, 0), seek_data(&file, 0)), (Some(0), Some(first)));
    assert_eq!((seek_hole(&file, start + 1), seek_data(&file, start + 1)), (Some(most * 512), Some(start + 1)));
    assert_eq!((seek_hole(&file, most * 512), seek_data(&file, most * 512)), (None, None));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn error_is_data_that_cannot_be_read() {
    use std::os::unix::fs::FileExt as _;
    let disk = Disk::new(2 * MIB, &[]);
    let table = format!("0 2048 linear {} 0\n2048 2048 error\n4096 2048 zero", disk.path());
    let device = Dm::new(&table);
    let mount = Mount::new(device.path());
    assert_eq!(map_holes(mount.file()), map_of(3 * MIB, &[MIB..2 * MIB]));
    let file = open(mount.file());
    let error = file.read_at(&mut [0; 4096], MIB + 8192).expect_err("there are no bytes");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    file.read_exact_at(&mut [0; 4096], 2 * MIB).expect("the other sectors can be read");
}

/// Adjacent extents of one kind are one extent, although the table splits them.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn adjacent_extents_of_one_kind_are_merged() {
    let disk = Disk::new(8 * MIB, &[0..2 * MIB, 4 * MIB..5 * MIB]);
    let path = disk.path();
    let table = [
        format!("0 1000 linear {path} 0"),       // data
        format!("1000 1048 linear {path} 1000"), // data
        format!("2048 2048 linear {path} 8192"), // data up to 2 MiB: 4 MiB is one MiB of data and one of hole
        "4096 2048 zero".to_owned(),             // hole
        format!("6144 2048 linear {path} 6144"), // hole
        format!("8192 1001 linear {path} 0"),    // data, and ends inside a block
        "9193 1047 zero".to_owned(),
    ];
    let device = Dm::new(&table.join("\n"));
    let end = (9193 * 512_u64).next_multiple_of(4096);
    assert_map(&device, &[0..2 * MIB, 4 * MIB..end]);
}

/// A hole of the device below dm-crypt does not read as zeros through dm-crypt.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn encryption_is_dense() {
    let disk = Disk::new(2 * MIB, &[]);
    let key = "0123456789abcdef".repeat(4);
    let device = Dm::new(&format!("0 4096 crypt aes-cbc-plain64 {key} 0 {} 0", disk.path()));
    assert_dense(&device);
    let mount = Mount::new(device.path());
    check(mount.file(), device.path());
    assert!(mount.log().contains("crypt"), "the log lacks the reason: {}", mount.log());
}

/// A stack of 21 linear devices may have fewer holes than its disk, but no wrong one.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_deep_stack_has_only_true_holes() {
    let disk = Disk::new(2 * MIB, &[MIB..MIB + 4096]);
    let mut stack = vec![Dm::linear(disk.device.path())];
    for _ in 0..20 {
        let top = Dm::linear(stack.last().expect("the stack is not empty").path());
        stack.push(top);
    }
    let top = stack.last().expect("the stack is not empty");
    let mount = Mount::new(top.path());
    write(top.path(), 4096..8192);
    check(mount.file(), top.path());
    check_holes(&map_holes(mount.file()), disk.device.path());
    drop(mount);
    while stack.pop().is_some() {}
}
