//! The used space of btrfs file systems that mkfs.btrfs, btrfs-convert and the kernel wrote.
//!
//! A copy without the free space must pass `btrfs check`, and must hold all files as they were.

#[path = "support/btrfs_image.rs"]
mod btrfs_image;
mod common;
#[path = "support/used_space.rs"]
#[allow(dead_code, reason = "each test uses its own part")]
mod used_space;

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use blkholefs::testing::filesystem::detect::used_space;
use btrfs_image::{CHUNK_TREE, DEVICE_TREE, EXTENT_LEAVES, EXTENT_ROOT, GROUP_TREE, HEADER, Image, ROOT_TREE};
use common::loop_device::Loop;
use common::random::Random;
use common::{GIB, MIB, needs, run};
use used_space::{copy_without_free_space, flip, free_ranges, used_of};

/// The position of the superblock.
const SUPERBLOCK: u64 = 64 << 10;

/// Whether the kernel has btrfs, in itself or as a module.
fn kernel_has_btrfs() -> bool {
    fs::read_to_string("/proc/filesystems").unwrap().contains("\tbtrfs\n") || common::requires_modules(&["btrfs"])
}

/// Fills a directory with files of many sizes. The second half of each second file is a hole.
fn fill(directory: &Path, seed: u64, count: usize) {
    let mut random = Random::new(seed);
    for index in 0..count {
        let subdirectory = directory.join(format!("{seed}-{}", index % 7));
        fs::create_dir_all(&subdirectory).unwrap();
        let size = [10, 3000, 5000, 70_000, 300_000][index % 5] + random.within(0..1000);
        let bytes = random.bytes(size);
        let file = File::create(subdirectory.join(format!("file-{index}"))).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        file.set_len(size * (1 + index as u64 % 2)).unwrap();
    }
}

/// The checksums of all files below a directory.
fn checksums(directory: &Path) -> String {
    let list = "cd \"$1\" && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum";
    let sums = run("sh", ["-c", list, "sh", directory.to_str().unwrap()]);
    assert!(sums.lines().count() > 3, "there are files");
    sums
}

/// A mounted image.
struct Mounted {
    directory: tempfile::TempDir,
    _device: Loop,
}

impl Mounted {
    fn new(image: &Path, options: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let device = Loop::new(image);
        run(
            "mount",
            ["-t".as_ref(), "btrfs".as_ref(), "-o".as_ref(), options.as_ref(), device.path(), directory.path()],
        );
        Self { directory, _device: device }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", [self.directory.path()]);
    }
}

fn overlap(free: &[Range<u64>], range: &Range<u64>) -> bool {
    free.iter().any(|free| free.start < range.end && range.start < free.end)
}

/// Checks a copy of an image without its free space. Returns how many bytes are free.
fn check_copy(image: &Path, is_root: bool) -> u64 {
    let copy = image.with_extension("copy");
    let free = copy_without_free_space(image, &copy);
    for position in [0, SUPERBLOCK, 64 * MIB] {
        assert!(!overlap(&free, &(position..position + 4096)), "the superblock is no free space");
    }
    run("btrfs", ["check".as_ref(), "--check-data-csum".as_ref(), copy.as_os_str()]);
    // Both file systems have the same UUID, so that the kernel can mount only one of them at a time.
    let files = |image: &Path| match is_root {
        true => checksums(Mounted::new(image, "ro").path()),
        false => {
            let restored = tempfile::tempdir().unwrap();
            run("btrfs", ["restore".as_ref(), image.as_os_str(), restored.path().as_os_str()]);
            checksums(restored.path())
        }
    };
    assert!(files(image) == files(&copy), "the files differ");
    fs::remove_file(copy).unwrap();
    free.iter().map(|range| range.end - range.start).sum()
}

fn mkfs(directory: &Path, size: u64, options: &[&str]) -> PathBuf {
    let image = directory.join("image");
    File::create(&image).unwrap().set_len(size).unwrap();
    run("mkfs.btrfs", ["-q"].iter().chain(options).copied().chain([image.to_str().unwrap()]));
    image
}

#[test]
fn file_systems_of_mkfs_with_many_options() {
    needs!(programs["mkfs.btrfs", "btrfs"]);
    for options in [
        &[][..],
        &["-m", "single"],
        &["-m", "dup", "-d", "dup"],
        &["--mixed"],
        &["--mixed", "-m", "dup", "-d", "dup"],
        &["-n", "4096"],
        &["-n", "65536"],
        &["-O", "^no-holes,^extref", "-R", "^free-space-tree"],
        &["-O", "^skinny-metadata"],
    ] {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("files");
        fill(&source, 1, 200);
        let options: Vec<_> = options.iter().copied().chain(["--rootdir", source.to_str().unwrap()]).collect();
        let size = 400 * MIB + 4096 + 512;
        let image = mkfs(directory.path(), size, &options);
        assert_eq!(used_of(&image).map(|used| used.kind), Ok("btrfs"), "{options:?}");
        let free = check_copy(&image, false);
        assert!(free > 200 * MIB && free < 399 * MIB, "{options:?}: {free} bytes are free");
    }
}

#[test]
fn a_converted_ext4_file_system() {
    needs!(programs["mkfs.ext4", "btrfs-convert", "btrfs"]);
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("files");
    fill(&source, 2, 100);
    let image = directory.path().join("image");
    File::create(&image).unwrap().set_len(300 * MIB).unwrap();
    run(
        "mkfs.ext4",
        ["-q".as_ref(), "-b".as_ref(), "4096".as_ref(), "-d".as_ref(), source.as_os_str(), image.as_os_str()],
    );
    run("btrfs-convert", [&image]);
    assert!(check_copy(&image, false) > 100 * MIB);
}

/// All copies of the superblock are data, and nearly all else of a large empty file system is free.
#[test]
fn the_superblock_has_three_copies_on_a_large_device() {
    needs!(programs["mkfs.btrfs"]);
    let directory = tempfile::tempdir().unwrap();
    let size = 300 * GIB;
    let image = mkfs(directory.path(), size, &["-m", "single"]);
    let free = free_ranges(&used_of(&image).unwrap_or_else(|reason| panic!("{reason}")));
    for position in [SUPERBLOCK, 64 * MIB, 256 * GIB] {
        let mut superblock = [0; 4096];
        File::open(&image).unwrap().read_exact_at(&mut superblock, position).unwrap();
        assert_eq!(superblock[64..72], *b"_BHRfS_M");
        assert!(!overlap(&free, &(position..position + 4096)));
        assert!(free.iter().any(|range| range.end == position) || position == SUPERBLOCK);
    }
    assert!(free.iter().map(|range| range.end - range.start).sum::<u64>() > size - 4 * MIB);
    // A copy that is newer than the superblock.
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let mut superblock = [0; 4096];
    file.read_exact_at(&mut superblock, 256 * GIB).unwrap();
    superblock[72] += 1;
    let checksum = crc32c::crc32c(&superblock[32..]).to_le_bytes();
    superblock[..4].copy_from_slice(&checksum);
    file.write_all_at(&superblock, 256 * GIB).unwrap();
    assert!(used_of(&image).is_err_and(|reason| reason.contains("newer than the superblock")));
}

/// Snapshots, deleted files, compression, files that were written several times, a balance, and each free space cache.
#[test]
fn file_systems_that_the_kernel_wrote() {
    needs!(root, programs["mkfs.btrfs", "btrfs"]);
    if !kernel_has_btrfs() {
        return;
    }
    for (make, mount) in [
        (&[][..], "compress=zstd"),
        (&["--mixed"], "compress=lzo"),
        (&["-R", "^free-space-tree"], "space_cache=v1"),
        (&["-m", "single", "-n", "4096"], "compress=no"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let image = mkfs(directory.path(), 512 * MIB, make);
        let mounted = Mounted::new(&image, mount);
        let at = |name: &str| mounted.path().join(name);
        let btrfs = |arguments: &[&str]| run("btrfs", arguments);
        btrfs(&["subvolume", "create", at("volume").to_str().unwrap()]);
        fill(&at("volume"), 3, 150);
        let text = "the same words again and again\n".repeat(20_000);
        fs::write(at("volume/text"), &text).unwrap();
        btrfs(&["subvolume", "snapshot", at("volume").to_str().unwrap(), at("snapshot").to_str().unwrap()]);
        btrfs(&["subvolume", "snapshot", "-r", at("volume").to_str().unwrap(), at("deleted").to_str().unwrap()]);
        fs::remove_dir_all(at("volume/3-1")).unwrap();
        fill(&at("volume"), 4, 150);
        run("fallocate", ["-l", "5M", at("volume/preallocated").to_str().unwrap()]);
        fs::remove_dir_all(at("volume/4-2")).unwrap();
        run("sync", ["-f".as_ref(), mounted.path().as_os_str()]);
        btrfs(&["subvolume", "delete", "-c", at("deleted").to_str().unwrap()]);
        btrfs(&["balance", "start", "--full-balance", mounted.path().to_str().unwrap()]);
        fill(&at("snapshot"), 5, 60);
        drop(mounted);
        let free = check_copy(&image, true);
        assert!(free > 200 * MIB && free < 500 * MIB, "{make:?}: {free} bytes are free");
    }
}

/// Files of many sizes until no space is left, a third of which are deleted again, several times.
#[test]
fn a_full_and_fragmented_file_system() {
    needs!(root, programs["mkfs.btrfs", "btrfs"]);
    if !kernel_has_btrfs() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = mkfs(directory.path(), 150 * MIB, &["-n", "4096"]);
    let mounted = Mounted::new(&image, "discard=async");
    let mut random = Random::new(8);
    let bytes = random.bytes(200_000);
    let mut number = 0;
    for _ in 0..4 {
        loop {
            let len = random.within(1..8) * 4096 * if random.one_in(5) { 6 } else { 1 };
            number += 1;
            if fs::write(mounted.path().join(number.to_string()), &bytes[..len as usize]).is_err() {
                break;
            }
        }
        for index in (0..number).filter(|_| random.one_in(3)) {
            // Not all of them are still there.
            let _ = fs::remove_file(mounted.path().join(index.to_string()));
        }
        run("sync", ["-f".as_ref(), mounted.path().as_os_str()]);
    }
    drop(mounted);
    let count = free_ranges(&used_of(&image).unwrap_or_else(|reason| panic!("{reason}"))).len();
    assert!(count > 200, "{count} free ranges");
    check_copy(&image, true);
}

/// A copy of the device while it is in use, as after a crash: what `fsync` wrote is in the log tree.
#[test]
fn a_log_tree_is_refused_and_a_crash_without_one_is_not() {
    needs!(root, programs["mkfs.btrfs", "btrfs"]);
    if !kernel_has_btrfs() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = mkfs(directory.path(), 300 * MIB, &[]);
    let crashed = directory.path().join("crashed");
    {
        let mounted = Mounted::new(&image, "commit=300");
        fill(mounted.path(), 6, 100);
        run("sync", ["-f".as_ref(), mounted.path().as_os_str()]);
        fs::copy(&image, &crashed).unwrap();
        let synced = File::create(mounted.path().join("synced")).unwrap();
        synced.write_all_at(&[1; 10_000], 0).unwrap();
        synced.sync_all().unwrap();
        let refused = used_of(&image).err();
        assert!(refused.as_ref().is_some_and(|reason| reason.contains("log tree")), "{refused:?}");
    }
    check_copy(&image, true);
    check_copy(&crashed, true);
}

/// Every byte of the superblock and of the nodes is covered by a checksum.
#[test]
fn a_flipped_bit_is_refused() {
    needs!(programs["mkfs.btrfs", "btrfs"]);
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("files");
    fill(&source, 7, 300);
    let image =
        mkfs(directory.path(), 300 * MIB, &["-m", "single", "-n", "4096", "--rootdir", source.to_str().unwrap()]);
    assert!(used_of(&image).is_ok());
    let mut random = Random::new(1);
    // The checksum has 4 of the 32 bytes of its field.
    let mut refuses = |start: u64, len: u64| {
        let at = [0, 3, 32, len - 1].into_iter().chain([32; 8].map(|first| random.within(first..len)));
        for at in at.collect::<Vec<_>>() {
            let (at, bits) = (start + at, 1 << random.within(0..8));
            flip(&image, at, bits);
            assert!(used_of(&image).is_err(), "bits {bits} at {at}");
            flip(&image, at, bits);
        }
    };
    refuses(SUPERBLOCK, 4096);
    let bytes = fs::read(&image).unwrap();
    let mut count = 0;
    for tree in ["root", "chunk", "extent", "dev"] {
        let dump = run("btrfs", ["inspect-internal", "dump-tree", "-t", tree, image.to_str().unwrap()]);
        for line in dump.lines().filter(|line| line.contains(" free space ") && !line.starts_with('\t')) {
            let logical: u64 = line.split(' ').nth(1).and_then(|number| number.parse().ok()).unwrap();
            // The header of a node has its logical position, and there is one copy of each.
            let is_node =
                |block: &&[u8]| block[48..56] == logical.to_le_bytes() && block[32..48] == bytes[65568..65584];
            let blocks = bytes.chunks_exact(4096).enumerate();
            let places: Vec<_> = blocks.filter(|(_, block)| is_node(block)).map(|(index, _)| index as u64).collect();
            let [place] = places[..] else { panic!("{line}: in the blocks {places:?}") };
            refuses(place * 4096, 4096);
            count += 1;
        }
    }
    assert!(count > 8, "the trees have {count} nodes");
    assert!(used_of(&image).is_ok(), "all bits are as they were");
}

#[test]
fn several_devices_and_other_checksums_are_refused() {
    needs!(programs["mkfs.btrfs"]);
    let directory = tempfile::tempdir().unwrap();
    for kind in ["xxhash", "sha256", "blake2"] {
        let image = mkfs(directory.path(), 300 * MIB, &["--csum", kind]);
        assert!(used_of(&image).is_err_and(|reason| reason.contains("which is not supported")), "{kind}");
    }
    let image = mkfs(directory.path(), 300 * MIB, &[]);
    // A device that is shorter than the file system.
    File::options().write(true).open(&image).unwrap().set_len(299 * MIB).unwrap();
    assert!(used_of(&image).is_err_and(|reason| reason.contains("longer than the device")));
    let other = directory.path().join("other");
    File::create(&other).unwrap().set_len(300 * MIB).unwrap();
    let image = mkfs(directory.path(), 300 * MIB, &["-d", "single", "-m", "raid1", other.to_str().unwrap()]);
    for image in [&image, &other] {
        assert!(used_of(image).is_err_and(|reason| reason.contains("several devices")));
    }
}

#[test]
fn a_small_file_system_has_the_free_space_that_it_was_made_with() {
    for (has_group_tree, nodes) in [(false, 5), (true, 6)] {
        let used = used_space(&Image::new(has_group_tree)).unwrap_or_else(|reason| panic!("{reason}"));
        let expected = [
            MIB + 4096..4 * MIB,
            4 * MIB + nodes * 4096..6 * MIB,
            6 * MIB + nodes * 4096..8 * MIB,
            8 * MIB + 65536..9 * MIB,
            9 * MIB + 4096..12 * MIB,
        ];
        assert_eq!(free_ranges(&used), expected);
    }
}

/// Each of these fields is wrong with right checksums: the trees contradict each other.
#[test]
fn trees_that_contradict_each_other_are_refused() {
    let item = |block: u64, index: usize, at: usize| (block, Image::new(true).item(block, index) + at);
    let key = |block: u64, index: usize, at: usize| (block, HEADER + 25 * index + at);
    let mut wrong = Vec::new();
    for (what, (block, at), byte, reason) in [
        ("generation", (SUPERBLOCK, 72), 8, "newer than the superblock"),
        ("generation", (SUPERBLOCK, 72), 10, "not the one that its parent names"),
        ("log tree", (SUPERBLOCK, 96), 1, "log tree"),
        ("flags", (SUPERBLOCK, 60), 1, "flags"),
        ("used bytes", (SUPERBLOCK, 121), 0, "sums"),
        ("devices", (SUPERBLOCK, 136), 2, "several devices"),
        ("sector size", (SUPERBLOCK, 145), 0x11, "sizes"),
        ("feature", (SUPERBLOCK, 189), 0x23, "features"),
        ("feature", (SUPERBLOCK, 180), 0x1b, "features"),
        ("no group tree", (SUPERBLOCK, 180), 3, "missing"),
        ("checksums", (SUPERBLOCK, 196), 1, "xxhash64"),
        ("level", (SUPERBLOCK, 198), 1, "not the one"),
        ("level", (SUPERBLOCK, 198), 8, "wrong level"),
        ("device", (SUPERBLOCK, 201), 2, "another device"),
        ("device's file system", (SUPERBLOCK, 283), 0, "another file system"),
        ("system chunk", (SUPERBLOCK, 811 + 17 + 2), 0x20, "differ from those in its chunk tree"),
        ("system chunks", (SUPERBLOCK, 160), 5, "truncated"),
        ("uuid of a node", (ROOT_TREE, 32), 0, "not the one"),
        ("uuid of the chunk tree", (ROOT_TREE, 64), 0, "not the one"),
        ("flags of a node", (ROOT_TREE, 56), 0, "not the one"),
        ("owner", (ROOT_TREE, 88), 2, "not the one"),
        ("count", (ROOT_TREE, 97), 1, "too many entries"),
        ("order of keys", key(ROOT_TREE, 1, 0), 1, "out of order"),
        ("size of an item", key(ROOT_TREE, 1, 21), 1, "items of a node overlap"),
        ("chunk's copy", item(CHUNK_TREE, 1, 48), 2, "another device"),
        ("chunk's profile", item(CHUNK_TREE, 3, 24), 0x81, "profile"),
        ("chunk's place", item(CHUNK_TREE, 3, 48 + 10), 0x7f, "device tree differs"),
        ("chunk's length", item(CHUNK_TREE, 3, 2), 0x3f, "device tree differs"),
        ("chunk behind the device", item(CHUNK_TREE, 3, 48 + 11), 1, "beyond the end"),
        ("device's length", item(CHUNK_TREE, 0, 9), 1, "differs from that in its superblock"),
        ("device extent", item(DEVICE_TREE, 1, 18), 2, "device tree differs"),
        ("replacement", key(DEVICE_TREE, 0, 8), 200, "unknown kind"),
        ("first key of a node", (EXTENT_ROOT, HEADER + 33), 1, "out of order"),
        ("child", (EXTENT_ROOT, HEADER + 17 + 1), 0x30, "out of order"),
        ("child in no chunk", (EXTENT_ROOT, HEADER + 17 + 5), 1, "in no chunk"),
        ("child's generation", (EXTENT_ROOT, HEADER + 25), 10, "newer than its parent"),
        ("kind of extent", key(EXTENT_LEAVES[0], 1, 8), 170, "unknown kind"),
        ("extent's references", item(EXTENT_LEAVES[0], 1, 0), 0, "does not fit"),
        ("extent's generation", item(EXTENT_LEAVES[0], 1, 8), 10, "does not fit"),
        ("extent's flags", item(EXTENT_LEAVES[0], 1, 16), 1, "does not fit"),
        ("extent in no chunk", key(EXTENT_LEAVES[1], 4, 3), 1, "in no chunk"),
        ("extents that overlap", key(EXTENT_LEAVES[1], 3, 11), 0x11, "overlap"),
        ("longer extent", key(EXTENT_LEAVES[1], 4, 10), 0x20, "sums"),
        ("extent elsewhere", key(EXTENT_LEAVES[1], 2, 1), 0xa0, "not among its extents"),
        ("block group's used bytes", item(GROUP_TREE, 1, 1), 0x50, "sums"),
        ("block group's flags", item(GROUP_TREE, 1, 16), 4, "differs from its chunk"),
        ("block group's place", key(GROUP_TREE, 2, 2), 0x90, "no chunk"),
    ] {
        let mut image = Image::new(true);
        image.put(block, at, &[byte]);
        image.stamp();
        let found = used_space(&image).map_err(|reason| reason.to_string()).map(|used| free_ranges(&used));
        if !found.as_ref().is_err_and(|found| found.contains(reason)) {
            wrong.push(format!("{what}, {byte} at {at} of {block}: {found:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
