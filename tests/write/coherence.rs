//! Each open file, mapping and process gets every completed change at once.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::common::check::{map_holes, seek_data, seek_hole};
use crate::common::random::Random;
use crate::common::{KIB, MIB, needs, run, wait_until};
use crate::{PUNCH, Writable, each_kind, fallocate, links, open_rw};

/// A shared mapping of a file for reading.
struct Mapping {
    at: *mut libc::c_void,
    len: usize,
}

// SAFETY: the mapping is only read, and lives as long as this value.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, len: usize) -> Self {
        // SAFETY: a new mapping, which this value takes away again.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self { at, len }
    }

    fn number(&self, offset: u64) -> u64 {
        assert!(offset as usize + 8 <= self.len);
        // SAFETY: the eight bytes are inside the mapping, and aligned as the callers use multiples of eight.
        u64::from_le(unsafe { self.at.cast::<u8>().add(offset as usize).cast::<u64>().read_volatile() })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new`, and is not used after this.
        unsafe { libc::munmap(self.at, self.len) };
    }
}

/// Readers that have the file open see a write, a hole and a truncation as soon as the call has returned.
#[test]
fn open_readers_see_each_completed_change() {
    needs!(root, programs["dd", "cmp"]);
    const SIZE: u64 = 4 * MIB;
    for (name, written) in each_kind(SIZE) {
        let (file, reader) = (written.open(), File::open(written.file()).expect("it opens"));
        let (other, mapping) = (written.open(), Mapping::new(&reader, SIZE as usize));
        let mut random = Random::new(11);
        let mut model = vec![0; SIZE as usize];
        let mut seen = vec![0; SIZE as usize];
        for step in 0..60_u64 {
            reader.read_exact_at(&mut seen, 0).expect("a read inside the file");
            assert!(seen == model, "{name}: step {step}, before");
            let range = random.range(SIZE, [1, 512, 4096][step as usize % 3]);
            let (offset, len) = (range.start, range.end - range.start);
            let part = range.start as usize..range.end as usize;
            match step % 10 {
                3 | 6 => {
                    fallocate(&file, PUNCH, offset, len).expect("a range inside the file");
                    model[part.clone()].fill(0);
                }
                9 => {
                    file.set_len(0).expect("it is emptied");
                    model.fill(0);
                }
                _ => {
                    let bytes = random.bytes(len);
                    file.write_all_at(&bytes, offset).expect("a write inside the file");
                    model[part.clone()].copy_from_slice(&bytes);
                }
            }
            for (who, open) in [("reader", &reader), ("writer", &file), ("other writer", &other)] {
                let seen = &mut seen[part.clone()];
                open.read_exact_at(seen, offset).expect("a read inside the file");
                assert!(seen == &model[part.clone()], "{name}: step {step}, {who}, {range:?}");
            }
            let at = offset / 8 * 8;
            let expected = u64::from_le_bytes(model[at as usize..][..8].try_into().expect("eight bytes"));
            assert_eq!(mapping.number(at), expected, "{name}: step {step}, mapping at {at}");
        }
        // By another process.
        let words = ["if=/dev/urandom", "bs=1000", "count=100", "seek=11", "conv=notrunc", "status=none"];
        let output = format!("of={}", written.file().display());
        run("dd", words.iter().copied().chain([&*output]));
        run("cmp", [written.file(), written.itself()]);
        reader.read_exact_at(&mut seen, 0).expect("a read inside the file");
        assert!(seen == fs::read(written.itself()).expect("it can be read"), "{name}: after another process");
    }
}

/// A device with two names in a mount: a write by one name is seen by readers that have it open by the other one.
#[test]
fn a_write_by_one_name_is_seen_by_another_name() {
    needs!(root);
    let image = crate::common::image::Image::with_data(8 * MIB, &[0..8 * MIB]);
    let device = crate::common::loop_device::Loop::new(image.path());
    let (_nodes, _mount, file) = links(&[("one", device.path()), ("two", device.path())]);
    let (writer, reader) = (open_rw(&file("one"), 0), File::open(file("two")).expect("it opens"));
    let mapping = Mapping::new(&reader, MIB as usize);
    let mut seen = vec![0; 4096];
    for value in 1..50_u8 {
        for offset in [0, 123 * 4096, 4 * MIB] {
            // In order, so that the daemon reads ahead.
            for at in (0..MIB).step_by(64 << 10) {
                reader.read_exact_at(&mut seen, offset + at).expect("a read inside the file");
            }
            let ahead = offset + MIB + 8192;
            writer.write_all_at(&[value; 4096], offset).expect("a write inside the file");
            writer.write_all_at(&[value; 4096], ahead).expect("a write inside the file");
            reader.read_exact_at(&mut seen, offset).expect("a read inside the file");
            assert!(seen == [value; 4096], "at {offset}, {value}");
            reader.read_exact_at(&mut seen, ahead).expect("a read inside the file");
            assert!(seen == [value; 4096], "at {ahead}, {value}");
        }
        assert_eq!(mapping.number(0), u64::from_le_bytes([value; 8]));
        if value == 25 {
            writer.set_len(0).expect("it is emptied");
            assert_eq!(mapping.number(0), 0);
        }
    }
    let second = open_rw(&file("two"), 0);
    second.write_all_at(&[99; 10], 5).expect("two names are one claim");
    writer.read_exact_at(&mut seen, 0).expect("a read inside the file");
    assert_eq!(seen[5..15], [99; 10]);
}

/// One thread writes growing numbers, and others read them all the time, also in the middle of a write: none gets a number
/// below that of the last write that completed before its read began.
fn readers_are_never_behind(file: &Path, reads: impl Fn(u64) -> Vec<u64> + Sync, rounds: u64) {
    const LENGTH: u64 = 12 * KIB;
    let writer = open_rw(file, 0);
    let (completed, is_done) = (AtomicU64::new(0), AtomicBool::new(false));
    let start = Barrier::new(4);
    writer.write_all_at(&vec![0; MIB as usize], 0).expect("a write inside the file");
    thread::scope(|scope| {
        for reader in 0..3 {
            let (start, is_done, completed, reads) = (&start, &is_done, &completed, &reads);
            scope.spawn(move || {
                let mut random = Random::new(reader);
                start.wait();
                while !is_done.load(Ordering::SeqCst) {
                    let least = completed.load(Ordering::SeqCst);
                    let at = 64 * KIB + random.within(0..LENGTH / 8) * 8;
                    for number in reads(at) {
                        assert!(number >= least, "{number} at {at}, after {least} was written");
                    }
                }
            });
        }
        start.wait();
        for number in 1..=rounds {
            let bytes = number.to_le_bytes().repeat((LENGTH / 8) as usize);
            writer.write_all_at(&bytes, 64 * KIB).expect("a write inside the file");
            completed.store(number, Ordering::SeqCst);
        }
        is_done.store(true, Ordering::SeqCst);
    });
}

fn number(file: &File, at: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at).expect("a read inside the file");
    u64::from_le_bytes(bytes)
}

#[test]
fn readers_in_the_middle_are_never_behind() {
    needs!(root);
    for (_, written) in each_kind(2 * MIB) {
        let buffered = File::open(written.file()).expect("it opens");
        let mapping = Mapping::new(&buffered, MIB as usize);
        let writable = written.open();
        let reads = |at| vec![number(&buffered, at), mapping.number(at), number(&writable, at)];
        readers_are_never_behind(written.file(), reads, 1500);
        let fresh = |at| vec![number(&File::open(written.file()).expect("it opens"), at)];
        readers_are_never_behind(written.file(), fresh, 300);
    }
}

/// A reader that goes through the file in order is served from what was read ahead.
#[test]
fn what_was_read_ahead_is_not_used_after_a_write() {
    needs!(root);
    const SIZE: u64 = 16 * MIB;
    let written = Writable::device(SIZE, &[]);
    let writer = written.open();
    writer.write_all_at(&vec![1; SIZE as usize], 0).expect("a write inside the file");
    let mut random = Random::new(7);
    for value in 2..12_u8 {
        let reader = File::open(written.file()).expect("it opens");
        let mut seen = vec![0; 64 << 10];
        let mut at = 0;
        while at < SIZE {
            if random.one_in(4) {
                // Before, at or behind what is read next.
                let target = (at + random.within(0..2 * MIB)).min(SIZE - 5000);
                writer.write_all_at(&[value; 5000], target).expect("a write inside the file");
                reader.read_exact_at(&mut seen[..5000], target).expect("a read inside the file");
                assert!(seen[..5000].iter().all(|&byte| byte == value), "at {target}, {value}");
            }
            reader.read_exact_at(&mut seen, at).expect("a read inside the file");
            at += seen.len() as u64;
        }
    }
    written.check();
}

/// Several writers at once, each with bytes of its own in the same sectors.
#[test]
fn parallel_writers_of_neighbouring_bytes() {
    needs!(root);
    const WRITERS: u64 = 6;
    const PIECE: u64 = 301;
    const SIZE: u64 = MIB;
    for (name, written) in each_kind(SIZE) {
        let pieces = SIZE / PIECE;
        thread::scope(|scope| {
            for writer in 0..WRITERS {
                let path = written.file();
                scope.spawn(move || {
                    let flags = if writer % 2 == 0 { libc::O_DIRECT } else { 0 };
                    let file = open_rw(path, flags);
                    for piece in (0..pieces).filter(|piece| piece % WRITERS == writer) {
                        let bytes = Random::new(piece).bytes(PIECE);
                        file.write_all_at(&bytes, piece * PIECE).expect("a write inside the file");
                        let mut seen = vec![0; PIECE as usize];
                        file.read_exact_at(&mut seen, piece * PIECE).expect("a read inside the file");
                        assert!(seen == bytes, "piece {piece}");
                    }
                });
            }
        });
        let bytes = fs::read(written.file()).expect("it can be read");
        for piece in 0..pieces {
            let seen = &bytes[(piece * PIECE) as usize..][..PIECE as usize];
            assert!(seen == Random::new(piece).bytes(PIECE), "{name}: piece {piece}");
        }
        written.check();
    }
}

/// Waits until the clock of the times of files has moved on: a second change within one tick has the same time.
fn next_tick() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let time = || {
        fs::write(file.path(), "x").expect("the file is ours");
        file.as_file().metadata().and_then(|shown| shown.modified()).expect("it has a time")
    };
    let before = time();
    assert!(wait_until(|| time() > before));
}

/// The modification time moves with each change and only then, and the size never.
#[test]
fn attributes_follow_writes() {
    needs!(root);
    for (name, written) in each_kind(MIB) {
        let file = written.open();
        let times = || {
            let shown = fs::metadata(written.file()).expect("it has attributes");
            assert_eq!(shown.len(), MIB, "{name}");
            (shown.mtime(), shown.mtime_nsec())
        };
        // The times of a loop device may move once more after a change, when its image is written back.
        let settled = || {
            let mut last = times();
            let is_settled = wait_until(|| {
                next_tick();
                std::mem::replace(&mut last, times()) == times()
            });
            assert!(is_settled, "{name}: the times move without a change");
            last
        };
        let mut before = settled();
        let mut moves = |what: &str, change: &dyn Fn()| {
            change();
            let after = times();
            assert!(after > before, "{name}: {what}: {after:?} is not after {before:?}");
            before = settled();
        };
        moves("write", &|| file.write_all_at(&[1; 4096], 0).expect("a write inside the file"));
        moves("the same write", &|| file.write_all_at(&[1; 4096], 0).expect("a write inside the file"));
        moves("a byte", &|| file.write_all_at(&[1], 9999).expect("a write inside the file"));
        moves("a hole", &|| fallocate(&file, PUNCH, 0, 4096).expect("a range inside the file"));
        moves("truncation", &|| file.set_len(0).expect("it is emptied"));
        let reader = File::open(written.file()).expect("it opens");
        let before = settled();
        reader.read_exact_at(&mut [0; 100], 0).expect("a read inside the file");
        file.set_len(MIB).expect("its own length");
        assert_eq!(times(), before, "{name}: reads and its own length change nothing");
    }
}

/// Holes and data right after each write, exact at their ends.
#[test]
fn seeks_follow_each_write() {
    needs!(root);
    for (name, written) in each_kind(4 * MIB) {
        let (file, reader) = (written.open(), File::open(written.file()).expect("it opens"));
        assert_eq!(seek_data(&file, 0), None, "{name}");
        for block in [1_u64, 17, 500, 1023] {
            let (start, end) = (block * 4096, block * 4096 + 4096);
            file.write_all_at(&[1; 10], start + 100).expect("a write inside the file");
            for open in [&file, &reader] {
                assert_eq!(seek_data(open, 0), Some(start), "{name}");
                assert_eq!(seek_data(open, start), Some(start), "{name}");
                assert_eq!(seek_data(open, end - 1), Some(end - 1), "{name}");
                assert_eq!(seek_data(open, end), None, "{name}");
                assert_eq!(seek_hole(open, start - 1), Some(start - 1), "{name}");
                assert_eq!(seek_hole(open, start), Some(end), "{name}");
            }
            fallocate(&file, PUNCH, start, 4096).expect("a range inside the file");
            assert_eq!((seek_data(&file, 0), seek_hole(&reader, start)), (None, Some(start)), "{name}");
        }
        assert_eq!(map_holes(written.file()).len(), 1, "{name}");
    }
}

/// A reader with O_DIRECT gets no page of the mount's cache either.
#[test]
fn direct_readers_see_each_write() {
    needs!(root);
    let written = Writable::device(MIB, &[]);
    let writer = written.open();
    let reader = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(written.file()).expect("it opens");
    let mut buffer = vec![0; 8192];
    let start = buffer.as_ptr().align_offset(4096);
    for value in 1..200 {
        writer.write_all_at(&[value; 100], 5000).expect("a write inside the file");
        let page = &mut buffer[start..][..4096];
        reader.read_exact_at(page, 4096).expect("a read inside the file");
        assert_eq!(page[904..1004], [value; 100]);
    }
}
