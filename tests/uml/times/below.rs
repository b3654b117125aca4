//! Writes that do not go through the device that is shown.

use super::*;
use crate::common::loop_device::Loop;

#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn writes_to_a_disk_move_the_times_of_its_partitions() {
    let disk = ScsiDisk::new(16, &["lbprz=1"]);
    let path = disk.path();
    for (number, start) in [("1", "2048"), ("2", "8192")] {
        run("addpart", [path.as_os_str(), number.as_ref(), start.as_ref(), "2048".as_ref()]);
    }
    let [first, second] = [1, 2].map(|number| disk.partition(number));
    assert_follows(
        &first,
        &[
            ("a write to the disk", &|| write(path, MIB..MIB + 4096)),
            ("a discard of the disk", &|| discard(path, MIB..2 * MIB)),
            ("a write", &|| write(&first, 0..4096)),
        ],
    );
    let before = mounted(&first);
    write(&second, 0..4096);
    assert_eq!(mounted(&first), before, "a write to another partition");
    run("delpart", [path.as_os_str(), "2".as_ref()]);
    assert_later(mounted(&first), before, "a partition was removed");
    run("delpart", [path.as_os_str(), "1".as_ref()]);
}

/// As a virtual machine writes to its disk, of which the host shows the partitions.
#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn writes_to_a_device_move_the_times_of_what_maps_to_it() {
    let disk = ScsiDisk::new(16, &["lbprz=1"]);
    let [lower, other] = halves(&disk);
    let device = Dm::linear(lower.path());
    let looped = Loop::new(lower.path());
    for upper in [device.path(), looped.path()] {
        assert_follows(
            upper,
            &[
                ("a write to the device below", &|| write(lower.path(), 0..4096)),
                ("a discard of the device below", &|| discard(lower.path(), 0..MIB)),
                ("a write", &|| write(upper, 0..4096)),
            ],
        );
    }
    drop((looped, device));
    // Other volumes of LVM are on the same disk.
    let volume = Dm::with_uuid(&format!("0 4096 linear {} 0", lower.path().display()), "LVM-times");
    let before = mounted(volume.path());
    write(other.path(), 0..4096);
    write(lower.path(), 3 * MIB..3 * MIB + 4096);
    assert_eq!(mounted(volume.path()), before, "a write to another volume");
}

/// A reset sets the counters to 0.
#[test]
#[ignore = "needs a kernel with zram: run tests/run"]
fn a_device_whose_counters_can_be_reset_has_new_times_at_each_call() {
    needs!(modules["zram"]);
    run("modprobe", ["zram"]);
    let device = Path::new("/dev/zram0");
    assert!(wait_until(|| device.exists()), "there is no device");
    let set = |name: &str, value: &str| fs::write(Path::new("/sys/block/zram0").join(name), value).expect("written");
    // They are off at first in older kernels.
    set("queue/iostats", "1");
    let fill = |at: u64| {
        set("disksize", "16777216");
        write(device, at..at + 4096);
    };
    fill(0);
    let before = mounted(device);
    assert!(wait_until(|| fs::write("/sys/block/zram0/reset", "1").is_ok()), "the device is in use");
    fill(MIB);
    assert_later(mounted(device), before, "other contents");
    assert!(wait_until(|| fs::write("/sys/block/zram0/reset", "1").is_ok()), "the device is in use");
}
