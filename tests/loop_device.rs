//! Loop devices in every state that they can be in, and changes while the file is open.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use common::check::{Extent, Kind, assert_map, check, check_holes, map_holes, map_of, open, seek_data, seek_hole};
use common::image::{Image, open_for_writing, write, write_at};
use common::ioctl;
use common::loop_device::Loop;
use common::mount::{LoopMount, Mount};
use common::{KIB, MIB, assert_becomes, needs, run, try_run};

/// Returns the data ranges of the part of an image that begins at `start` and is `size` bytes long. Ranges are
/// extended to multiples of 4 KiB, and adjacent ranges are merged.
fn seen_from(data: &[Range<u64>], start: u64, size: u64) -> Vec<Range<u64>> {
    let mut seen: Vec<Range<u64>> = Vec::new();
    for range in data {
        let from = range.start.saturating_sub(start) / 4096 * 4096;
        let to = range.end.saturating_sub(start).next_multiple_of(4096).min(size);
        match seen.last_mut() {
            _ if from >= to => {}
            Some(last) if from <= last.end => last.end = last.end.max(to),
            _ => seen.push(from..to),
        }
    }
    seen
}

fn is_dense(map: &[Extent]) -> bool {
    matches!(map, [Extent(Kind::Data, _)])
}

#[test]
fn the_map_follows_the_offset_and_the_size_limit() {
    needs!(root);
    let data =
        [0..4 * KIB, 64 * KIB..68 * KIB, MIB..MIB + 8 * KIB, 3 * MIB - 4 * KIB..3 * MIB, 4 * MIB - 4 * KIB..4 * MIB];
    let image = Image::with_data(4 * MIB, &data);
    for (offset, limit) in [
        (0, 0),
        (0, MIB + 4 * KIB),
        (4 * KIB, 0),
        (512, 0),
        (512, 2 * MIB),
        (64 * KIB + 1536, MIB),
        (66 * KIB, 3 * MIB),
        (MIB, 100 * MIB),
        (3 * MIB + 3584, 4096),
        (4 * MIB - 512, 0),
    ] {
        let mut options = vec![format!("--offset={offset}")];
        if limit != 0 {
            options.push(format!("--sizelimit={limit}"));
        }
        let device = Loop::with_options(image.path(), &options.iter().map(String::as_str).collect::<Vec<_>>());
        let mount = Mount::new(device.path());
        let size = if limit == 0 { 4 * MIB - offset } else { limit.min(4 * MIB - offset) };
        let map = map_of(size, &seen_from(&data, offset, size));
        assert_eq!(map_holes(mount.file()), map, "offset {offset} limit {limit}");
        check(mount.file(), device.path());
    }
}

#[test]
fn a_loop_device_over_a_deleted_file_is_dense() {
    needs!(root);
    let LoopMount { mount, device, image } = LoopMount::new(MIB, &[0..4096]);
    assert!(!is_dense(&map_holes(mount.file())));
    let path = image.path().to_owned();
    drop(image);
    assert!(is_dense(&map_holes(mount.file())), "the holes of a deleted file are not used");
    check(mount.file(), device.path());

    // The holes of another file at the same path, or at a path with the kernel's mark of deleted files, are not used
    // either.
    for name in [path.clone(), format!("{} (deleted)", path.display()).into()] {
        File::create(&name).and_then(|file| file.set_len(MIB)).expect("a file in its place");
        let map = map_holes(mount.file());
        fs::remove_file(&name).expect("the file is ours");
        assert!(is_dense(&map), "{}", name.display());
    }
    check(mount.file(), device.path());
}

#[test]
fn a_renamed_backing_file_gives_its_holes() {
    needs!(root);
    let source = LoopMount::new(MIB, &[0..4096]);
    let moved = source.image.path().with_extension("moved");
    fs::rename(source.image.path(), &moved).expect("a rename in one directory");
    let map = map_holes(source.file());
    fs::rename(&moved, source.image.path()).expect("and back");
    assert_eq!(map, map_of(MIB, &[0..4096]));
}

/// A path may contain bytes that are not UTF-8, and line ends.
#[test]
fn a_backing_file_with_any_bytes_in_its_name_gives_its_holes() {
    needs!(root);
    let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    for name in [&b"\xff\xfe.img"[..], b"two\nlines\n", b"end\n\n", b"x (deleted)"] {
        let path = directory.path().join(OsStr::from_bytes(name));
        fs::rename(Image::with_data(MIB, &[0..4096]).path(), &path).expect("a rename in one directory");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("the directory is ours");
        let device = Loop::new(&link);
        fs::remove_file(&link).expect("the link is ours");
        let mount = Mount::new(device.path());
        assert_eq!(map_holes(mount.file()), map_of(MIB, &[0..4096]), "{name:?}: {}", mount.log());
        // A message with such a path is one line.
        fs::remove_file(&path).expect("the image is ours");
        assert_becomes(&true, || is_dense(&map_holes(mount.file())));
        let log = mount.log();
        assert!(log.lines().all(|line| line.starts_with("blkholefs: ")), "{log}");
    }
}

/// A buffered write can stay in the device's page cache while a process holds the device open. Until writeback, the
/// image does not contain it.
#[test]
fn dirty_pages_are_data() {
    needs!(root);
    let source = LoopMount::new(64 * MIB, &[]);
    let early = open(source.file());
    assert_eq!(seek_data(&early, 0), None);
    let writer = open_for_writing(source.device.path());
    for offset in [8 * MIB, 8 * MIB + 4 * KIB, 40 * MIB + 512, 64 * MIB - 512] {
        write_at(&writer, offset..offset + 512);
        let page = offset / 4096 * 4096;
        assert_eq!(seek_data(&early, page), Some(page), "a file opened before the write at {offset}");
        assert_eq!(seek_data(&open(source.file()), page), Some(page), "a file opened after it");
    }
    source.check();
    drop(writer);
    source.check();
}

#[test]
fn writes_discards_and_punches_are_seen_by_an_open_file() {
    needs!(root);
    let source = LoopMount::new(16 * MIB, &[0..MIB]);
    let file = open(source.file());
    assert_eq!(map_holes(source.file()), map_of(16 * MIB, &[0..MIB]));
    write(source.device.path(), 4 * MIB..5 * MIB);
    assert_becomes(&Some(4 * MIB), || seek_data(&file, MIB));
    let device = source.device.path().to_str().expect("text");
    run("blkdiscard", ["--offset", "0", "--length", "524288", device]);
    assert_map(source.file(), &map_of(16 * MIB, &[512 * KIB..MIB, 4 * MIB..5 * MIB]));
    run("blkdiscard", ["--zeroout", "--offset", "4194304", "--length", "524288", device]);
    source.check();
    // The image is changed without a write to the device, as a virtual machine or fstrim does.
    source.image.write(10 * MIB..10 * MIB + 4096);
    assert_becomes(&Some(10 * MIB), || seek_data(&file, 6 * MIB));
}

#[test]
fn an_open_file_follows_a_change_of_the_backing_file() {
    needs!(root);
    let source = LoopMount::with_options(MIB, &[0..4096], &["--read-only"]);
    let file = open(source.file());
    assert_eq!(map_holes(source.file()), map_of(MIB, &[0..4096]));
    let other = Image::with_data(MIB, &[512 * KIB..MIB]);
    ioctl::loop_change_fd(source.device.path(), other.path());
    assert_becomes(&Some(512 * KIB), || seek_data(&file, 0));
    assert_map(source.file(), &map_of(MIB, &[512 * KIB..MIB]));
    source.check();
}

#[test]
fn an_open_file_follows_a_change_of_the_offset() {
    needs!(root);
    let source = LoopMount::new(4 * MIB, &[0..4096, 2 * MIB..3 * MIB]);
    let file = open(source.file());
    assert_eq!(seek_hole(&file, 0), Some(4096));
    ioctl::loop_set_offset(source.device.path(), 2 * MIB);
    assert_eq!(fs::metadata(source.file()).expect("attributes").len(), 2 * MIB);
    assert_becomes(&Some(MIB), || seek_hole(&file, 0));
    assert_map(source.file(), &map_of(2 * MIB, &[0..MIB]));
    source.check();
}

/// An idle mount does not hold the device: it can be detached and bound again.
#[test]
fn an_idle_mount_lets_the_device_be_detached_and_bound_again() {
    needs!(root);
    let image = Image::with_data(MIB, &[0..4096]);
    let other = Image::with_data(2 * MIB, &[MIB..2 * MIB]);
    let device = Loop::reserved(image.path());
    let mount = Mount::new(device.path());
    check(mount.file(), device.path());
    device.detach();
    device.bind(other.path());
    assert_eq!(fs::metadata(mount.file()).expect("attributes").len(), 2 * MIB);
    assert_eq!(map_holes(mount.file()), map_of(2 * MIB, &[MIB..2 * MIB]));
    check(mount.file(), device.path());
}

#[test]
fn an_open_file_follows_the_growth_of_its_device() {
    needs!(root);
    let source = LoopMount::new(MIB, &[0..4096]);
    let file = open(source.file());
    assert_eq!(seek_data(&file, 4096), None);
    source.image.resize(8 * MIB);
    source.image.write(6 * MIB..7 * MIB);
    // The device keeps its old size until `losetup --set-capacity`.
    assert_map(source.file(), &map_of(MIB, &[0..4096]));
    source.device.losetup(&["--set-capacity"]);
    assert_eq!(fs::metadata(source.file()).expect("attributes").len(), 8 * MIB);
    assert_becomes(&Some(6 * MIB), || seek_data(&file, 4096));
    assert_map(source.file(), &map_of(8 * MIB, &[0..4096, 6 * MIB..7 * MIB]));
    source.check();
}

/// Without a stat in between, which asks for the length itself.
#[test]
fn each_seek_follows_the_length_of_its_device() {
    needs!(root);
    let source = LoopMount::new(4 * MIB, &[0..4096, 2 * MIB..2 * MIB + 4096]);
    let file = open(source.file());
    let ends = |data: &[u64], size: u64| {
        for (at, found) in data.iter().enumerate() {
            let from = if at == 0 { 0 } else { data[at - 1] + 4096 };
            assert_eq!(seek_data(&file, from), Some(*found), "data from {from} on, {size} bytes");
            assert_eq!(seek_hole(&file, *found), Some(found + 4096), "the hole behind {found}, {size} bytes");
        }
        let last = data.last().expect("there is data") + 4096;
        assert_eq!(seek_data(&file, last), None, "no data from {last} on, {size} bytes");
        assert_eq!((seek_data(&file, size), seek_hole(&file, size)), (None, None), "{size} bytes");
    };
    ends(&[0, 2 * MIB], 4 * MIB);
    // Each time the last questions were about the end of the device, or about data inside of it.
    for inside in [false, true] {
        let asked = || {
            if inside {
                assert_eq!(seek_data(&file, 0), Some(0));
            }
        };
        source.image.resize(8 * MIB);
        source.image.write(6 * MIB..6 * MIB + 4096);
        source.device.losetup(&["--set-capacity"]);
        ends(&[0, 2 * MIB, 6 * MIB], 8 * MIB);
        asked();
        source.image.resize(MIB);
        source.device.losetup(&["--set-capacity"]);
        ends(&[0], MIB);
        asked();
        source.image.resize(4 * MIB);
        source.image.write(2 * MIB..2 * MIB + 4096);
        source.device.losetup(&["--set-capacity"]);
        ends(&[0, 2 * MIB], 4 * MIB);
    }
    source.check();
}

/// Beyond the end of a truncated image, the device returns errors and not zeros, so this range is not a hole.
#[test]
fn the_range_behind_the_end_of_a_truncated_image_is_data() {
    needs!(root);
    let source = LoopMount::new(4 * MIB, &[0..4096]);
    let file = open(source.file());
    source.image.resize(2 * MIB);
    assert_becomes(&Some(2 * MIB), || seek_data(&file, 4096));
    assert_eq!(seek_hole(&file, 2 * MIB), Some(4 * MIB));
    let error = file.read_at(&mut [0; 4096], 3 * MIB).expect_err("no bytes are there");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

#[test]
fn a_loop_device_over_a_loop_device_has_the_holes_of_the_image() {
    needs!(root);
    let image = Image::with_data(8 * MIB, &[MIB..2 * MIB, 4 * MIB..4 * MIB + 4096]);
    let lower = Loop::with_options(image.path(), &["--offset=4096"]);
    let upper = Loop::with_options(lower.path(), &["--offset=1024", "--sizelimit=6291456", "--direct-io=on"]);
    let mount = Mount::new(upper.path());
    let data = seen_from(&[MIB..2 * MIB, 4 * MIB..4 * MIB + 4096], 4096 + 1024, 6 * MIB);
    assert_eq!(map_holes(mount.file()), map_of(6 * MIB, &data));
    check(mount.file(), upper.path());
    // Dirty pages of the lower device are not in the image.
    let writer = open_for_writing(lower.path());
    write_at(&writer, 3 * MIB..3 * MIB + 512);
    let page = (3 * MIB - 1024) / 4096 * 4096;
    assert_eq!(seek_data(&open(mount.file()), page), Some(page));
    check(mount.file(), upper.path());
}

/// A mounted ext4 file system. Dropping it unmounts the file system.
struct Ext4(tempfile::TempDir);

impl Ext4 {
    fn new(device: &Path) -> Self {
        run("mkfs.ext4", ["-q".as_ref(), device.as_os_str()]);
        let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
        run("mount", [device, directory.path()]);
        Self(directory)
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        let unmounted = try_run("umount", [self.0.path()], "");
        assert!(unmounted.is_ok() || std::thread::panicking(), "{unmounted:?}");
    }
}

/// A discard by a mounted file system leaves pages of its device in the page cache. A loop device with buffered reads
/// still returns the old bytes. A hole of the lower device is a hole of the loop device only with direct I/O.
#[test]
fn a_loop_device_over_a_block_device_has_holes_only_with_direct_io() {
    needs!(root, programs["mkfs.ext4", "fstrim"]);
    let image = Image::new(64 * MIB);
    let lower = Loop::new(image.path());
    let upper = Loop::with_options(lower.path(), &["--read-only"]);
    let mount = Mount::new(upper.path());
    let (held, ext4) = (open(mount.file()), Ext4::new(lower.path()));
    let file = ext4.0.path().join("file");
    fs::write(&file, vec![1; 8 << 20]).expect("the file system has enough space");
    run("sync", ["--file-system".as_ref(), file.as_os_str()]);
    fs::read(upper.path()).expect("the device can be read");
    fs::remove_file(&file).expect("the file is ours");
    run("sync", ["--file-system".as_ref(), ext4.0.path().as_os_str()]);
    run("fstrim", [ext4.0.path()]);
    check_holes(&map_holes(mount.file()), upper.path());
    assert!(is_dense(&map_holes(mount.file())));
    assert!(mount.log().contains("losetup --direct-io=on"), "{}", mount.log());

    // An open file follows a switch of direct I/O in both directions.
    upper.losetup(&["--direct-io=on"]);
    assert_becomes(&false, || seek_hole(&held, 0) == Some(64 * MIB));
    check_holes(&map_holes(mount.file()), upper.path());
    upper.losetup(&["--direct-io=off"]);
    assert_becomes(&true, || seek_hole(&held, 0) == Some(64 * MIB));
}

#[test]
fn a_partition_has_its_part_of_the_map_of_the_disk() {
    needs!(root);
    let data = [2 * MIB..3 * MIB, 11 * MIB - 4096..11 * MIB + 4096, 20 * MIB..20 * MIB + 4096, 63 * MIB..64 * MIB];
    let image = Image::with_data(64 * MIB, &data);
    let mut device = Loop::with_options(image.path(), &["--partscan"]);
    // The second partition begins inside a 4 KiB block.
    for (number, first, sectors) in [(1, 2048, 20480), (2, 22533, 40001)] {
        let partition = device.add_partition(number, first, sectors);
        let (start, size) = (first * 512, sectors * 512);
        let mount = Mount::new(&partition);
        assert_eq!(map_holes(mount.file()), map_of(size, &seen_from(&data, start, size)), "partition {number}");
        check(mount.file(), &partition);
        // The page cache of the whole disk differs from that of the partition.
        let writer = open_for_writing(device.path());
        let inside = (start + size / 2) / 4096 * 4096 + 512;
        write_at(&writer, inside..inside + 512);
        let page = (inside - start) / 4096 * 4096;
        assert_eq!(seek_data(&open(mount.file()), page), Some(page), "partition {number}");
        check(mount.file(), &partition);
    }
}

#[test]
fn the_map_is_exact_with_sectors_of_4_kib_with_direct_io_and_read_only() {
    needs!(root);
    for options in [&["--sector-size=4096"][..], &["--direct-io=on"], &["--read-only"]] {
        let source = LoopMount::with_options(4 * MIB, &[MIB..MIB + 4096, 2 * MIB..3 * MIB], options);
        let map = map_of(4 * MIB, &[MIB..MIB + 4096, 2 * MIB..3 * MIB]);
        assert_eq!(map_holes(source.file()), map, "{options:?}");
        source.check();
    }
}
