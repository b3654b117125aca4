//! What each system call does.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::errno::Errno;

use crate::common::check::{assert_map, check_same_bytes, map_of, sysfs};
use crate::common::image::Image;
use crate::common::random::Random;
use crate::common::{KIB, MIB, needs, run};
use crate::{PUNCH, Writable, each_kind, errno, fallocate, open_rw, try_open};

/// Writes at odd offsets and of odd lengths, compared with a copy in memory.
#[test]
fn writes_of_all_sizes_and_alignments() {
    needs!(root);
    const SIZE: u64 = 9 * MIB + 4096;
    const LENGTHS: [u64; 14] =
        [1, 2, 511, 512, 513, 4095, 4096, 4097, 8191, 64 * KIB - 1, 64 * KIB + 1, MIB - 1, MIB + 1, 8 * MIB];
    const OFFSETS: [u64; 8] = [0, 1, 511, 512, 513, 4095, 4096, MIB - 1];
    for (name, written) in each_kind(SIZE) {
        let (file, mut model) = (written.open(), vec![0; SIZE as usize]);
        let mut random = Random::new(1);
        let ends = LENGTHS.iter().map(|length| (SIZE - length, *length));
        let inside = LENGTHS.iter().flat_map(|length| OFFSETS.map(|offset| (offset, *length)));
        for (offset, length) in inside.chain(ends) {
            let bytes = random.bytes(length);
            file.write_all_at(&bytes, offset).unwrap_or_else(|error| panic!("{name}: {length} at {offset}: {error}"));
            model[offset as usize..(offset + length) as usize].copy_from_slice(&bytes);
            // The neighbours too: a write changes no byte around it.
            let around = offset.saturating_sub(8192)..(offset + length + 8192).min(SIZE);
            let mut seen = vec![0; (around.end - around.start) as usize];
            file.read_exact_at(&mut seen, around.start).expect("a read inside the file");
            let equal = seen == model[around.start as usize..around.end as usize];
            assert!(equal, "{name}: {length} at {offset}");
        }
        assert!(fs::read(written.file()).expect("the file can be read") == model, "{name}");
        written.check();
    }
}

#[test]
fn writes_end_at_the_end() {
    needs!(root);
    const SIZE: u64 = MIB;
    for (name, written) in each_kind(SIZE) {
        let file = written.open();
        let bytes = vec![7; 100];
        assert_eq!(file.write_at(&bytes, SIZE - 100).ok(), Some(100), "{name}");
        assert_eq!(file.write_at(&bytes, SIZE - 40).ok(), Some(40), "{name}: across the end");
        for offset in [SIZE, SIZE + 1, SIZE + 4096, 1 << 40] {
            assert_eq!(errno(file.write_at(&bytes, offset)), Some(libc::ENOSPC), "{name}: at {offset}");
            assert_eq!(file.write_at(&[], offset).ok(), Some(0), "{name}: nothing at {offset}");
        }
        let large = vec![7; 2 * SIZE as usize];
        assert_eq!(file.write_at(&large, 0).ok(), Some(SIZE as usize), "{name}");
        let mut appended = OpenOptions::new().append(true).open(written.file()).expect("it opens");
        assert_eq!(errno(appended.write(&bytes)), Some(libc::ENOSPC), "{name}: O_APPEND");
        assert_eq!(file.metadata().expect("it is open").len(), SIZE, "{name}");
        written.check();
    }
}

#[test]
fn fallocate_makes_zeros_and_refuses_the_rest() {
    needs!(root);
    const SIZE: u64 = 2 * MIB;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    for (name, written) in each_kind(SIZE) {
        let file = written.open();
        let mut model = vec![1; SIZE as usize];
        file.write_all_at(&model, 0).expect("a write inside the file");
        let mut zero = |mode, offset: u64, len: u64| {
            assert_eq!(fallocate(&file, mode, offset, len), Ok(()), "{name}: {mode} at {offset}, {len}");
            model[(offset as usize).min(SIZE as usize)..((offset + len) as usize).min(SIZE as usize)].fill(0);
            assert!(fs::read(written.file()).expect("it can be read") == model, "{name}: {mode} at {offset}, {len}");
        };
        zero(PUNCH, 64 * KIB, 64 * KIB);
        zero(PUNCH, 5000, 3);
        zero(PUNCH, 8191, 8194);
        zero(ZERO, 256 * KIB, 64 * KIB);
        zero(ZERO | KEEP, 512 * KIB + 1, 64 * KIB);
        zero(ZERO, SIZE - 4097, 4097);
        zero(ZERO | KEEP, SIZE - 9000, 20_000);
        zero(PUNCH, SIZE - 30_000, MIB);
        zero(PUNCH, SIZE, MIB);
        zero(ZERO | KEEP, 1 << 40, 1);
        assert_eq!(fallocate(&file, ZERO, SIZE - 4096, 4097), Err(Errno::ENOSPC), "{name}: across the end");
        let refused = [
            0,
            KEEP,
            libc::FALLOC_FL_COLLAPSE_RANGE,
            libc::FALLOC_FL_INSERT_RANGE,
            libc::FALLOC_FL_UNSHARE_RANGE,
            libc::FALLOC_FL_PUNCH_HOLE,
            PUNCH | ZERO,
        ];
        for mode in refused {
            let answer = fallocate(&file, mode, 0, 4096);
            assert_eq!(answer, Err(Errno::EOPNOTSUPP), "{name}: mode {mode}");
        }
        let reader = File::open(written.file()).expect("it opens");
        assert_eq!(fallocate(&reader, PUNCH, 0, 4096), Err(Errno::EBADF), "{name}: open for reading");
        assert!(fs::read(written.file()).expect("it can be read") == model, "{name}");
        written.check();
    }
}

/// Zeros are holes again, wherever the image below can have holes.
#[test]
fn punched_blocks_are_holes() {
    needs!(root);
    for (name, written) in each_kind(MIB) {
        let file = written.open();
        file.write_all_at(&vec![1; MIB as usize], 0).expect("a write inside the file");
        fallocate(&file, PUNCH, 64 * KIB, 64 * KIB).expect("a range inside the file");
        fallocate(&file, libc::FALLOC_FL_ZERO_RANGE, 256 * KIB, 4 * KIB).expect("a range inside the file");
        let data = [0..64 * KIB, 128 * KIB..256 * KIB, 260 * KIB..MIB];
        assert_map(written.file(), &map_of(MIB, &data));
        file.set_len(0).expect("it is emptied");
        assert_map(written.file(), &map_of(MIB, &[]));
        assert!(!name.is_empty());
    }
}

#[test]
fn truncation_empties_the_device_and_keeps_its_length() {
    needs!(root);
    const SIZE: u64 = MIB;
    let truncate = |path: &Path, len: u64| nix::unistd::truncate(path, i64::try_from(len).expect("a length"));
    for (name, written) in each_kind(SIZE) {
        let path = written.file();
        let filled = || {
            open_rw(path, 0).write_all_at(&vec![1; SIZE as usize], 0).expect("a write inside the file");
            assert!(fs::read(path).expect("it can be read").iter().all(|&byte| byte == 1), "{name}");
        };
        let is_empty = |how: &str| {
            let bytes = fs::read(path).expect("it can be read");
            assert_eq!(bytes.len(), SIZE as usize, "{name}: {how}");
            assert!(bytes.iter().all(|&byte| byte == 0), "{name}: {how}");
            written.check();
        };
        let ways: [(&str, &dyn Fn()); 5] = [
            ("ftruncate", &|| written.open().set_len(0).expect("it is emptied")),
            ("truncate", &|| truncate(path, 0).expect("it is emptied")),
            ("O_WRONLY and O_TRUNC", &|| drop(File::create(path).expect("it opens"))),
            ("O_RDWR and O_TRUNC", &|| drop(open_rw(path, libc::O_TRUNC))),
            ("O_RDONLY and O_TRUNC", &|| {
                let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_TRUNC;
                let opened = nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty()).expect("it opens");
                let mut bytes = Vec::new();
                File::from(opened).read_to_end(&mut bytes).expect("it can be read");
                assert_eq!(bytes, vec![0; SIZE as usize], "{name}");
            }),
        ];
        for (how, empty) in ways {
            filled();
            let reader = File::open(path).expect("it opens");
            let mut byte = [9];
            reader.read_exact_at(&mut byte, SIZE / 2).expect("a read inside the file");
            empty();
            reader.read_exact_at(&mut byte, SIZE / 2).expect("a read inside the file");
            assert_eq!(byte, [0], "{name}: {how}: the page of an open file");
            is_empty(how);
        }
        filled();
        let file = written.open();
        for len in [1, 512, SIZE - 1, SIZE + 1, 2 * SIZE] {
            assert_eq!(errno(file.set_len(len)), Some(libc::EPERM), "{name}: ftruncate to {len}");
            assert_eq!(truncate(path, len), Err(Errno::EPERM), "{name}: truncate to {len}");
        }
        file.set_len(SIZE).expect("its own length");
        truncate(path, SIZE).expect("its own length");
        assert!(fs::read(path).expect("it can be read").iter().all(|&byte| byte == 1), "{name}");
        let reader = File::open(path).expect("it opens");
        assert_eq!(errno(reader.set_len(0)), Some(libc::EINVAL), "{name}: open for reading");
    }
}

/// The number of flushes that a device has completed, from sysfs.
fn flushes(device: &Path) -> u64 {
    let text = fs::read_to_string(sysfs(device).join("stat")).expect("the device is there");
    text.split_whitespace().nth(15).and_then(|word| word.parse().ok()).expect("Linux 5.5 and newer count flushes")
}

/// The kernel sends no fsync request for a write with O_SYNC or O_DSYNC to a file that is written past the page cache.
#[test]
fn synchronous_writes_and_fsync_flush_the_device() {
    needs!(root, programs["sync", "dd"]);
    let written = Writable::device(MIB, &[]);
    let device = written.itself();
    let path = written.file();
    let flushed = |what: &str, change: &dyn Fn()| {
        let before = flushes(device);
        change();
        assert!(flushes(device) > before, "{what}: not flushed");
    };
    let file = written.open();
    let before = flushes(device);
    file.write_all_at(&[1; 4096], 0).expect("a write inside the file");
    assert_eq!(flushes(device), before, "a write without O_SYNC is not flushed");
    flushed("fsync", &|| file.sync_all().expect("the device is there"));
    flushed("fdatasync", &|| file.sync_data().expect("the device is there"));
    let reader = File::open(path).expect("it opens");
    flushed("fsync of a file that is open for reading", &|| reader.sync_all().expect("the device is there"));
    flushed("sync(1)", &|| drop(run("sync", [path])));
    for (name, flag) in [("O_SYNC", libc::O_SYNC), ("O_DSYNC", libc::O_DSYNC)] {
        let file = open_rw(path, flag);
        flushed(name, &|| file.write_all_at(&[2; 100], 5000).expect("a write inside the file"));
        flushed(name, &|| fallocate(&file, PUNCH, 4096, 4096).expect("a range inside the file"));
        let direct = open_rw(path, flag | libc::O_DIRECT);
        let buffer = vec![3; 8192];
        let aligned = &buffer[buffer.as_ptr().align_offset(4096)..][..4096];
        flushed(name, &|| direct.write_all_at(aligned, 8192).expect("a write inside the file"));
    }
    flushed("RWF_DSYNC", &|| {
        let bytes = [4_u8; 10];
        let part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: the kernel reads one iovec, and the ten bytes that it describes.
        let count = unsafe { libc::pwritev2(file.as_raw_fd(), &raw const part, 1, 100, libc::RWF_DSYNC) };
        assert_eq!(count, 10);
    });
    drop((file, reader));
    assert!(crate::common::wait_until(|| crate::claims::is_free(device)));
    let synchronous = crate::common::mount::Mount::with_options(device, &["-o", "rw,sync"]);
    let file = open_rw(synchronous.file(), 0);
    flushed("a mount with sync", &|| file.write_all_at(&[6; 4096], 0).expect("a write inside the file"));
    drop((file, synchronous));
    flushed("the last close", &|| {
        let file = written.open();
        file.write_all_at(&[5; 4096], 0).expect("a write inside the file");
        drop(file);
        let before = flushes(device);
        assert!(crate::common::wait_until(|| flushes(device) > before || crate::claims::is_free(device)));
    });
    written.check();
}

#[test]
fn direct_writes_need_no_alignment() {
    needs!(root);
    for (name, written) in each_kind(MIB) {
        let file = open_rw(written.file(), libc::O_DIRECT);
        let buffer = Random::new(5).bytes(32 * KIB);
        let start = buffer.as_ptr().align_offset(4096);
        for (skip, length, offset) in [(0, 4096, 0), (0, 8192, 4096), (1, 4096, 512), (3, 1000, 77), (512, 512, 99_999)]
        {
            let bytes = &buffer[start + skip..][..length];
            file.write_all_at(bytes, offset).unwrap_or_else(|error| panic!("{name}: {length} at {offset}: {error}"));
            let mut seen = vec![0; length];
            File::open(written.file()).and_then(|file| file.read_exact_at(&mut seen, offset)).expect("it can be read");
            assert!(seen == bytes, "{name}: {length} at {offset}");
        }
        drop(file);
        check_same_bytes(written.file(), written.itself());
    }
}

#[test]
fn asynchronous_writes() {
    needs!(root, programs["qemu-io"]);
    for (name, written) in each_kind(4 * MIB) {
        for aio in ["threads", "native", "io_uring"] {
            let write =
                "aio_write -P 0x5a 64k 1M; aio_write -P 0x5b 2M 512; aio_flush; aio_write -z 128k 64k; aio_flush";
            let commands: Vec<_> = write.split("; ").flat_map(|command| ["-c", command]).collect();
            let cache = if aio == "native" { "none" } else { "writeback" };
            let words = ["-n", "-f", "raw", "-i", aio, "-t", cache].into_iter().skip(1).chain(commands);
            let printed = run("qemu-io", words.map(AsRef::as_ref).chain([written.file().as_os_str()]));
            assert!(!printed.contains("rror"), "{name}, {aio}: {printed}");
            let bytes = fs::read(written.file()).expect("it can be read");
            let expected = |at: u64| match at / KIB {
                128..192 => 0,
                64..1088 => 0x5a,
                2048 if at < 2 * MIB + 512 => 0x5b,
                _ => 0,
            };
            let wrong = (0..4 * MIB).find(|&at| bytes[at as usize] != expected(at));
            assert_eq!(wrong, None, "{name}, {aio}");
            open_rw(written.file(), libc::O_TRUNC);
        }
        written.check();
    }
}

/// Stores to a shared mapping would stay in the page cache unseen, so there is none.
#[test]
fn files_that_are_open_for_writing_are_mapped_private_only() {
    needs!(root);
    let written = Writable::device(MIB, &[]);
    let file = written.open();
    file.write_all_at(&[7; 4096], 0).expect("a write inside the file");
    let first = |file: &File, protection, flags| {
        // SAFETY: a new mapping, which only this function uses, and which is taken away again.
        unsafe {
            let at = libc::mmap(std::ptr::null_mut(), 4096, protection, flags, file.as_raw_fd(), 0);
            if at == libc::MAP_FAILED {
                return Err(Errno::last());
            }
            let byte = at.cast::<u8>().read_volatile();
            libc::munmap(at, 4096);
            Ok(byte)
        }
    };
    let both = libc::PROT_READ | libc::PROT_WRITE;
    assert_eq!(first(&file, both, libc::MAP_SHARED), Err(Errno::ENODEV));
    assert_eq!(first(&file, libc::PROT_READ, libc::MAP_SHARED), Err(Errno::ENODEV));
    for value in [7, 8] {
        file.write_all_at(&[value; 4096], 0).expect("a write inside the file");
        assert_eq!(first(&file, both, libc::MAP_PRIVATE), Ok(value));
        let reader = File::open(written.file()).expect("it opens");
        assert_eq!(first(&reader, libc::PROT_READ, libc::MAP_SHARED), Ok(value));
        assert_eq!(first(&reader, both, libc::MAP_SHARED), Err(Errno::EACCES));
    }
}

#[test]
fn locks_work_and_nothing_but_contents_can_be_changed() {
    needs!(root, programs["chmod", "chown", "touch"]);
    let written = Writable::device(MIB, &[]);
    let path = written.file();
    let file = written.open();
    let other = written.open();
    let flock = |file: &File, operation: i32| {
        // SAFETY: the call takes two integers, and the descriptor is open.
        Errno::result(unsafe { libc::flock(file.as_raw_fd(), operation) }).map(drop)
    };
    assert_eq!(flock(&file, libc::LOCK_EX), Ok(()));
    assert_eq!(flock(&other, libc::LOCK_EX | libc::LOCK_NB), Err(Errno::EAGAIN));
    assert_eq!(flock(&file, libc::LOCK_UN), Ok(()));
    let lock = |file: &File| {
        let lock = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 100,
            l_pid: 0,
        };
        nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).map(drop)
    };
    assert_eq!(lock(&file), Ok(()));
    assert_eq!(lock(&other), Err(Errno::EAGAIN));
    let before = fs::metadata(path).expect("it has attributes");
    let refused = [
        ("chmod", fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))),
        ("chown", std::os::unix::fs::chown(path, Some(1), Some(1))),
        ("utimes", file.set_modified(std::time::SystemTime::UNIX_EPOCH)),
        ("unlink", fs::remove_file(path)),
        ("rename", fs::rename(path, written.mount.directory().join("new"))),
        ("link", fs::hard_link(path, written.mount.directory().join("new"))),
        ("symlink", std::os::unix::fs::symlink("x", written.mount.directory().join("new"))),
        ("mkdir", fs::create_dir(written.mount.directory().join("new"))),
        ("create", File::create(written.mount.directory().join("new")).map(drop)),
    ];
    for (name, result) in refused {
        assert_eq!(errno(result), Some(libc::EPERM), "{name}");
    }
    let name = std::ffi::CString::new(path.to_str().expect("text")).expect("no zero byte");
    // SAFETY: both are C strings, and no byte of the value is read for a length of 0.
    let set = unsafe { libc::setxattr(name.as_ptr(), c"user.x".as_ptr(), std::ptr::null(), 0, 0) };
    assert_eq!(Errno::result(set), Err(Errno::EOPNOTSUPP));
    let after = fs::metadata(path).expect("it has attributes");
    assert_eq!((before.permissions(), before.len()), (after.permissions(), after.len()));
    drop((file, other));
    let error =
        crate::common::try_run("cp", ["--remove-destination".as_ref(), "/dev/null".as_ref(), path.as_os_str()], "");
    assert!(error.as_ref().is_err_and(|error| error.contains("Operation not permitted")), "{error:?}");
}

/// With `direct_io`, readers bypass the page cache too.
#[test]
fn direct_io_and_rw_together() {
    needs!(root);
    let image = Image::new(MIB);
    let mount = crate::common::mount::Mount::with_options(image.path(), &["-o", "rw,direct_io"]);
    let (file, reader) = (open_rw(mount.file(), 0), File::open(mount.file()).expect("it opens"));
    let mut bytes = [0; 3];
    for value in 1..100 {
        file.write_all_at(&[value; 3], 4095).expect("a write inside the file");
        reader.read_exact_at(&mut bytes, 4095).expect("a read inside the file");
        assert_eq!(bytes, [value; 3]);
    }
}

/// A mount without `rw` is not written, whatever root does with its flags.
#[test]
fn a_mount_without_rw_stays_read_only() {
    needs!(root, programs["mount"]);
    let image = Image::new(MIB);
    for options in [&[][..], &["-o", "ro"], &["-o", "rw,ro"]] {
        let mount = crate::common::mount::Mount::with_options(image.path(), options);
        assert_eq!(errno(try_open(mount.file(), 0)), Some(libc::EROFS));
        let place = mount.directory();
        let flags = nix::mount::MsFlags::MS_REMOUNT;
        nix::mount::mount(None::<&str>, place, None::<&str>, flags, None::<&str>).expect("root may remount");
        assert_eq!(errno(try_open(mount.file(), 0)), Some(libc::EROFS), "remounted");
        assert_eq!(errno(fs::remove_file(mount.file())), Some(libc::EROFS), "remounted");
        assert_eq!(
            errno(OpenOptions::new().read(true).custom_flags(libc::O_TRUNC).open(mount.file())),
            Some(libc::EROFS)
        );
        let readable = flags | nix::mount::MsFlags::MS_RDONLY;
        nix::mount::mount(None::<&str>, place, None::<&str>, readable, None::<&str>).expect("root may remount");
    }
    let mount = crate::mount(image.path());
    let remount = |flags| {
        let flags = nix::mount::MsFlags::MS_REMOUNT | flags;
        nix::mount::mount(None::<&str>, mount.directory(), None::<&str>, flags, None::<&str>)
            .expect("root may remount");
    };
    remount(nix::mount::MsFlags::MS_RDONLY);
    assert_eq!(errno(try_open(mount.file(), 0)), Some(libc::EROFS));
    remount(nix::mount::MsFlags::empty());
    open_rw(mount.file(), 0).write_all_at(b"x", 0).expect("it is writable again");
}
