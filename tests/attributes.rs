//! What stat(2) and statfs(2) report for the files of a mount. Tools choose their behaviour by these values.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

use std::fs::{self, Metadata};
use std::io::Read as _;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use common::check::{Extent, Kind, check, check_blocks, map_holes, open};
use common::image::{Image, write};
use common::loop_device::Loop;
use common::mount::{LoopMount, Mount};
use common::{GIB, KIB, MIB, needs, run, wait_until};

fn stat(path: &Path) -> Metadata {
    fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn times(metadata: &Metadata) -> [i64; 4] {
    [metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()]
}

#[test]
fn a_device_is_a_regular_file_of_its_size() {
    needs!(root);
    let source = LoopMount::new(3 * MIB + 512, &[0..4096]);
    let shown = stat(source.file());
    assert!(shown.is_file());
    assert_eq!(shown.len(), 3 * MIB + 512);
    assert_eq!(shown.nlink(), 1);
    assert!(shown.blksize().is_power_of_two() && shown.blksize() >= 4096, "st_blksize {}", shown.blksize());
    let names: Vec<_> = fs::read_dir(source.mount.directory())
        .expect("readdir")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    assert_eq!(names, [source.device.name()]);
}

/// A file grants no more rights than its device node: owner and group are those of the node, and each mode bit that
/// is set is also set on the node.
#[test]
fn owner_and_mode_grant_no_more_than_the_node() {
    needs!(root);
    let source = LoopMount::new(MIB, &[]);
    for mode in [0o600, 0o640, 0o660, 0o400, 0o000] {
        fs::set_permissions(source.device.path(), fs::Permissions::from_mode(mode)).expect("the node is ours");
        let node = stat(source.device.path());
        assert!(node.file_type().is_block_device());
        let seen = wait_until(|| stat(source.file()).mode() & 0o7777 & !mode == 0);
        let shown = stat(source.file());
        assert!(seen, "mode {:o} for a node of {mode:o}", shown.mode());
        assert_eq!(shown.mode() & 0o333, 0, "a write or execute bit is set: {:o}", shown.mode());
        assert_eq!((shown.uid(), shown.gid()), (node.uid(), node.gid()));
    }
    fs::set_permissions(source.device.path(), fs::Permissions::from_mode(0o660)).expect("the node is ours");
}

/// `st_blocks` is never 0 (GNU tar would store nothing), below the size exactly when there is a hole (cp looks for
/// holes only then), and follows the device.
#[test]
fn st_blocks_is_below_the_size_exactly_when_there_is_a_hole() {
    needs!(root);
    let layouts: [(u64, &[Range<u64>]); 6] = [
        (MIB, &[]),
        (MIB, &[0..MIB]),
        (MIB, &[0..MIB - 4 * KIB]),
        (64 * GIB, &[GIB..GIB + 4 * KIB]),
        (MIB, &[8 * KIB..MIB]),
        (8 * KIB, &[0..4 * KIB]),
    ];
    for (size, data) in layouts {
        let source = LoopMount::new(size, data);
        check_blocks(source.file());
        let allocated: u64 = data.iter().map(|range| range.end - range.start).sum();
        let shown = stat(source.file()).blocks() * 512;
        assert!(shown <= allocated.max(4096) + 64 * KIB, "{shown} bytes for {allocated} of data in {size}");
    }
}

/// A file of one 512-byte block has no hole, because its `st_blocks` cannot be both nonzero and below the size. A
/// file of two blocks can have a hole.
#[test]
fn a_file_below_1024_bytes_has_no_hole() {
    needs!(root);
    for (size, has_hole) in
        [(1, false), (511, false), (512, false), (1023, false), (1024, true), (1025, true), (1536, true)]
    {
        let image = Image::new(size);
        let mount = Mount::new(image.path());
        check(mount.file(), image.path());
        assert_eq!(map_holes(mount.file()).iter().any(|extent| extent.0 == Kind::Hole), has_hole, "{size}");
        // tar rounds the size up to blocks, and cp down.
        let blocks = stat(mount.file()).blocks();
        assert_eq!(
            (blocks < size / 512, blocks < size.div_ceil(512), blocks > 0),
            (has_hole, has_hole, true),
            "{size}"
        );
    }
    let source = LoopMount::new(512, &[]);
    source.check();
    assert_eq!(map_holes(source.file()), [Extent(Kind::Data, 0..512)]);
}

/// `st_blocks` of a part of an image counts only the blocks of that part.
#[test]
fn st_blocks_counts_only_the_shown_part_of_an_image() {
    needs!(root);
    let dense_part = ["--offset=1048576", "--sizelimit=1048576"];
    let source = LoopMount::with_options(64 * MIB, &[MIB..2 * MIB], &dense_part);
    check_blocks(source.file());
    let sparse_part = ["--offset=33554432", "--sizelimit=1048576"];
    let source = LoopMount::with_options(64 * MIB, &[MIB..20 * MIB, 32 * MIB..32 * MIB + 4096], &sparse_part);
    check_blocks(source.file());
}

/// `stat` is correct without a previous query of the map, before and after the device changes.
#[test]
fn st_blocks_follows_changes_of_the_device() {
    needs!(root);
    let source = LoopMount::new(MIB, &[]);
    let sparse = || stat(source.file()).blocks() < MIB / 512;
    assert!(sparse());
    write(source.device.path(), 0..MIB);
    assert!(wait_until(|| !sparse()), "the device has no hole any more");
    run("blkdiscard", ["--offset", "524288", "--length", "4096", source.device.path().to_str().expect("text")]);
    assert!(wait_until(sparse), "the device has a hole again");
    let map = map_holes(source.file());
    assert!(map.iter().any(|extent| extent.0 == Kind::Hole), "{map:?}");
}

/// Waits until the times of the file are stable, and returns them. While the last change of the image is less than
/// two clock ticks ago, each stat returns new times.
fn stable_times(file: &Path) -> [i64; 4] {
    assert!(wait_until(|| times(&stat(file)) == times(&stat(file))), "the times do not become stable");
    times(&stat(file))
}

/// Backup tools skip a file whose times did not change, and report a file whose times change during the read.
#[test]
fn times_change_when_the_device_changes_and_only_then() {
    needs!(root);
    let source = LoopMount::new(4 * MIB, &[0..64 * KIB]);
    let before = stable_times(source.file());
    let mut bytes = Vec::new();
    open(source.file()).read_to_end(&mut bytes).expect("the file can be read");
    map_holes(source.file());
    run("sync", ["--file-system".as_ref(), source.file().as_os_str()]);
    fs::write("/proc/sys/vm/drop_caches", "2").expect("root may drop caches");
    assert_eq!(times(&stat(source.file())), before, "reads change no times");

    let changes: [(&str, &dyn Fn()); 3] = [
        ("a write", &|| write(source.device.path(), MIB..MIB + 4096)),
        ("a write that fills no hole", &|| write(source.device.path(), 0..4096)),
        ("a discard", &|| {
            run("blkdiscard", ["--offset", "0", "--length", "4096", source.device.path().to_str().expect("text")]);
        }),
    ];
    for (what, change) in changes {
        let before = stable_times(source.file());
        change();
        assert!(wait_until(|| times(&stat(source.file())) != before), "{what} changes no time");
        let after = stable_times(source.file());
        map_holes(source.file());
        assert_eq!(times(&stat(source.file())), after, "the times are stable after {what}");
    }
}

/// Without I/O counters, the daemon cannot detect that a device did not change.
#[test]
fn times_of_a_device_without_io_counters_change_at_each_stat() {
    needs!(root);
    let source = LoopMount::new(MIB, &[0..4096]);
    let name = source.device.path().file_name().expect("a device has a name").to_owned();
    let switch = Path::new("/sys/block").join(name).join("queue/iostats");
    let before = stable_times(source.file());
    assert_eq!(times(&stat(source.file())), before, "the times are stable without a change");
    fs::write(&switch, "0").expect("the counters can be switched off");
    let off = times(&stat(source.file()));
    assert_ne!(off, before);
    assert_ne!(times(&stat(source.file())), off, "each stat returns new times without counters");
    fs::write(&switch, "1").expect("the counters can be switched on");
}

/// A lower device can be written without a write through the device above it.
#[test]
fn times_change_when_the_image_below_a_partition_changes() {
    needs!(root);
    let image = Image::with_data(4 * MIB, &[0..MIB]);
    let mut device = Loop::with_options(image.path(), &["--partscan"]);
    let partition = device.add_partition(1, 2048, 2048);
    let mount = Mount::new(&partition);
    let before = stable_times(mount.file());
    assert_eq!(times(&stat(mount.file())), before);
    image.write(MIB..MIB + 4096);
    assert!(
        wait_until(|| times(&stat(mount.file())) != before),
        "the times do not change, so a backup would skip the file"
    );
    let after = stable_times(mount.file());
    map_holes(mount.file());
    assert_eq!(times(&stat(mount.file())), after, "the times are stable after the change");
    drop(mount);
}

#[test]
fn inode_numbers_are_stable() {
    needs!(root);
    let source = LoopMount::new(MIB, &[0..4096]);
    let number = stat(source.file()).ino();
    fs::write("/proc/sys/vm/drop_caches", "2").expect("root may drop caches");
    assert_eq!(stat(source.file()).ino(), number);
    write(source.device.path(), 0..MIB);
    assert_eq!(stat(source.file()).ino(), number);
    let second = Mount::new(source.device.path());
    assert_eq!(stat(second.file()).ino(), number, "the same device in another mount");
    let other = Loop::new(source.image.path());
    let third = Mount::new(other.path());
    assert_ne!(stat(third.file()).ino(), stat(third.directory()).ino());
}

#[test]
fn statfs_reports_blocks_of_4_kib_and_read_only() {
    needs!(root);
    let source = LoopMount::new(MIB, &[0..4096]);
    let statfs = nix::sys::statvfs::statvfs(source.mount.directory()).expect("statvfs works");
    // bsdtar sizes its buffers by these.
    assert_eq!(statfs.block_size(), 4096);
    assert_eq!(statfs.fragment_size(), 4096);
    assert!(statfs.name_max() >= 255);
    assert!(statfs.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY), "{:?}", statfs.flags());
}
