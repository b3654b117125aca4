//! Writing to thin volumes through a mount, while the volume, its pool, or other writers of it change or fail.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use crate::common::check::{check, check_same_bytes, map_holes, map_of, seek_data};
use crate::common::dm::{Dm, Pool, sectors};
use crate::common::image::{Image, discard, open_rw, write};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::written::Written;
use crate::common::{KIB, MIB, assert_becomes, needs, run};

const BLOCK: u64 = 64 * KIB;
const SIZE: u64 = 8 * MIB;

/// A volume that is shown by one process, and written through a device above it by the same process: that is no own write of the volume.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_device_above_is_written_in_the_same_mount() {
    needs!(root, programs["dmsetup"]);
    let pool = Pool::with_zeroing(64 * MIB, BLOCK);
    let thin = pool.thin(0, SIZE);
    let part = SIZE / 512 - 48;
    let above = Dm::new(&format!("0 {part} linear {} 24", thin.path().display()));
    let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    for (name, device) in [("thin", &thin), ("above", &above)] {
        std::os::unix::fs::symlink(device.path(), directory.path().join(name)).expect("a new name");
    }
    let mount = Mount::writable(directory.path());
    let [below, other] = ["thin", "above"].map(|name| mount.directory().join(name));
    let file = open_rw(&other);
    let shown = File::open(&below).expect("it can be read");
    let second = Mount::new(thin.path());
    let second_file = File::open(second.file()).expect("it can be read");
    for n in 0..20 {
        let at = n * 3 * BLOCK;
        assert_eq!(seek_data(&shown, at), None, "nothing is there yet");
        assert_eq!(seek_data(&second_file, at), None, "nothing is there yet");
        file.write_all_at(&[1; 100], at + BLOCK).expect("the pool has room");
        for file in [&shown, &second_file] {
            let found = seek_data(file, at).expect("there is data");
            assert!(found <= at + BLOCK + 24 * 512, "{found} for {at}");
            let mut byte = [0];
            file.read_exact_at(&mut byte, at + BLOCK + 24 * 512).expect("it can be read");
            assert_eq!(byte, [1]);
        }
        assert!(seek_data(&file, at).is_some_and(|found| found <= at + BLOCK));
    }
    check(&below, thin.path());
    check(second.file(), thin.path());
    check(&other, above.path());
}

/// What a writer knows of mapped blocks ends with the table, and with a discard by another process.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn blocks_that_were_filled_are_filled_again_after_a_change() {
    needs!(root, programs["dmsetup"]);
    let pool = Pool::with_features(16 * MIB, BLOCK, &["skip_block_zeroing", "error_if_no_space"]);
    let old = pool.thin(9, 16 * MIB);
    write(old.path(), 0..16 * MIB);
    drop(old);
    pool.delete(9);
    let thin = pool.thin(0, SIZE);
    pool.dm().message("create_thin 1");
    let table = |id: u32, size: u64| format!("0 {} thin {} {id}", size / 512, pool.dm().path().display());
    let mount = Mount::writable(thin.path());
    let file = open_rw(mount.file());
    let block = usize::try_from(BLOCK).expect("small");
    let around = |at: u64, expected: u8| {
        let mut bytes = vec![0; block];
        file.read_exact_at(&mut bytes, at).expect("it can be read");
        assert_eq!(&bytes[100..110], &[expected; 10]);
        bytes[100..110].fill(0);
        assert!(bytes.iter().all(|&byte| byte == 0), "old bytes at {at}");
        check(mount.file(), thin.path());
    };
    file.write_all_at(&vec![1; block], 0).expect("there is room");
    // Another volume, of which nothing is mapped.
    thin.reload(&table(1, SIZE));
    file.write_all_at(&[2; 10], 100).expect("there is room");
    around(0, 2);
    file.write_all_at(&vec![3; block], BLOCK).expect("there is room");
    discard(thin.path(), BLOCK..2 * BLOCK);
    file.write_all_at(&[4; 10], BLOCK + 100).expect("there is room");
    around(BLOCK, 4);
    // The volume grows, and has a new block at its former end.
    thin.reload(&table(1, SIZE + BLOCK));
    assert_becomes(&(SIZE + BLOCK), || file.metadata().expect("it has attributes").len());
    file.write_all_at(&[5; 10], SIZE + 100).expect("there is room");
    around(SIZE, 5);
    // A snapshot, and the volume after it was emptied.
    thin.suspend();
    pool.dm().message("create_snap 2 1");
    thin.resume();
    file.set_len(0).expect("it is made zero");
    file.write_all_at(&[6; 10], 100).expect("there is room");
    around(0, 6);
    thin.reload(&table(2, SIZE + BLOCK));
    around(BLOCK, 4);
}

/// A pool that is full fails the writes that need a block, and goes on when it has grown.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_full_pool_that_grows() {
    needs!(root, programs["dmsetup"]);
    for skip in [false, true] {
        let (data, metadata) = (Image::new(8 * MIB), Image::new(4 * MIB));
        let (data, metadata) = (Loop::new(data.path()), Loop::new(metadata.path()));
        let features = if skip { "2 skip_block_zeroing error_if_no_space" } else { "1 error_if_no_space" };
        let table = |size: u64| {
            let (metadata, data) = (metadata.path().display(), data.path().display());
            format!("0 {} thin-pool {metadata} {data} 128 0 {features}", size / 512)
        };
        let pool = Dm::new(&table(2 * MIB));
        pool.message("create_thin 0");
        let thin = Dm::new(&format!("0 {} thin {} 0", SIZE / 512, pool.path().display()));
        let mount = Mount::writable(thin.path());
        let file = open_rw(mount.file());
        assert_eq!(seek_data(&file, 0), None);
        let mut written = Vec::new();
        let mut failed = Vec::new();
        for n in 0..64 {
            let at = n * 2 * BLOCK;
            match file.write_all_at(&[7; 5000], at + 5) {
                Ok(()) => written.push(at),
                Err(error) => {
                    assert!(matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EIO)), "{error}");
                    failed.push(at);
                }
            }
            if let Some(at) = written.last() {
                assert_eq!(seek_data(&file, *at), Some(*at));
            }
        }
        assert_eq!((written.len(), failed.len()), (32, 32));
        check_same_bytes(mount.file(), thin.path());
        for at in &written {
            assert_eq!(seek_data(&file, *at), Some(*at), "what was written is data");
        }
        // In a full pool what is mapped can still be written and made zero.
        file.write_all_at(&[8; 5000], written[3] + 5).expect("it is mapped");
        let at = i64::try_from(written[4] - 5).expect("small");
        let mode = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(&file, mode, at, 3 * 65536 + 10).expect("a discard takes no space");
        pool.reload(&table(8 * MIB));
        for at in &failed {
            file.write_all_at(&[9; 5000], *at + 5).expect("the pool has room");
            assert_eq!(seek_data(&file, *at), Some(*at));
        }
        file.sync_all().expect("all is written");
        check(mount.file(), thin.path());
        file.set_len(0).expect("it is emptied");
        check(mount.file(), thin.path());
        assert_becomes(&map_of(SIZE, &[]), || map_holes(mount.file()));
    }
}

/// A pool that is read-only, and a volume that is gone for a while.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_pool_that_is_read_only_and_a_volume_that_fails() {
    needs!(root, programs["dmsetup"]);
    let pool = Pool::with_zeroing(64 * MIB, BLOCK);
    let thin = pool.thin(0, SIZE);
    let mut file = Written::new(thin.path());
    file.write(MIB..2 * MIB);
    file.check();
    let table = run("dmsetup", ["table", pool.dm().name()]);
    let read_only = table.trim().replace(" 1 error_if_no_space", " 2 read_only error_if_no_space");
    assert_ne!(read_only, table.trim());
    pool.dm().reload(&read_only);
    let status = pool.dm().status();
    assert!(status.contains(" ro "), "{status}");
    let error = file.file().write_all_at(&[1; 100], 4 * MIB).expect_err("nothing can be mapped");
    assert!(matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EIO | libc::EROFS)), "{error}");
    file.check_bytes();
    // Zeros are written to what is mapped, since nothing can be unmapped.
    file.zero(MIB + 5..MIB + 512 * KIB);
    file.check_bytes();
    file.write(MIB + 7..MIB + 700);
    file.check_bytes();
    pool.dm().reload(table.trim());
    file.write(4 * MIB..4 * MIB + 100);
    file.zero(MIB + 512 * KIB..2 * MIB);
    file.check();
    let own = run("dmsetup", ["table", thin.name()]);
    thin.reload(&format!("0 {} error", SIZE / 512));
    for result in [file.file().write_all_at(&[1; 100], 0), file.file().set_len(0)] {
        let error = result.expect_err("the device fails");
        assert!(matches!(error.raw_os_error(), Some(libc::EIO | libc::ENODEV)), "{error}");
    }
    thin.reload(own.trim());
    file.check_bytes();
    file.write(0..100);
    file.check();
    file.truncate();
    file.check();
}

/// A change of another process to bytes that are not in the range survives what is done to the range.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn foreign_writes_in_other_blocks_stay() {
    needs!(root, programs["dmsetup"]);
    let pool = Pool::new(64 * MIB, BLOCK);
    let thin = pool.thin(0, SIZE);
    let mount = Mount::writable(thin.path());
    let file = open_rw(mount.file());
    let foreign =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(thin.path()).expect("it opens");
    let memory = vec![9; 8192];
    let bytes = &memory[memory.as_ptr().align_offset(4096)..][..4096];
    let mode = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for n in 0..30_u64 {
        let at = n * 4 * BLOCK;
        assert_eq!(seek_data(&file, at), None);
        file.write_all_at(&[1; 700], at + BLOCK + 100).expect("there is room");
        foreign.write_all_at(bytes, at).expect("there is room");
        // The whole range was a hole, as far as own writes are concerned.
        let zero = |start: u64, len: u64| {
            let [start, len] = [start, len].map(|at| i64::try_from(at).expect("small"));
            nix::fcntl::fallocate(&file, mode, start, len).expect("it is made zero");
        };
        zero(at + 1, BLOCK * 2);
        foreign.write_all_at(bytes, at + 3 * BLOCK).expect("there is room");
        let mut shown = vec![0; 4 * 65536];
        file.read_exact_at(&mut shown, at).expect("it can be read");
        assert_eq!(shown[0], 9);
        assert!(shown[1..=2 * 65536].iter().all(|&byte| byte == 0), "not zero in round {n}");
        assert_eq!(shown[3 * 65536..][..4096], *bytes);
        assert_eq!(seek_data(&file, at + 3 * BLOCK), Some(at + 3 * BLOCK));
        zero(at, 4 * BLOCK);
        file.read_exact_at(&mut shown, at).expect("it can be read");
        assert!(shown.iter().all(|&byte| byte == 0), "not zero at the end of round {n}");
    }
    check(mount.file(), thin.path());
    assert_eq!(sectors(thin.path()) * 512, SIZE);
}
