//! Ordinary programs on a mounted loop device: copies are identical and sparse, and the holes are not read.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

use std::fs;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::check::{Extent, Kind, check_same_bytes, map_holes, open};
use common::fuse_image::FuseImage;
use common::loop_device::Loop;
use common::mount::{LoopMount, Mount};
use common::{KIB, MIB, needs, run, wait_until};

const SIZE: u64 = 1024 * MIB;
const DATA: [Range<u64>; 5] = [
    0..64 * KIB,
    4 * MIB..4 * MIB + 4 * KIB,
    100 * MIB..102 * MIB,
    600 * MIB + 12 * KIB..601 * MIB,
    SIZE - 8 * KIB..SIZE,
];

/// The bytes that a client may read or write in addition to the data: the kernel's read-ahead around each extent, and its own
/// headers. A client with several threads has a read-ahead of up to 2 MiB behind each extent, in several places of it.
const TOLERANCE: u64 = 16 * MIB;

struct Source {
    source: LoopMount,
    scratch: tempfile::TempDir,
    read_before: u64,
}

impl Source {
    fn new() -> Self {
        let source = LoopMount::new(SIZE, &DATA);
        // The writes of the fixture are only in the page cache of the image. Reads of the device are counted from here.
        run("blockdev", ["--flushbufs".as_ref(), source.device.path().as_os_str()]);
        let scratch = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
        let read_before = source.device.bytes_read();
        Self { source, scratch, read_before }
    }

    fn file(&self) -> &str {
        self.source.file().to_str().expect("temporary paths are text")
    }

    /// A path for output of the client.
    fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn check_skipped_holes(&self) {
        let data: u64 = DATA.iter().map(|range| range.end - range.start).sum();
        let read = self.source.device.bytes_read() - self.read_before;
        assert!(read >= data / 2, "{read} bytes read of {data}: fewer bytes than expected were read from the device");
        assert!(read <= data + TOLERANCE, "{read} bytes read for {data} of data");
    }

    /// Asserts that no hole was read, and that the copy equals the device and is sparse.
    fn check_copy(&self, copy: &Path) {
        self.check_skipped_holes();
        self.check_copied(copy);
    }

    fn check_copied(&self, copy: &Path) {
        check_same_bytes(copy, self.source.device.path());
        check_small(copy);
    }
}

fn check_small(path: &Path) {
    let data: u64 = DATA.iter().map(|range| range.end - range.start).sum();
    let stored = fs::metadata(path).expect("the client made it").blocks() * 512;
    assert!(stored <= data + TOLERANCE, "{} takes {stored} bytes for {data} of data", path.display());
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

#[test]
fn cp_makes_a_sparse_identical_copy() {
    needs!(root);
    for sparse in ["--sparse=always", "--sparse=auto"] {
        let source = Source::new();
        let copy = source.scratch("copy");
        run("cp", [sparse, source.file(), text(&copy)]);
        source.check_copy(&copy);
    }
}

#[test]
fn gnu_tar_makes_a_sparse_identical_copy() {
    needs!(root);
    let source = Source::new();
    let (archive, copies) = (source.scratch("archive.tar"), source.scratch("copies"));
    let name = source.source.device.name();
    run("tar", ["-cSf", text(&archive), "-C", text(source.source.mount.directory()), name]);
    source.check_skipped_holes();
    check_small(&archive);
    fs::create_dir(&copies).expect("scratch is ours");
    run("tar", ["-xSf", text(&archive), "-C", text(&copies)]);
    source.check_copied(&copies.join(name));
}

#[test]
fn bsdtar_makes_a_sparse_identical_copy() {
    needs!(root, programs["bsdtar"]);
    let source = Source::new();
    let (archive, copies) = (source.scratch("archive.tar"), source.scratch("copies"));
    let name = source.source.device.name();
    run("bsdtar", ["-cf", text(&archive), "-C", text(source.source.mount.directory()), name]);
    source.check_skipped_holes();
    check_small(&archive);
    fs::create_dir(&copies).expect("scratch is ours");
    run("bsdtar", ["-xSf", text(&archive), "-C", text(&copies)]);
    source.check_copied(&copies.join(name));
}

#[test]
fn qemu_img_convert_makes_a_sparse_identical_copy() {
    needs!(root, programs["qemu-img"]);
    // Buffered and with O_DIRECT. With O_DIRECT, qemu-img aborts if a hole is not aligned.
    for cache in ["writeback", "none"] {
        let source = Source::new();
        let copy = source.scratch("copy");
        run("qemu-img", ["convert", "-f", "raw", "-O", "raw", "-T", cache, source.file(), text(&copy)]);
        source.check_copy(&copy);
        let compared = run("qemu-img", ["compare", "-f", "raw", "-F", "raw", "-T", cache, source.file(), text(&copy)]);
        assert_eq!(compared, "Images are identical.\n");
    }
}

/// The start and the length of each range that is data in `list`.
fn json_extents(list: &str, length: &str, is_data: impl Fn(&serde_json::Value) -> bool) -> Vec<Extent> {
    let list: serde_json::Value = serde_json::from_str(list).expect("JSON");
    let number = |entry: &serde_json::Value, key: &str| entry[key].as_u64().expect("a number");
    let mut extents: Vec<Extent> = Vec::new();
    for entry in list.as_array().expect("a list") {
        let start = number(entry, if length == "size" { "offset" } else { "start" });
        let kind = if is_data(entry) { Kind::Data } else { Kind::Hole };
        extents.push(Extent(kind, start..start + number(entry, "length")));
    }
    extents
}

#[test]
fn qemu_img_map_reports_the_holes_of_the_image() {
    needs!(root, programs["qemu-img"]);
    let source = Source::new();
    let list = run("qemu-img", ["map", "-f", "raw", "--output=json", source.file()]);
    let map = json_extents(&list, "length", |entry| entry["data"] == true);
    assert_eq!(map, map_holes(source.source.image.path()));
}

#[test]
fn nbdkit_serves_the_holes_of_the_image() {
    needs!(root, programs["nbdkit", "nbdinfo"]);
    let source = Source::new();
    let list = run("nbdkit", ["-r", "-U", "-", "file", source.file(), "--run", "nbdinfo --map --json \"$uri\""]);
    let map = json_extents(&list, "size", |entry| entry["type"] == 0);
    assert_eq!(map, map_holes(source.source.image.path()));
}

#[test]
fn nbdcopy_makes_a_sparse_identical_copy() {
    needs!(root, programs["nbdcopy"]);
    let source = Source::new();
    let copy = source.scratch("copy");
    run("nbdcopy", [source.file(), text(&copy)]);
    source.check_copy(&copy);
}

/// Reads each extent of a file as bmaptool does, which mixes reads through Python's buffer with seeks on the
/// descriptor, and prints what it read.
const PYTHON_READER: &str = r#"
import hashlib, os, sys
digest, file = hashlib.sha256(), open(sys.argv[1], "rb")
end = os.fstat(file.fileno()).st_size
hole = 0
while hole < end:
    try:
        data = os.lseek(file.fileno(), hole, os.SEEK_DATA)
    except OSError:
        break
    hole = os.lseek(file.fileno(), data, os.SEEK_HOLE)
    file.seek(data)
    left = hole - data
    while left:
        chunk = file.read(min(left, 1 << 20))
        digest.update(chunk)
        left -= len(chunk)
print(digest.hexdigest())
"#;

/// Python uses `st_blksize` as the size of its buffer. If the buffer is larger than an extent, the position of the
/// descriptor differs from that of the reader.
#[test]
fn python_can_mix_buffered_reads_and_seeks_on_the_descriptor() {
    needs!(root, programs["python3"]);
    let data: Vec<_> = (0..64).map(|n| n * 128 * KIB..n * 128 * KIB + (n % 7 + 1) * 4 * KIB).collect();
    let source = LoopMount::new(64 * 128 * KIB, &data);
    let read = |path: &Path| run("python3", ["-c", PYTHON_READER, text(path)]);
    assert_eq!(read(source.file()), read(source.image.path()));
}

/// The files have no extended attributes, and programs that list them report no error.
#[test]
fn tar_cp_and_python_find_no_extended_attributes() {
    needs!(root, programs["python3"]);
    let source = Source::new();
    let archive = source.scratch("archive.tar");
    let (directory, name) = (source.source.mount.directory(), source.source.device.name());
    let words = ["--xattrs", "--acls", "--selinux", "-cSf", text(&archive), "-C", text(directory), name];
    let output = Command::new("tar").args(words).output().expect("tar starts");
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && messages.is_empty(), "{messages}");
    source.check_skipped_holes();
    let copy = source.scratch("copy");
    run("cp", ["--archive", "--preserve=xattr", source.file(), text(&copy)]);
    source.check_copied(&copy);
    let listed = run("python3", ["-c", "import os, sys; print(os.listxattr(sys.argv[1]))", source.file()]);
    assert_eq!(listed, "[]\n");
}

/// Any number of reads that wait for one device hold bounded memory, and reads of another device do not wait for them.
#[test]
fn waiting_reads_use_bounded_memory() {
    const READERS: u64 = 192;
    needs!(root);
    let image = FuseImage::new(READERS * MIB);
    let device = Loop::new(image.path());
    // With this option, each read of a client is one request. Without it, at most sixteen requests wait.
    let mount = Mount::with_options(device.path(), &["-o", "direct_io"]);
    let file = open(mount.file());
    let other = LoopMount::new(4 * MIB, &[0..4 * MIB]);
    let status = |key: &str| {
        let text = fs::read_to_string(format!("/proc/{}/status", mount.pid())).expect("the daemon runs");
        let line = text.lines().find_map(|line| line.strip_prefix(key)).expect("proc(5) has it");
        line.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()).expect("a number")
    };
    let blocked = image.block_reads();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|n| {
                let file = &file;
                scope.spawn(move || file.read_exact_at(&mut vec![1; 1 << 20], n * MIB).expect("the device answers"))
            })
            .collect();
        let all_wait = wait_until(|| status("Threads:") >= READERS);
        let others = fs::read(other.file());
        drop(blocked);
        assert!(all_wait && others.expect("the other device can be read").len() as u64 == 4 * MIB);
        readers.into_iter().for_each(|reader| reader.join().expect("the reader succeeds"));
    });
    // The peak in KiB. The reads of one device may use 16 MiB.
    assert!(status("VmHWM:") < 64 << 10, "{} KiB for {READERS} reads of 1 MiB", status("VmHWM:"));
}

#[test]
fn du_reports_the_data_and_reads_nothing() {
    needs!(root);
    let source = Source::new();
    let data: u64 = DATA.iter().map(|range| range.end - range.start).sum();
    let words = |options: &[&str]| {
        let printed = run("du", options.iter().copied().chain([source.file()]));
        printed.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()).expect("du prints a number")
    };
    assert_eq!(words(&["--bytes"]), SIZE);
    assert!(words(&["--block-size=1"]).abs_diff(data) <= 64 * KIB);
    assert_eq!(source.source.device.bytes_read() - source.read_before, 0, "du reads nothing");
}

#[test]
fn borg_makes_a_sparse_identical_copy() {
    needs!(root, programs["borg"]);
    let source = Source::new();
    let repository = source.scratch("repository");
    let copies = source.scratch("copies");
    fs::create_dir(&copies).expect("scratch is ours");
    let base = format!("BORG_BASE_DIR={}", text(&source.scratch("base")));
    let borg = |directory: &Path, arguments: &[&str]| {
        let environment = ["-C", text(directory), &base, "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes", "borg"];
        run("env", environment.iter().chain(arguments))
    };
    borg(&copies, &["init", "--encryption=none", text(&repository)]);
    let archive = format!("{}::device", text(&repository));
    let name = source.source.device.name();
    let create = ["create", "--sparse", "--chunker-params=fixed,65536", &archive, name];
    borg(source.source.mount.directory(), &create);
    source.check_skipped_holes();
    borg(&copies, &["extract", "--sparse", &archive]);
    source.check_copied(&copies.join(name));
}
