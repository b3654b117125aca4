//! Ordinary programs on a mounted loop device: copies are identical and sparse, and the holes are not read.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use common::check::{Extent, Kind, check_same_bytes, map_holes};
use common::mount::LoopMount;
use common::{KIB, MIB, requires, requires_root, run};

const SIZE: u64 = 1024 * MIB;
const DATA: [Range<u64>; 5] = [
    0..64 * KIB,
    4 * MIB..4 * MIB + 4 * KIB,
    100 * MIB..102 * MIB,
    600 * MIB + 12 * KIB..601 * MIB,
    SIZE - 8 * KIB..SIZE,
];

/// What a client may read or write beyond the data: readahead around each extent, and its own headers.
const SLACK: u64 = 8 * MIB;

struct Source {
    source: LoopMount,
    scratch: tempfile::TempDir,
    read_before: u64,
}

impl Source {
    fn new() -> Self {
        let source = LoopMount::new(SIZE, &DATA);
        // What the fixture wrote is in the page cache of the image only: reads of the device are counted from here.
        run("blockdev", ["--flushbufs".as_ref(), source.device.path().as_os_str()]);
        let scratch = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
        let read_before = source.device.bytes_read();
        Self { source, scratch, read_before }
    }

    fn file(&self) -> &str {
        self.source.file().to_str().expect("temporary paths are text")
    }

    /// A path for what the client writes.
    fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn check_skipped_holes(&self) {
        let data: u64 = DATA.iter().map(|range| range.end - range.start).sum();
        let read = self.source.device.bytes_read() - self.read_before;
        assert!(read >= data / 2, "{read} bytes read of {data}: the bytes came from somewhere else");
        assert!(read <= data + SLACK, "{read} bytes read for {data} of data");
    }

    /// The copy was made without reading holes, has the device's bytes, and takes no more room than the data needs.
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
    assert!(stored <= data + SLACK, "{} takes {stored} bytes for {data} of data", path.display());
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

#[test]
fn cp() {
    if !requires_root() {
        return;
    }
    for sparse in ["--sparse=always", "--sparse=auto"] {
        let source = Source::new();
        let copy = source.scratch("copy");
        run("cp", [sparse, source.file(), text(&copy)]);
        source.check_copy(&copy);
    }
}

#[test]
fn gnu_tar() {
    if !requires_root() {
        return;
    }
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
fn bsdtar() {
    if !requires_root() || !requires(&["bsdtar"]) {
        return;
    }
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
fn qemu_img_convert() {
    if !requires_root() || !requires(&["qemu-img"]) {
        return;
    }
    // Buffered, and with O_DIRECT, which aborts on holes that are not aligned.
    for cache in ["writeback", "none"] {
        let source = Source::new();
        let copy = source.scratch("copy");
        run("qemu-img", ["convert", "-f", "raw", "-O", "raw", "-T", cache, source.file(), text(&copy)]);
        source.check_copy(&copy);
        let compared = run("qemu-img", ["compare", "-f", "raw", "-F", "raw", "-T", cache, source.file(), text(&copy)]);
        assert_eq!(compared, "Images are identical.\n");
    }
}

/// The start and the length of each range that `list` calls data.
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
fn qemu_img_map() {
    if !requires_root() || !requires(&["qemu-img"]) {
        return;
    }
    let source = Source::new();
    let list = run("qemu-img", ["map", "-f", "raw", "--output=json", source.file()]);
    let map = json_extents(&list, "length", |entry| entry["data"] == true);
    assert_eq!(map, map_holes(source.source.image.path()));
}

#[test]
fn nbdkit_and_nbdinfo() {
    if !requires_root() || !requires(&["nbdkit", "nbdinfo"]) {
        return;
    }
    let source = Source::new();
    let list = run("nbdkit", ["-r", "-U", "-", "file", source.file(), "--run", "nbdinfo --map --json \"$uri\""]);
    let map = json_extents(&list, "size", |entry| entry["type"] == 0);
    assert_eq!(map, map_holes(source.source.image.path()));
}

#[test]
fn nbdcopy() {
    if !requires_root() || !requires(&["nbdcopy"]) {
        return;
    }
    let source = Source::new();
    let copy = source.scratch("copy");
    run("nbdcopy", [source.file(), text(&copy)]);
    source.check_copy(&copy);
}

#[test]
fn du() {
    if !requires_root() {
        return;
    }
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
fn borg() {
    if !requires_root() || !requires(&["borg"]) {
        return;
    }
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
