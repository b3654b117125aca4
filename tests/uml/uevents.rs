//! Events of the kernel that concern other devices. A host with containers has many uevents each second, of network
//! interfaces for example, and none of them may end the map of a live thin volume.

use std::fs;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::common::check::{assert_map, bytes_read, check, map_of, open, seek_data, seek_hole, sysfs};
use crate::common::dm::{Dm, Pool, without_events};
use crate::common::image::{Image, write};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::{KIB, MIB, assert_becomes, wait_until};

const BLOCK: u64 = 64 * KIB;
const SIZE: u64 = 16 * MIB;

/// Uevents of devices that no device-mapper device uses: a network interface, a character device and a loop device.
struct OtherDevices {
    attributes: [PathBuf; 3],
    _loop: Loop,
    _image: Image,
}

impl OtherDevices {
    fn new() -> Self {
        let image = Image::new(MIB);
        let disk = Loop::new(image.path());
        let attributes =
            ["/sys/class/net/lo/uevent".into(), "/sys/class/mem/null/uevent".into(), sysfs(disk.path()).join("uevent")];
        Self { attributes, _loop: disk, _image: image }
    }

    /// Makes the kernel send a uevent for each of the devices.
    fn change(&self) {
        for attribute in &self.attributes {
            fs::write(attribute, "change").unwrap_or_else(|error| panic!("{}: {error}", attribute.display()));
        }
    }

    /// Runs `work` while the uevents go on.
    fn change_during(&self, work: impl FnOnce()) {
        let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let _ends = Done(&done);
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    self.change();
                    rounds.fetch_add(1, Ordering::Relaxed);
                    // The rate: about a thousand uevents each second.
                    std::thread::sleep(std::time::Duration::from_millis(3));
                }
            });
            assert!(wait_until(|| rounds.load(Ordering::Relaxed) > 0), "there are uevents");
            work();
            let before = rounds.load(Ordering::Relaxed);
            assert!(wait_until(|| rounds.load(Ordering::Relaxed) > before), "there are still uevents");
        });
    }
}

/// Ends the uevents when the work ends, also when it fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The number of the last uevent of any device.
fn last_uevent() -> u64 {
    let text = fs::read_to_string("/sys/kernel/uevent_seqnum").expect("sysfs has it");
    text.trim_end().parse().expect("a number")
}

/// How many maps the daemon has read.
fn maps_read(mount: &Mount) -> usize {
    mount.log().matches(": new map").count()
}

/// A live thin volume whose first block is mapped, and the mount that shows it. The map was read.
fn volume(pool: &Pool) -> (Dm, Mount, File) {
    let device = pool.thin(0, SIZE);
    write(device.path(), 0..BLOCK);
    let mount = Mount::new(device.path());
    let file = open(mount.file());
    assert_becomes(&(Some(0), None), || (seek_data(&file, 0), seek_data(&file, BLOCK)));
    (device, mount, file)
}

/// The time that the file was modified.
fn modified(path: &Path) -> std::time::SystemTime {
    fs::metadata(path).and_then(|metadata| metadata.modified()).expect("the file has attributes")
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn uevents_of_other_devices_do_not_end_the_map_of_a_thin_volume() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let (device, mount, file) = volume(&pool);
    let others = OtherDevices::new();
    let state = || (maps_read(&mount), modified(mount.file()), bytes_read(pool.metadata()));
    let answers = || (seek_hole(&file, 0), seek_data(&file, BLOCK));
    for round in 0..20 {
        let (before, asked, after) = without_events(|| {
            assert_becomes(&(Some(BLOCK), None), answers);
            let before = state();
            let number = last_uevent();
            others.change();
            assert!(last_uevent() >= number + 3, "the kernel counts a uevent for each device");
            (before, answers(), state())
        });
        assert!(before.0 > 0, "reading a map is logged: {}", mount.log());
        assert_eq!(asked, (Some(BLOCK), None), "round {round}");
        assert_eq!(after, before, "round {round}: maps that were read, time, bytes of metadata: {}", mount.log());
    }
    check(mount.file(), device.path());
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_second_activation_is_seen_among_uevents_of_other_devices() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let (device, mount, file) = volume(&pool);
    OtherDevices::new().change_during(|| {
        for round in 1..8 {
            let at = round * MIB;
            let twin = pool.activate(0, SIZE, None);
            write(twin.path(), at..at + 4096);
            drop(twin);
            assert_eq!(seek_data(&file, at), Some(at), "round {round}");
            assert_becomes(&Some(at + BLOCK), || seek_hole(&file, at));
        }
    });
    check(mount.file(), device.path());
}

/// The volume is made again with other blocks, as many as before, while its device has another table.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_table_that_was_replaced_and_restored_is_seen_among_uevents_of_other_devices() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let (device, mount, file) = volume(&pool);
    let sectors = SIZE / 512;
    OtherDevices::new().change_during(|| {
        for round in 1..8 {
            let at = round * MIB;
            device.reload(&format!("0 {sectors} zero"));
            pool.delete(0);
            let other = pool.thin(0, SIZE);
            write(other.path(), at..at + BLOCK);
            drop(other);
            device.reload(&format!("0 {sectors} thin {} 0", pool.dm().path().display()));
            assert_eq!(seek_data(&file, at), Some(at), "round {round}");
            assert_becomes(&Some(at), || seek_data(&file, 0));
        }
    });
    assert_map(mount.file(), &map_of(SIZE, &[7 * MIB..7 * MIB + BLOCK]));
    check(mount.file(), device.path());
}

/// The pool gets a table with the same text. Its metadata could be other metadata then.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_pool_that_was_reloaded_is_read_again_among_uevents_of_other_devices() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let (device, mount, file) = volume(&pool);
    let table = crate::common::run("dmsetup", ["table", pool.dm().name()]);
    OtherDevices::new().change_during(|| {
        for round in 0..4 {
            let maps = maps_read(&mount);
            pool.dm().reload(&table);
            let holes = || (seek_hole(&file, 0), maps_read(&mount) > maps);
            assert!(wait_until(|| holes() == (Some(BLOCK), true)), "round {round}: {}", mount.log());
        }
    });
    check(mount.file(), device.path());
}
