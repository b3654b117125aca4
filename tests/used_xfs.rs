//! The used space of XFS: file systems by mkfs.xfs and the kernel, compared with xfs_db, xfs_logprint and xfs_repair.

mod common;
#[path = "used_xfs/damaged.rs"]
mod damaged;
#[path = "used_xfs/images.rs"]
mod images;
#[path = "used_xfs/refusals.rs"]
mod refusals;
#[path = "support/used_space.rs"]
#[allow(dead_code, reason = "each test uses its own part")]
mod used_space;
#[path = "support/xfs_image.rs"]
mod xfs_image;
use std::fs::File;
use std::io::Write as _;

use blkholefs::testing::map::ExtentKind;
use common::image::Image;
use common::random::Random;
use common::{MIB, needs, run};
use images::{
    Mounted, copy, copy_of_used, field, fill, free_by_xfs_db, kernel_mounts, log_head, make, needs_xfs, populated,
    ranges, used,
};

const SIZE: u64 = 320 * MIB;

/// Compares the map of a clean image with xfs_db, and checks that a copy of the used space is a complete file system. The
/// files are compared if this kernel can mount the image.
fn check(image: &Image) {
    log_head(image.path()).expect("a clean log");
    let map = used(image.path()).unwrap();
    assert_eq!(ranges(&map, ExtentKind::Hole), free_by_xfs_db(image.path()));
    let copy = copy_of_used(image, &map);
    run("xfs_repair", ["-n".as_ref(), copy.path().as_os_str()]);
    if kernel_mounts(image) {
        let files = |image| Mounted::new(image, "ro,nouuid,norecovery").files();
        assert_eq!(files(&copy), files(image));
    }
}

/// Checks the file system of these options: new, and after each of two times that the kernel filled and fragmented it.
fn check_options(options: &[&str], holes: u64) {
    check_filled(&make(SIZE, options), holes);
}

fn check_filled(image: &Image, holes: u64) {
    check(image);
    let block = field(image.path(), "sb 0", "blocksize");
    let mut random = Random::new(holes);
    for _ in 0..2 {
        fill(Mounted::new(image, "nouuid").path(), block, holes, &mut random);
        check(image);
    }
}

#[test]
fn different_numbers_of_groups() {
    needs_xfs!();
    for groups in ["agcount=2", "agcount=4", "agcount=13"] {
        check_options(&["-d", groups], 2000);
    }
}

#[test]
fn features_of_version_5() {
    needs_xfs!();
    for features in [
        "reflink=1,rmapbt=1,finobt=1,bigtime=1,inobtcount=1",
        "reflink=0,rmapbt=0,finobt=0,bigtime=0,inobtcount=0",
        "reflink=1,rmapbt=0,finobt=1,bigtime=0",
    ] {
        check_options(&["-m", features, "-i", "sparse=1,nrext64=0"], 2000);
    }
    check_options(&["-i", "nrext64=1,sparse=0"], 1000);
}

#[test]
fn sizes_of_blocks_and_sectors() {
    needs_xfs!();
    // Many extents in small blocks make trees of three levels.
    let image = make(SIZE, &["-b", "size=1024", "-s", "size=512", "-d", "agcount=2"]);
    check_filled(&image, 12_000);
    let heights: Vec<u64> = (0..2).map(|group| field(image.path(), &format!("agf {group}"), "bnolevel")).collect();
    assert!(heights.contains(&3), "{heights:?}");
    check_options(&["-b", "size=1024", "-m", "rmapbt=1"], 5000);
    check_options(&["-s", "size=4096"], 2000);
    check_options(&["-b", "size=2048", "-s", "size=2048"], 2000);
}

#[test]
fn blocks_larger_than_a_page() {
    needs_xfs!();
    for size in ["size=16384", "size=65536"] {
        let image = make(SIZE, &["-b", size]);
        check(&image);
        // Linux before 6.12 does not mount these.
        if kernel_mounts(&image) {
            check_filled(&image, 300);
        }
    }
}

#[test]
fn stripes_of_the_log() {
    needs_xfs!();
    for stripe in ["su=4k", "su=32k", "su=256k,size=20m"] {
        check_options(&["-l", stripe], 1000);
    }
}

/// Logs that wrap several times, so that records, also the one of the unmount, end at all places.
#[test]
fn logs_that_wrap() {
    needs_xfs!();
    for (options, rounds, most) in
        [("su=4k,size=8m", 30, 220), ("su=32k,size=8m", 14, 70), ("su=256k,size=20m", 14, 30)]
    {
        let image = make(SIZE, &["-l", options]);
        let (mut heads, mut random) = (Vec::new(), Random::new(rounds));
        for _ in 0..rounds {
            let mounted = Mounted::new(&image, "nouuid,wsync");
            for number in 0..random.within(1..most) {
                let file = File::create(mounted.path().join(format!("file {}", random.within(0..50)))).unwrap();
                (&file).write_all(&random.bytes(number)).unwrap();
                file.sync_all().unwrap();
            }
            drop(mounted);
            heads.push(log_head(image.path()).expect("a clean log"));
            let map = used(image.path()).unwrap_or_else(|reason| panic!("{options}: {heads:?}: {reason}"));
            assert_eq!(ranges(&map, ExtentKind::Hole), free_by_xfs_db(image.path()));
        }
        assert!(!heads.is_sorted(), "{options}: the log does not wrap: {heads:?}");
        check(&image);
    }
}

/// Version 4 has no checksums. Where the kernel cannot mount it, mkfs.xfs itself puts files into it. The kernel of
/// `tests/uml/run` can.
#[test]
fn version_4() {
    needs_xfs!();
    for options in [
        &["-m", "crc=0"][..],
        &["-m", "crc=0", "-l", "version=1"],
        &["-m", "crc=0", "-l", "lazy-count=0"],
        &["-m", "crc=0", "-l", "version=1,lazy-count=0", "-b", "size=512"],
        &["-m", "crc=0", "-s", "size=4096", "-i", "projid32bit=0"],
    ] {
        let image = populated(SIZE, options);
        check(&image);
        if kernel_mounts(&image) {
            check_filled(&image, 3000);
        } else {
            eprintln!("skipped: this kernel cannot mount version 4");
        }
    }
}

#[test]
fn another_uuid_a_repair_and_a_growth() {
    needs_xfs!();
    let image = make(SIZE, &[]);
    run("xfs_admin", ["-U".as_ref(), "generate".as_ref(), image.path().as_os_str()]);
    assert_ne!(field::<String>(image.path(), "sb 0", "uuid"), field::<String>(image.path(), "sb 0", "meta_uuid"));
    mount_once(&image);
    check_filled(&image, 1000);

    // A log that xfs_repair empties begins with another cycle.
    let mounted = Mounted::new(&image, "nouuid");
    std::fs::write(mounted.path().join("more"), "content").unwrap();
    run("sync", ["-f".as_ref(), mounted.path().as_os_str()]);
    let dirty = copy(&image);
    drop(mounted);
    run("xfs_repair", ["-L".as_ref(), dirty.path().as_os_str()]);
    mount_once(&dirty);
    check_filled(&dirty, 1000);

    image.resize(2 * SIZE + 77 * MIB + 512);
    let mounted = Mounted::new(&image, "nouuid");
    run("xfs_growfs", ["-d".as_ref(), mounted.path().as_os_str()]);
    drop(mounted);
    check_filled(&image, 1000);
}

/// Mounts an image whose log xfs_admin or xfs_repair has written: they leave blocks of other cycles behind the head.
fn mount_once(image: &Image) {
    assert_eq!(used(image.path()).err().as_deref(), Some(refusals::NOT_EMPTY));
    drop(Mounted::new(image, "nouuid"));
}

#[test]
fn what_lies_behind_the_file_system_is_data() {
    needs_xfs!();
    let image = make(SIZE, &[]);
    image.resize(SIZE + 12_345);
    let map = used(image.path()).unwrap();
    let data = ranges(&map, ExtentKind::Data);
    assert_eq!(data.last(), Some(&(SIZE..SIZE + 12_345)));
}

#[test]
fn a_realtime_device_does_not_matter() {
    needs_xfs!();
    let realtime = Image::new(64 * MIB);
    let option = format!("rtdev={}", realtime.path().display());
    let image = make(SIZE, &["-r", &option]);
    let map = used(image.path()).unwrap();
    assert_eq!(ranges(&map, ExtentKind::Hole), free_by_xfs_db(image.path()));
}
