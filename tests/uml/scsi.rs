//! SCSI disks: the map is the one that `sg_get_lba_status` sees.
#![allow(clippy::single_range_in_vec_init, reason = "a list of ranges may have one")]

use std::os::unix::fs::FileExt as _;
use std::path::Path;

use blkholefs::testing::map::view;
use blkholefs::testing::source::{BlockDevice, Context, Stack};
use blkholefs::testing::units::Bytes;
use nix::unistd::{Whence, lseek};

use crate::common::check::{Extent, Kind, check, check_holes, map_holes, map_of, open, seek_data, seek_hole, sysfs};
use crate::common::dm::Dm;
use crate::common::image::{discard, open_for_writing, write};
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::common::scsi::ScsiDisk;
use crate::common::{KIB, MIB, run, run_with_input, wait_until};

const SIZE: u64 = 32 * MIB;

/// The map of a resolved device, to the byte.
fn map(stack: &Stack) -> Vec<Extent> {
    let kind = |kind| if kind == blkholefs::testing::map::ExtentKind::Hole { Kind::Hole } else { Kind::Data };
    let loaded = stack.load();
    let all = Bytes::ZERO..stack.len();
    let runs = view::runs(loaded.map(), Bytes::new(1), all);
    runs.map(|(start, run)| Extent(kind(run.kind), start.get()..run.end.get())).collect()
}

fn resolve(path: &Path) -> Stack {
    Stack::of_device(&BlockDevice::open(path).expect("the device opens"), &Context::default())
}

#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn the_map_is_that_of_the_disk_for_any_block_size_and_granularity() {
    for (sector, granularity) in [(512, 1), (512, 8), (4096, 1), (4096, 4)] {
        let parameters = [format!("sector_size={sector}"), format!("unmap_granularity={granularity}")];
        let disk = ScsiDisk::new(SIZE / MIB, &["lbprz=1", &parameters[0], &parameters[1]]);
        let stack = resolve(disk.path());
        assert_eq!(stack.load().map().dense_because(), None);
        assert_eq!(map(&stack), [Extent(Kind::Hole, 0..SIZE)], "a new disk");
        let mut random = Random::new(Random::seed_or(sector + granularity));
        for round in 1..=8 {
            let range = random.range(SIZE, 4 * KIB);
            if random.one_in(3) {
                discard(disk.path(), range.clone());
            } else {
                write(disk.path(), range);
            }
            if round % 4 == 0 {
                assert_eq!(map(&stack), disk.lba_status(), "blocks of {sector}, granularity {granularity}");
            }
        }
        check_holes(&map(&stack), disk.path());
    }
}

#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn a_disk_that_does_not_promise_zeros_is_dense() {
    for (parameters, reason) in [
        (&["lbprz=0"][..], "LBPRZ is 0 in READ CAPACITY(16)"),
        (&["lbprz=2"], "does not promise zeros"),
        (&["lbprz=1", "lbpu=0", "lbpws=0"], "LBPME is 0"),
    ] {
        let disk = ScsiDisk::new(8, parameters);
        let stack = resolve(disk.path());
        let actual = stack.load().map().dense_because().map_or_else(String::new, |reason| reason.to_string());
        assert!(actual.contains(reason), "{parameters:?}: {actual}");
        assert_eq!(map(&stack), [Extent(Kind::Data, 0..8 * MIB)], "{parameters:?}");
    }
}

#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn writes_and_unmaps_of_an_open_disk_are_seen() {
    let disk = ScsiDisk::new(SIZE / MIB, &["lbprz=1", "unmap_granularity=1"]);
    let stack = resolve(disk.path());
    let open = open_for_writing(disk.path());
    for round in 0..8 {
        let range = round * MIB..round * MIB + 64 * KIB;
        write(disk.path(), range.clone());
        assert_eq!(map(&stack), map_of(SIZE, std::slice::from_ref(&range)), "a write");
        discard(disk.path(), range.clone());
        assert_eq!(map(&stack), map_of(SIZE, &[]), "a discard");
    }
    // No I/O counter includes an UNMAP command of sg_unmap(8), so the old map may be used until it expires.
    write(disk.path(), 0..MIB);
    assert_eq!(map(&stack), map_of(SIZE, &[0..MIB]));
    disk.unmap(0, 1024);
    assert!(wait_until(|| map(&stack) == map_of(SIZE, &[512 * KIB..MIB])), "{:?}", map(&stack));
    drop(open);
}

/// Reads and seeks on a removed disk fail with an error; they do not report the end of the file.
#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn a_removed_disk_is_an_error_and_no_end_of_file() {
    let disk = ScsiDisk::new(8, &["lbprz=1"]);
    write(disk.path(), 0..8 * MIB);
    let mount = Mount::new(disk.path());
    let file = open(mount.file());
    let mut bytes = vec![0; 64 * 1024];
    file.read_exact_at(&mut bytes, 0).expect("the disk is there");
    disk.pull_out();
    let gone =
        |error: std::io::Error| error.raw_os_error().is_some_and(|errno| [libc::ENODEV, libc::EIO].contains(&errno));
    assert!(file.read_at(&mut bytes, 4 * MIB).is_err_and(gone), "a read");
    // Linux 5.10 keeps the size of a disk that is gone: then there is no error but at a read, and all is data.
    let all = lseek(&file, 0, Whence::SeekData) == Ok(0) && lseek(&file, 0, Whence::SeekHole) == Ok(8 << 20);
    for whence in [Whence::SeekData, Whence::SeekHole] {
        assert!(all || lseek(&file, 0, whence).is_err_and(|errno| gone(errno.into())), "{whence:?}");
    }
    assert!(all || file.metadata().is_err_and(gone), "stat of the open file");
}

/// The kernel reports a medium error as ENODATA, which read(2) does not document; the mount reports EIO.
#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn a_medium_error_is_eio() {
    // Blocks 0x1234 and up cannot be read (SDEBUG_OPT_MEDIUM_ERR).
    let disk = ScsiDisk::new(8, &["lbprz=1", "opts=2"]);
    let (bad, mut bytes) = (0x1234 * 512 / 4096 * 4096, vec![0; 4096]);
    write(disk.path(), 0..MIB);
    let mount = Mount::new(disk.path());
    let file = open(mount.file());
    let error = file.read_exact_at(&mut bytes, bad).expect_err("the medium is bad");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    let cause = std::io::Error::from_raw_os_error(libc::ENODATA).to_string();
    assert!(mount.log().contains(cause.split(" (").next().expect("a text")), "{}", mount.log());
    file.read_exact_at(&mut bytes, 64 * KIB).expect("the rest can be read");
}

#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn partitions_and_linear_devices_have_the_holes_of_their_disk() {
    let disk = ScsiDisk::new(SIZE / MIB, &["lbprz=1", "unmap_granularity=1"]);
    let path = disk.path().to_str().expect("text");
    run_with_input("sfdisk", ["--quiet", "--no-reread", path], "label: dos\nstart=2048, size=16384\nstart=18432\n");
    run("blockdev", ["--rereadpt", path]);
    write(disk.path(), 2 * MIB..3 * MIB);
    write(disk.path(), 9 * MIB - 4 * KIB..9 * MIB + 4 * KIB);
    let first = resolve(&disk.partition(1));
    assert_eq!(map(&first), map_of(8 * MIB, &[MIB..2 * MIB, 8 * MIB - 4 * KIB..8 * MIB]));
    let second = resolve(&disk.partition(2));
    assert_eq!(map(&second), map_of(SIZE - 9 * MIB, &[0..4 * KIB]));
    drop((first, second));
    let linear = Dm::new(&format!("0 8192 linear {path} 4096\n8192 8192 linear {path} 12288"));
    let stack = resolve(linear.path());
    let expected = map_of(8 * MIB, &[0..MIB, 7 * MIB - 4 * KIB..7 * MIB + 4 * KIB]);
    assert_eq!(map(&stack), expected);
    check_holes(&expected, linear.path());
}

#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn a_mounted_disk_has_its_holes() {
    for sector in ["sector_size=512", "sector_size=4096"] {
        let disk = ScsiDisk::new(SIZE / MIB, &["lbprz=1", "unmap_granularity=1", sector]);
        let mount = Mount::new(disk.path());
        assert_eq!(map_holes(mount.file()), map_of(SIZE, &[]));
        let data = [0..4 * KIB, MIB..2 * MIB, SIZE - 4 * KIB..SIZE];
        data.iter().for_each(|range| write(disk.path(), range.clone()));
        assert_eq!(map_holes(mount.file()), map_of(SIZE, &data));
        check(mount.file(), disk.path());
        discard(disk.path(), data[1].clone());
        assert_eq!(map_holes(mount.file()), map_of(SIZE, &[data[0].clone(), data[2].clone()]));
        check(mount.file(), disk.path());
    }
    let disk = ScsiDisk::new(SIZE / MIB, &["lbprz=2"]);
    let mount = Mount::new(disk.path());
    assert_eq!(map_holes(mount.file()), [Extent(Kind::Data, 0..SIZE)]);
    assert!(mount.log().contains("does not promise zeros"), "{}", mount.log());
    check(mount.file(), disk.path());
}

/// Writes and discards of this host are seen. What is sent past the block layer is what the user excludes.
#[test]
#[ignore = "needs scsi_debug: run tests/run"]
fn a_static_disk_is_asked_once_until_this_host_writes() {
    for change in ["write", "discard", "iostats"] {
        let disk = ScsiDisk::new(SIZE / MIB, &["lbprz=1", "unmap_granularity=1"]);
        // Dirty pages from before the mount are no write.
        write(disk.path(), MIB..2 * MIB);
        let mount = Mount::with_options(disk.path(), &["-o", "static"]);
        let file = open(mount.file());
        let before = map_of(SIZE, &[MIB..2 * MIB]);
        assert_eq!(map_holes(mount.file()), before);
        assert_eq!(seek_hole(&file, MIB), Some(2 * MIB));
        disk.unmap(MIB / 512, MIB / 512);
        assert_eq!(seek_hole(&file, MIB), Some(2 * MIB), "it is not asked again");
        assert!(!mount.log().contains("static"), "{}", mount.log());
        let iostats = sysfs(disk.path()).join("queue/iostats");
        match change {
            "write" => write(disk.path(), 4 * MIB..5 * MIB),
            "discard" => discard(disk.path(), 8 * MIB..9 * MIB),
            _ => std::fs::write(&iostats, "1").unwrap(),
        }
        let after = if change == "write" { map_of(SIZE, &[4 * MIB..5 * MIB]) } else { map_of(SIZE, &[]) };
        // Data of the last second may be remembered.
        assert!(wait_until(|| map_holes(mount.file()) == after), "{change}: {:?}", map_holes(mount.file()));
        write(disk.path(), 16 * MIB..17 * MIB);
        assert_eq!(seek_data(&file, 16 * MIB), Some(16 * MIB), "it is asked at each question");
        assert_eq!(mount.log().matches("option 'static' ends").count(), 1, "{}", mount.log());
        drop(file);
    }
}
