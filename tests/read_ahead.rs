//! Extents that are fetched ahead of a client: their bytes are no older than the open, and clients that cannot use them get
//! none.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::check::{open, seek_data, seek_hole};
use common::image::Image;
use common::loop_device::Loop;
use common::mount::{LoopMount, Mount};
use common::nbd::{Server, directory, image};
use common::random::{Length, Random};
use common::{MIB, needs, run};

const EXTENT: u64 = 64 << 10;
const EXTENTS: u64 = 64;
const SIZE: u64 = EXTENTS * MIB;
const PAGE: usize = 4096;

/// An image whose first 64 KiB of each MiB are data.
fn source() -> LoopMount {
    let data: Vec<_> = (0..EXTENTS).map(|index| index * MIB..index * MIB + EXTENT).collect();
    LoopMount::new(SIZE, &data)
}

/// A range of the size of an extent at which each page begins with `version`.
fn stamped(version: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(EXTENT).unwrap()];
    bytes.chunks_mut(PAGE).for_each(|page| page[..8].copy_from_slice(&version.to_ne_bytes()));
    bytes
}

/// Writes `version` to all extents of a device, through its page cache.
fn stamp(device: &File, version: u64) {
    let bytes = stamped(version);
    (0..EXTENTS).for_each(|index| device.write_all_at(&bytes, index * MIB).expect("a write inside the device"));
}

/// The versions in the pages of a buffer.
fn versions(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks(PAGE).map(|page| u64::from_ne_bytes(page[..8].try_into().expect("eight bytes")))
}

/// Reads the extents of a file in order, as a program does that copies a sparse file; calls `check` with each.
fn walk(file: &File, buffer: &mut [u8], mut check: impl FnMut(u64, &[u8])) {
    let mut at = 0;
    while let Some(data) = seek_data(file, at) {
        let end = seek_hole(file, data).expect("data ends before the end of the file, or there");
        let mut start = data;
        while start < end {
            let len = usize::try_from(end - start).unwrap().min(buffer.len());
            file.read_exact_at(&mut buffer[..len], start).expect("the file can be read");
            check(start, &buffer[..len]);
            start += len as u64;
        }
        at = end;
    }
}

fn writable(device: &Path) -> File {
    OpenOptions::new().write(true).open(device).expect("the device opens for writing")
}

#[test]
fn what_was_fetched_for_an_open_is_not_seen_through_a_later_open() {
    needs!(root);
    let source = source();
    let device = writable(source.device.path());
    let mut buffer = vec![0; usize::try_from(EXTENT).unwrap()];
    for version in 1..60 {
        let earlier = open(source.file());
        stamp(&device, version);
        // The first half: then the other half is being fetched.
        let mut reads = 0;
        for index in 0..EXTENTS / 2 {
            assert_eq!(seek_data(&earlier, index * MIB), Some(index * MIB));
            earlier.read_exact_at(&mut buffer, index * MIB).unwrap();
            reads += 1;
        }
        assert_eq!(reads, EXTENTS / 2);
        stamp(&device, 1000 + version);
        let later = open(source.file());
        walk(&later, &mut buffer, |at, bytes| {
            assert!(versions(bytes).all(|found| found == 1000 + version), "bytes at {at} are older than the open");
        });
        walk(&earlier, &mut buffer, |at, bytes| {
            assert!(versions(bytes).all(|found| found == 1000 + version), "pages at {at} that the later open read");
        });
    }
}

#[test]
fn no_client_gets_bytes_that_are_older_than_its_open_while_writers_write() {
    needs!(root);
    let source = source();
    let device = writable(source.device.path());
    stamp(&device, 1);
    let (completed, done, walks) = (AtomicU64::new(1), AtomicBool::new(false), AtomicU64::new(0));
    let reader = |buffer_len: usize| {
        let mut buffer = vec![0; buffer_len];
        while !done.load(Ordering::SeqCst) {
            let before = completed.load(Ordering::SeqCst);
            let file = open(source.file());
            walk(&file, &mut buffer, |at, bytes| {
                let oldest = versions(bytes).min().expect("the extent is not empty");
                assert!(oldest >= before, "version {oldest} at {at}, and {before} was complete before the open");
            });
            walks.fetch_add(1, Ordering::SeqCst);
        }
    };
    thread::scope(|scope| {
        let readers = [4096, 16 << 10, 64 << 10].map(|len| scope.spawn(move || reader(len)));
        let mut version = 1;
        for _ in Length::rounds(300).numbers() {
            version += 1;
            stamp(&device, version);
            completed.store(version, Ordering::SeqCst);
        }
        common::assert_becomes(&true, || walks.load(Ordering::SeqCst) >= 3);
        done.store(true, Ordering::SeqCst);
        readers.into_iter().for_each(|reader| reader.join().expect("no bytes are too old"));
    });
}

#[test]
fn a_client_with_o_direct_gets_each_write_at_once() {
    needs!(root);
    let source = source();
    let device = writable(source.device.path());
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(source.file()).unwrap();
    let cached = open(source.file());
    let mut buffer = vec![0; usize::try_from(EXTENT).unwrap() + PAGE];
    let aligned = buffer.as_ptr().align_offset(PAGE);
    for version in 1..20 {
        for index in 0..EXTENTS {
            // The other client has the extents fetched.
            cached.read_exact_at(&mut [0; 512], index * MIB).unwrap();
            device.write_all_at(&stamped(version * EXTENTS + index), index * MIB).unwrap();
            assert_eq!(seek_data(&direct, index * MIB), Some(index * MIB));
            let place = &mut buffer[aligned..][..usize::try_from(EXTENT).unwrap()];
            direct.read_exact_at(place, index * MIB).unwrap();
            assert!(versions(place).all(|found| found == version * EXTENTS + index), "at {index}");
        }
    }
}

#[test]
fn with_direct_io_each_read_gets_each_write_at_once() {
    needs!(root);
    let image = Image::with_data(SIZE, &[0..SIZE]);
    let device = Loop::new(image.path());
    let mount = Mount::with_options(device.path(), &["-o", "direct_io"]);
    let (file, writer) = (open(mount.file()), writable(device.path()));
    let mut buffer = vec![0; usize::try_from(EXTENT).unwrap()];
    for version in 1..1000_u64 {
        let at = version % EXTENTS * EXTENT;
        writer.write_all_at(&stamped(version), at).unwrap();
        file.read_exact_at(&mut buffer, at).unwrap();
        assert!(versions(&buffer).all(|found| found == version), "at {at}");
    }
}

#[test]
fn reads_at_random_offsets_read_no_more_of_the_device() {
    needs!(root);
    let image = Image::with_data(SIZE, &[0..SIZE]);
    let read = |options: &[&str]| {
        let device = Loop::new(image.path());
        let mount = Mount::with_options(device.path(), options);
        let file = open(mount.file());
        nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
        let before = device.bytes_read();
        let mut random = Random::new(1);
        for _ in 0..2000 {
            file.read_exact_at(&mut [0; PAGE], random.within(0..SIZE / PAGE as u64) * PAGE as u64).unwrap();
        }
        device.bytes_read() - before
    };
    let (without, with) = (read(&["-o", "read_ahead=0"]), read(&[]));
    assert!(without > 0 && with <= without, "{with} bytes with reading ahead, {without} without");
}

#[test]
fn a_device_can_be_detached_as_soon_as_a_client_in_the_midst_of_it_has_closed() {
    needs!(root, programs["losetup"]);
    for _ in 0..20 {
        let source = source();
        let file = open(source.file());
        let mut buffer = vec![0; usize::try_from(EXTENT).unwrap()];
        for index in 0..8 {
            seek_data(&file, index * MIB);
            file.read_exact_at(&mut buffer, index * MIB).unwrap();
        }
        drop(file);
        // A device that is still open would be detached only later (autoclear).
        common::assert_becomes(&false, || source.mount.has_open(source.device.path()));
    }
}

/// The largest number of reads that a server had in progress at the same time, from the log of nbdkit's filter `log`.
fn most_at_once(log: &Path) -> usize {
    let text = fs::read_to_string(log).expect("the server has a log");
    let (mut now, mut most) = (0_usize, 0);
    for line in text.lines() {
        if line.contains("...Read ") {
            now = now.saturating_sub(1);
        } else if line.contains(" Read id=") {
            now += 1;
            most = most.max(now);
        }
    }
    most
}

#[test]
fn extents_of_a_slow_server_are_fetched_several_at_a_time_for_programs_that_read_one() {
    needs!(root, programs["nbdkit", "cp", "tar", "sh"]);
    let directory = directory();
    let disk = directory.path().join("disk");
    let blocks: Vec<_> = (0..EXTENTS).map(|index| index * 256..index * 256 + 16).collect();
    image(&disk, SIZE, &blocks);
    for (program, command) in [("cp", "cp --sparse=always $1 $2"), ("tar", "tar -C ${1%/*} -Scf - ${1##*/} > $2")] {
        let (socket, log) = (directory.path().join(program), directory.path().join(format!("{program}.log")));
        let log_word = format!("logfile={}", log.display());
        let words =
            ["-r", "--filter=log", "--filter=delay", "file", disk.to_str().unwrap(), "rdelay=50ms", log_word.as_str()];
        let _server = Server::nbdkit(&socket, &words);
        let uri = format!("nbd+unix:///disk?socket={}", socket.display());
        let mount = Mount::new(uri.as_ref());
        let (file, copy) = (mount.directory().join("disk"), directory.path().join("copy"));
        run("sh", ["-c".as_ref(), command.as_ref(), "sh".as_ref(), file.as_os_str(), copy.as_os_str()]);
        if program == "cp" {
            assert!(fs::read(&copy).unwrap() == fs::read(&disk).unwrap());
        }
        let most = most_at_once(&log);
        assert!(most >= 6, "{program}: {most} reads at once");
    }
}

#[test]
fn a_loop_device_with_direct_reads_of_a_file_gets_each_write_at_once() {
    needs!(root, programs["losetup"]);
    let source = source();
    let device = writable(source.device.path());
    let upper = Loop::with_options(source.file(), &["--read-only"]);
    // The kernel sets this for its own reads, and leaves the flags of the open file as they are.
    upper.losetup(&["--direct-io=on"]);
    let is_direct = fs::read_to_string(format!("/sys/block/{}/loop/dio", upper.name())).expect("the device is bound");
    assert_eq!(is_direct.trim(), "1", "the kernel reads the file directly");
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(upper.path()).unwrap();
    let mut buffer = vec![0; usize::try_from(EXTENT).unwrap() + PAGE];
    let aligned = buffer.as_ptr().align_offset(PAGE);
    let place = &mut buffer[aligned..][..usize::try_from(EXTENT).unwrap()];
    for version in 1..200_u64 {
        let at = version % (SIZE / EXTENT) * EXTENT;
        device.write_all_at(&stamped(version), at).unwrap();
        file.read_exact_at(place, at).unwrap();
        assert!(versions(place).all(|found| found == version), "at {at}");
    }
    drop(file);
}
