//! Targets that pass requests on to one device.

use crate::common::dm::Dm;
use crate::common::image::Image;
use crate::common::loop_device::Loop;
use crate::common::{KIB, MIB, needs};
use crate::targets::{Disk, assert_dense, assert_map};

const SIZE: u64 = 4 * MIB;
const SECTORS: u64 = SIZE / 512;

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn delay_has_the_holes_of_the_device_that_it_reads() {
    needs!(modules["dm-delay"]);
    let read = Disk::new(SIZE + MIB, &[MIB..2 * MIB]);
    let write = Disk::new(SIZE, &[0..SIZE]);
    assert_map(&Dm::new(&format!("0 {SECTORS} delay {} 0 0", read.path())), &[MIB..2 * MIB]);
    let both = format!("0 {SECTORS} delay {} 2048 1 {} 0 1", read.path(), write.path());
    assert_map(&Dm::new(&both), &[0..MIB]);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn flakey_has_holes_only_without_faults() {
    needs!(modules["dm-flakey"]);
    let disk = Disk::new(SIZE + MIB, &[MIB..2 * MIB]);
    assert_map(&Dm::new(&format!("0 {SECTORS} flakey {} 2048 60 0", disk.path())), &[0..MIB]);
    for faults in ["60 1", "60 0 1 drop_writes", "60 0 1 error_writes", "60 0 5 corrupt_bio_byte 32 r 1 0"] {
        assert_dense(&Dm::new(&format!("0 {SECTORS} flakey {} 0 {faults}", disk.path())));
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn unstriped_has_the_holes_of_one_leg() {
    needs!(modules["dm-unstripe"]);
    for chunk in [4 * KIB, 64 * KIB] {
        let data = [[0..4 * KIB, MIB..2 * MIB], [512 * KIB..640 * KIB, SIZE - 4 * KIB..SIZE]];
        let legs = data.clone().map(|data| Disk::new(SIZE, &data));
        let [chunk, all] = [chunk / 512, 2 * SECTORS];
        let striped = Dm::new(&format!("0 {all} striped 2 {chunk} {} 0 {} 0", legs[0].path(), legs[1].path()));
        for (index, data) in data.iter().enumerate() {
            let path = striped.path().display();
            assert_map(&Dm::new(&format!("0 {SECTORS} unstriped 2 {chunk} {index} {path} 0")), data);
        }
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn snapshot_origin_has_the_holes_of_its_device() {
    let disk = Disk::new(SIZE, &[MIB..2 * MIB]);
    assert_map(&Dm::new(&format!("0 {SECTORS} snapshot-origin {}", disk.path())), &[MIB..2 * MIB]);
    // The target ignores its start in the table, so behind another target it maps the device from that offset on.
    let table = format!("0 2048 zero\n2048 2048 snapshot-origin {}", disk.path());
    assert_map(&Dm::new(&table), &[MIB..2 * MIB]);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn era_has_the_holes_of_its_origin() {
    needs!(modules["dm-era"]);
    let (metadata, disk) = (Disk::new(4 * MIB, &[]), Disk::new(SIZE, &[MIB..2 * MIB]));
    let device = Dm::new(&format!("0 {SECTORS} era {} {} 128", metadata.path(), disk.path()));
    assert_map(&device, &[MIB..2 * MIB]);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn multipath_has_holes_while_a_path_works() {
    needs!(modules["dm-multipath", "dm-round-robin"]);
    let image = Image::with_data(SIZE, &[MIB..2 * MIB]);
    let paths = [Loop::new(image.path()), Loop::new(image.path())];
    let [first, second] = paths.each_ref().map(|path| path.path().display().to_string());
    let number = |path: &Loop| {
        let text = std::fs::read_to_string(format!("/sys/block/{}/dev", path.name())).expect("a block device");
        text.trim().to_owned()
    };
    for mode in ["bio", "rq"] {
        let groups = format!("0 2 1 round-robin 0 1 1 {first} 1000 round-robin 0 1 1 {second} 1000");
        let device = Dm::new(&format!("0 {SECTORS} multipath 2 queue_mode {mode} {groups}"));
        assert_map(&device, &[MIB..2 * MIB]);
        device.message(&format!("fail_path {}", number(&paths[0])));
        assert_map(&device, &[MIB..2 * MIB]);
        device.message(&format!("fail_path {}", number(&paths[1])));
        assert_dense(&device);
    }
}
