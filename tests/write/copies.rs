//! copy_file_range(2), sendfile(2) and splice(2).

use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;

use crate::common::check::{assert_map, check, map_of};
use crate::common::image::Image;
use crate::common::loop_device::Loop;
use crate::common::random::Random;
use crate::common::{KIB, MIB, needs};
use crate::{Writable, each_kind, links};

/// One call of copy_file_range(2).
fn copy(from: &File, from_offset: u64, to: &File, to_offset: u64, len: u64) -> Result<u64, Errno> {
    let (mut from_offset, mut to_offset) = (from_offset.cast_signed(), to_offset.cast_signed());
    let len = usize::try_from(len).expect("a length in memory");
    // SAFETY: both offsets are read and written by the call, and both descriptors are open.
    let copied = unsafe {
        libc::copy_file_range(from.as_raw_fd(), &raw mut from_offset, to.as_raw_fd(), &raw mut to_offset, len, 0)
    };
    Errno::result(copied).map(|copied| u64::try_from(copied).expect("not negative"))
}

fn copy_all(from: &File, from_offset: u64, to: &File, to_offset: u64, len: u64) {
    let mut done = 0;
    while done < len {
        let copied = copy(from, from_offset + done, to, to_offset + done, len - done).expect("ranges inside the files");
        assert_ne!(copied, 0, "at {done} of {len}");
        done += copied;
    }
}

#[test]
fn between_two_devices_holes_stay_holes() {
    needs!(root);
    const SIZE: u64 = 80 * MIB;
    let data = [0..64 * KIB, 33 * MIB..33 * MIB + 4096, SIZE - 8192..SIZE];
    let (source, target) = (Image::with_data(SIZE, &data), Image::with_data(SIZE, &[20 * MIB..40 * MIB]));
    let (source, target) = (Loop::new(source.path()), (Loop::new(target.path()), target));
    let (_nodes, _mount, file) = links(&[("source", source.path()), ("target", target.0.path())]);
    let from = File::open(file("source")).expect("it opens");
    let to = crate::open_rw(&file("target"), 0);
    let stale = fs::read(file("target")).expect("it can be read");
    assert!(stale[30 << 20..31 << 20].iter().all(|&byte| byte != 0));
    copy_all(&from, 0, &to, 0, SIZE);
    assert_map(&file("target"), &map_of(SIZE, &data));
    check(&file("target"), source.path());
    check(&file("target"), target.0.path());
}

#[test]
fn between_ranges_of_one_file() {
    needs!(root);
    const SIZE: u64 = 4 * MIB;
    for (name, written) in each_kind(SIZE) {
        let file = written.open();
        let mut model = vec![0; SIZE as usize];
        let bytes = Random::new(3).bytes(MIB);
        file.write_all_at(&bytes, 77).expect("a write inside the file");
        model[77..77 + MIB as usize].copy_from_slice(&bytes);
        for (from, to, len) in
            [(77, 2 * MIB + 5, MIB), (3, 500, 400), (MIB, 3 * MIB + 1, 99_999), (3 * MIB, 100, 64 * KIB)]
        {
            copy_all(&file, from, &file, to, len);
            let Range { start, end } = from as usize..(from + len) as usize;
            model.copy_within(start..end, to as usize);
            assert!(fs::read(written.file()).expect("it can be read") == model, "{name}: {len} from {from} to {to}");
        }
        assert_eq!(copy(&file, 0, &file, 100, 200), Err(Errno::EINVAL), "{name}: ranges that overlap");
        assert_eq!(copy(&file, 0, &file, SIZE, 200), Err(Errno::ENOSPC), "{name}: to the end");
        assert_eq!(copy(&file, 0, &file, SIZE - 50, 200), Ok(50), "{name}: across the end");
        assert_eq!(copy(&file, SIZE, &file, 0, 200), Ok(0), "{name}: from the end");
        assert_eq!(copy(&file, SIZE - 20, &file, 0, 200), Ok(20), "{name}: from before the end");
        let reader = File::open(written.file()).expect("it opens");
        assert_eq!(copy(&file, 0, &reader, MIB, 200), Err(Errno::EBADF), "{name}: open for reading");
        written.check();
    }
}

#[test]
fn sendfile_and_splice_into_a_file() {
    needs!(root);
    let bytes = Random::new(4).bytes(MIB + 100);
    let source = Image::new(MIB + 100);
    fs::write(source.path(), &bytes).expect("the image is ours");
    let from = File::open(source.path()).expect("it opens");
    for (name, written) in each_kind(2 * MIB) {
        let file = written.open();
        let mut offset = 0;
        while (offset as usize) < bytes.len() {
            // SAFETY: the call reads and writes the offset, and both descriptors are open.
            let sent = unsafe {
                libc::sendfile(file.as_raw_fd(), from.as_raw_fd(), &raw mut offset, bytes.len() - offset as usize)
            };
            assert!(sent > 0, "{name}: {}", Errno::last());
        }
        assert!(fs::read(written.file()).expect("it can be read")[..bytes.len()] == bytes, "{name}: sendfile");

        let (output, input) = nix::unistd::pipe().expect("descriptors");
        assert_eq!(nix::unistd::write(&input, &bytes[..5000]), Ok(5000));
        let mut at = MIB.cast_signed() + 3;
        // SAFETY: the call reads and writes the offset, and both descriptors are open.
        let moved =
            unsafe { libc::splice(output.as_raw_fd(), std::ptr::null_mut(), file.as_raw_fd(), &raw mut at, 5000, 0) };
        assert_eq!(moved, 5000, "{name}: {}", Errno::last());
        let seen = fs::read(written.file()).expect("it can be read");
        assert!(seen[MIB as usize + 3..][..5000] == bytes[..5000], "{name}: splice");
        written.check();
    }
}

/// A file on another file system is copied too, by the kernel through its page cache or by the program.
#[test]
fn from_another_file_system() {
    needs!(root, programs["cp"]);
    let source = Image::with_data(2 * MIB, &[MIB..MIB + 4096]);
    let written = Writable::device(2 * MIB, &[]);
    crate::common::run("cp", [source.path(), written.file()]);
    assert_map(written.file(), &map_of(2 * MIB, &[MIB..MIB + 4096]));
    check(written.file(), source.path());
}
