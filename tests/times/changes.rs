//! Each kind of change, while the device is not mounted, and while it is.

use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;

use super::*;
use crate::common::image::{discard, open_for_writing, open_rw};
use crate::common::ioctl;

/// Writes a byte to the first page of a file through a mapping that exists as long as this value.
struct Mapping(*mut libc::c_void);

impl Mapping {
    const LEN: usize = 4096;

    fn new(image: &Path) -> Self {
        let file = open_rw(image);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), Self::LEN, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Self(at)
    }

    fn write(&self, byte: u8) {
        // SAFETY: the mapping has LEN bytes, and exists as long as this value.
        unsafe { self.0.cast::<u8>().write_volatile(byte) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing else knows the address.
        unsafe { libc::munmap(self.0, Self::LEN) };
    }
}

/// Checks that the times of a device increase with each change, and are the same in two mounts after that.
fn assert_moves(device: &Loop, image: &Image, changes: &[(&str, &dyn Fn())]) {
    settle(image.path());
    let mut before = mounted(device.path());
    for (what, change) in changes {
        assert_eq!(mounted(device.path()), before, "before: {what}");
        change();
        settle(image.path());
        let after = mounted(device.path());
        assert!(after[0] > before[0] && after[1] > before[1], "{what}: {before:?}, {after:?}");
        before = after;
    }
    assert_eq!(mounted(device.path()), before);
}

#[test]
fn each_write_moves_the_times_of_the_next_mount() {
    needs!(root);
    let (image, device) = loop_over(4 * MIB);
    let mapping = Mapping::new(image.path());
    let bytes = || open_for_writing(image.path()).write_all_at(b"1", MIB).expect("a write inside the image");
    assert_moves(
        &device,
        &image,
        &[
            ("an overwrite in place through the device", &|| write(device.path(), 0..4096)),
            ("the same write", &|| write(device.path(), 0..4096)),
            ("a write past the device", &bytes),
            ("a write to a mapping", &|| mapping.write(1)),
            ("the next write to the mapping", &|| mapping.write(2)),
            ("a discard", &|| discard(device.path(), 0..64 << 10)),
            ("the same discard", &|| discard(device.path(), 0..64 << 10)),
            ("a hole in the image", &|| image.punch(MIB..MIB + 4096)),
        ],
    );
}

/// Pages of a mapping that are dirty already are written without a change of the times of the file, until they were written
/// back.
#[test]
fn a_write_to_a_dirty_page_of_a_mapping_moves_the_times_of_a_mount() {
    needs!(root);
    let (image, device) = loop_over(4 * MIB);
    let mapping = Mapping::new(image.path());
    mapping.write(1);
    settle(image.path());
    let mount = Mount::new(device.path());
    let mut before = times(mount.file());
    for byte in 2..6 {
        assert_eq!(times(mount.file()), before);
        mapping.write(byte);
        settle(image.path());
        let after = times(mount.file());
        assert!(after[0] > before[0], "{byte}");
        before = after;
    }
}

/// Other files of the same length whose times are older or the same.
#[test]
fn another_binding_moves_the_times_of_the_next_mount() {
    needs!(root);
    let older = Image::on_disk(4 * MIB, &[0..4096]);
    settle(older.path());
    let (image, device) = loop_over(4 * MIB);
    run("touch", ["-d".as_ref(), "2001-01-01".as_ref(), older.path().as_os_str()]);
    settle(older.path());
    let bind = |file: &Image| {
        device.detach();
        device.bind(file.path());
    };
    let offset = |offset: u64| ioctl::loop_set_offset(device.path(), offset);
    assert_moves(
        &device,
        &image,
        &[
            ("a file with an older time", &|| bind(&older)),
            ("the file from before", &|| bind(&image)),
            ("an offset", &|| offset(MIB)),
            ("no offset", &|| offset(0)),
            ("a limit", &|| {
                device.detach();
                let limit =
                    ["--sizelimit".as_ref(), "1048576".as_ref(), device.path().as_os_str(), image.path().as_os_str()];
                run("losetup", limit);
            }),
            ("no limit", &|| bind(&image)),
            ("an older time", &|| drop(run("touch", ["-d".as_ref(), "2001-01-01".as_ref(), image.path().as_os_str()]))),
        ],
    );
}

/// A write right after a stat is within the same tick of the clock.
#[test]
fn a_write_right_after_a_stat_moves_the_times() {
    needs!(root);
    let (image, device) = loop_over(4 * MIB);
    let writer = open_for_writing(image.path());
    for round in 0..15_u8 {
        let mount = Mount::new(device.path());
        let before = times(mount.file());
        if round % 2 == 0 {
            writer.write_all_at(&[round], 0).expect("a write inside the image");
            drop(mount);
        } else {
            drop(mount);
            writer.write_all_at(&[round], 0).expect("a write inside the image");
        }
        let after = mounted(device.path());
        assert!(after[0] > before[0], "round {round}: {before:?}, {after:?}");
    }
    let mount = Mount::new(device.path());
    for round in 0..1000_u32 {
        let before = times(mount.file());
        writer.write_all_at(&round.to_ne_bytes(), 0).expect("a write inside the image");
        assert!(times(mount.file())[0] > before[0], "round {round}");
        if round % 100 == 0 {
            settle(image.path());
        }
    }
    settle(image.path());
    let last = times(mount.file());
    drop(mount);
    assert_eq!(mounted(device.path()), last, "what is not written at once is written at the end");
}

/// A modification time that a program has set says nothing of a later write.
#[test]
fn a_modification_time_that_is_set_again_hides_no_write_from_the_next_boot() {
    needs!(root, programs["unshare"]);
    let (image, device) = loop_over(4 * MIB);
    let touch = || {
        run("touch", ["-m".as_ref(), "-d".as_ref(), "2100-01-01".as_ref(), image.path().as_os_str()]);
        settle(image.path());
    };
    touch();
    let before = times_without_run(device.path(), "mode=755")[0];
    image.write(0..4096);
    touch();
    let after = times_without_run(device.path(), "mode=755")[0];
    assert!(after[0] > before[0] && after[1] > before[1], "{before:?}, {after:?}");
}

/// A file that is not found by its path may still be written.
#[test]
fn a_loop_device_over_a_file_that_was_removed_has_new_times_in_each_open() {
    needs!(root);
    let (image, device) = loop_over(4 * MIB);
    let mount = Mount::new(device.path());
    let writer = open_for_writing(image.path());
    fs::remove_file(image.path()).expect("it can be removed");
    let before = times(mount.file());
    writer.write_all_at(b"1", MIB).expect("a write inside the image");
    let after = times(mount.file());
    assert!(after[0] > before[0]);
    let file = File::open(mount.file()).expect("it can be read");
    let open = times(mount.file());
    assert_eq!(times(mount.file()), open, "while it is open");
    drop(file);
}

/// The counters of the upper one do not count what is written to the lower one.
#[test]
fn a_write_to_the_device_below_a_loop_device_moves_its_times() {
    needs!(root);
    let (image, lower) = loop_over(4 * MIB);
    for options in [&["--direct-io=off"][..], &["--direct-io=on"]] {
        let upper = Loop::with_options(lower.path(), options);
        let mut before = mounted(upper.path());
        for _ in 0..2 {
            assert_eq!(mounted(upper.path()), before);
            // The pages stay dirty.
            open_for_writing(lower.path()).write_all_at(&[1; 512], MIB).expect("a write to the device");
            let after = mounted(upper.path());
            assert!(after[0] > before[0]);
            before = after;
            // The stamp of a file is settled some milliseconds after a write.
            settle(image.path());
            before = before.max(mounted(upper.path()));
        }
    }
}
