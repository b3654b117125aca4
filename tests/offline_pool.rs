//! Volumes of a pool that is not active. Their bytes and their rights are those of the data device.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;
#[path = "support/rewritten.rs"]
mod rewritten;
#[path = "support/thin_image.rs"]
#[allow(dead_code, reason = "only the makers of images are needed here")]
mod thin_image;

use std::fs::{self, File, FileTimes};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use blkholefs::testing::export::{Export, VolumeExport};
use blkholefs::testing::source::thin::offline::OfflinePool;

use common::check::{assert_map, bytes_read, map_of, open, seek_data, seek_hole};
use common::image::{Image, open_for_writing};
use common::loop_device::Loop;
use common::mount::Mount;
use common::{KIB, MIB, needs, run, wait_until};
use thin_image::Device;

const BLOCK: u64 = 64 * KIB;

/// Metadata of a volume 7 whose blocks 1 to 3 are mapped to the data blocks 4 to 6.
fn metadata() -> tempfile::TempPath {
    let image = tempfile::Builder::new().prefix("blkholefs-").tempfile().expect("a temporary file").into_temp_path();
    thin_image::restore(&thin_image::xml(&[Device::new(7, [1..4], 4)]), 1024, &image);
    image
}

fn mount(metadata: &Path, data: &Path) -> Mount {
    Mount::with_options(data, &["-o", &format!("thin_metadata={}", metadata.display())])
}

#[test]
fn bytes_come_from_the_data_device_past_its_page_cache() {
    needs!(root, programs["thin_restore", "thin_dump"]);
    let image = Image::with_data(MIB, &[0..MIB]);
    let data = Loop::new(image.path());
    // An open descriptor keeps the pages of the device. The write to the image bypasses them, as an active pool does.
    let mut pages = Vec::new();
    open(data.path()).read_to_end(&mut pages).expect("the device can be read");
    let cached = open(data.path());
    cached.read_exact_at(&mut pages, 0).expect("the device can be read");
    open_for_writing(image.path()).write_all_at(&[7; BLOCK as usize], 5 * BLOCK).expect("a write");

    let metadata = metadata();
    let mount = mount(&metadata, data.path());
    let volume = mount.directory().join("7");
    assert_map(&volume, &map_of(4 * BLOCK, &[BLOCK..4 * BLOCK]));
    let mut bytes = Vec::new();
    open(&volume).read_to_end(&mut bytes).expect("the volume can be read");
    let block = |index: u64| (index * BLOCK) as usize..((index + 1) * BLOCK) as usize;
    assert!(bytes[block(0)].iter().all(|byte| *byte == 0), "a block that is not mapped");
    assert!(bytes[block(1)] == pages[block(4)], "the first mapped block");
    assert!(bytes[block(2)].iter().all(|byte| *byte == 7), "the last write");
    // Small reads at unaligned offsets.
    let mut some = [0; 100];
    let file = open(&volume);
    file.read_exact_at(&mut some, 2 * BLOCK - 50).expect("the volume can be read");
    assert!(some[..50] == pages[block(4)][BLOCK as usize - 50..] && some[50..] == [7; 50]);
    drop(cached);
}

/// What is not mapped reads as zeros from the volume, whatever the data device has.
#[test]
fn a_volume_is_verified_without_its_pool() {
    needs!(root, programs["thin_restore", "thin_dump"]);
    let (data, metadata) = (Image::with_data(MIB, &[0..MIB]), metadata());
    let option = format!("thin_metadata={}", metadata.display());
    let words = ["verify", "-o", &option, "--volume", "7", data.path().to_str().expect("text")];
    let verified = run(env!("CARGO_BIN_EXE_blkholefs"), words);
    assert!(verified.ends_with(&format!(": {BLOCK} bytes in 1 hole: {BLOCK} bytes read, all zero\n")), "{verified}");
}

#[test]
fn a_volume_has_the_rights_of_the_data_device() {
    needs!(root, programs["thin_restore", "thin_dump"]);
    let (data, metadata) = (Image::new(MIB), metadata());
    for (of_data, of_metadata) in [(0o600, 0o644), (0o640, 0o600)] {
        fs::set_permissions(data.path(), fs::Permissions::from_mode(of_data)).expect("the image is ours");
        fs::set_permissions(&metadata, fs::Permissions::from_mode(of_metadata)).expect("the image is ours");
        let mount = mount(&metadata, data.path());
        let shown = fs::metadata(mount.directory().join("7")).expect("stat").permissions().mode();
        assert_eq!(shown & 0o777, of_data & 0o444);
    }
}

/// The metadata must not be written while its volumes are open. After such a write, a volume has no holes.
#[test]
fn an_open_volume_is_dense_once_its_metadata_changes() {
    needs!(root, programs["thin_restore", "thin_dump"]);
    let (data, metadata) = (Image::with_data(MIB, &[0..MIB]), metadata());
    let mount = mount(&metadata, data.path());
    let volume = open(&mount.directory().join("7"));
    assert_eq!((seek_data(&volume, 0), seek_hole(&volume, BLOCK)), (Some(BLOCK), Some(4 * BLOCK)));
    // The write does not change the bytes, but the daemon cannot know this without reading all of them.
    let image = open_for_writing(&metadata);
    image.write_all_at(&fs::read(&metadata).expect("it can be read")[..4096], 0).expect("a write");
    assert_eq!((seek_data(&volume, 0), seek_hole(&volume, 0)), (Some(0), Some(4 * BLOCK)), "all is data");
    volume.read_exact_at(&mut [0; 512], 0).expect_err("the block may be mapped elsewhere");
    // A new map is not rebuilt at once, and the reason is logged only at the rebuild.
    let logged = || {
        assert_eq!(seek_data(&volume, 0), Some(0), "all is data");
        mount.log().contains("all data: the metadata changed while it was open")
    };
    assert!(wait_until(logged), "{}", mount.log());
    drop(volume);
    // While the image is open for writing, a write may be in progress.
    let volume = open(&mount.directory().join("7"));
    assert_eq!((seek_data(&volume, 0), seek_hole(&volume, 0)), (Some(0), Some(4 * BLOCK)), "all is data");
    drop((volume, image));
    assert_map(&mount.directory().join("7"), &map_of(4 * BLOCK, &[BLOCK..4 * BLOCK]));
}

/// The attributes come from the places of the volumes and their details. Looking all of them up reads a small part of the
/// metadata.
#[test]
fn a_listing_with_attributes_reads_no_part_of_the_metadata_twice() {
    needs!(root, programs["thin_restore", "thin_dump", "ls"]);
    const COUNT: u64 = 100;
    // Each mapping tree has several leaves.
    let ranges = || (0..500).map(|block| 2 * block..2 * block + 1);
    let volumes = (1..=COUNT).map(|id| Device::new(id.try_into().expect("small"), ranges(), id * 500));
    let metadata = Image::new(4 * MIB);
    thin_image::restore(&thin_image::xml(&volumes.collect::<Vec<_>>()), 1024, metadata.path());
    let written = fs::read(metadata.path()).expect("the image can be read");
    let blocks = written.chunks(4 * KIB as usize).filter(|block| block.iter().any(|byte| *byte != 0)).count() as u64;
    let (metadata, data) = (Loop::new(metadata.path()), Image::new(MIB));
    let mount = mount(metadata.path(), data.path());
    for _ in 0..2 {
        let before = bytes_read(metadata.path());
        let listed = run("ls", ["-l".as_ref(), mount.directory().as_os_str()]);
        let read = (bytes_read(metadata.path()) - before) / (4 * KIB);
        let name_and_size = |line: &str| {
            let words: Vec<_> = line.split_whitespace().collect();
            Some((words.get(8)?.parse::<u64>().ok()?, words[4].parse::<u64>().ok()?))
        };
        let mut found: Vec<_> = listed.lines().filter_map(name_and_size).collect();
        found.sort_unstable();
        assert_eq!(found, (1..=COUNT).map(|id| (id, 999 * BLOCK)).collect::<Vec<_>>(), "{listed}");
        // For each volume the root and the last leaf of its tree; for all together the superblock and two small trees.
        assert!(read <= 2 * COUNT + 10 && read < blocks, "{read} of {blocks} blocks were read");
    }
    // The pool can be activated once the directory is closed.
    let open = || File::options().read(true).custom_flags(libc::O_EXCL).open(metadata.path());
    let listing = fs::read_dir(mount.directory()).expect("the directory can be read");
    assert_eq!(open().expect_err("it is in use").raw_os_error(), Some(libc::EBUSY));
    drop(listing);
    assert!(wait_until(|| open().is_ok()), "the metadata device is held");
}

#[test]
fn totals_are_the_sums_of_the_runs() {
    needs!(root, programs["thin_restore", "thin_dump"]);
    let (data, metadata) = (Image::new(MIB), metadata());
    let option = format!("thin_metadata={}", metadata.display());
    let map = |more: &[&str]| {
        let mut words = vec!["map", "--volume", "7", "-o", &option];
        words.extend(more);
        words.push(data.path().to_str().expect("text"));
        run(env!("CARGO_BIN_EXE_blkholefs"), words)
    };
    let number = |word: Option<&str>| -> u64 { word.expect("a word").parse().expect("a number") };
    for offset in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 5, 4 * BLOCK - 1, 4 * BLOCK] {
        for length in [1, 4096, BLOCK, BLOCK + 1, 4 * BLOCK] {
            let part = ["--offset", &offset.to_string(), "--length", &length.to_string()];
            let runs = map(&part);
            let sum = |kind: &str| -> u64 {
                let runs = runs.lines().filter(|line| line.ends_with(kind));
                runs.map(|line| number(line.split_whitespace().nth(1))).sum()
            };
            let totals = map(&[&["--totals"], &part[..]].concat());
            let total = |kind: &str| {
                let line = totals.lines().find(|line| line.ends_with(kind)).expect("a line for each kind");
                number(line.split_whitespace().next())
            };
            for kind in ["data", "hole,zero"] {
                assert_eq!(total(kind), sum(kind), "{kind} of {length} bytes from {offset}:\n{runs}\n{totals}");
            }
        }
    }
}

#[test]
fn offline_metadata_rewritten_within_a_clock_tick_is_seen() {
    needs!(root);
    rewritten::metadata_right_after_a_look();
}

#[test]
fn a_backing_file_written_within_a_clock_tick_of_a_stat_is_seen() {
    needs!(root);
    rewritten::backing_file_right_after_a_stat();
}

/// A description of the damage, and the function that makes it.
type Damage = (&'static str, fn(&mut [u8]));

/// Ways to damage the volume 8 of a pool with the volumes 7 and 8.
fn damages() -> [Damage; 4] {
    fn top(image: &[u8]) -> usize {
        usize::try_from(thin_image::get(image, 320, 8)).expect("a block")
    }
    fn details(image: &[u8]) -> usize {
        usize::try_from(thin_image::get(image, 328, 8)).expect("a block")
    }
    /// The place of the root of the second volume in the leaf of the top tree.
    fn root(image: &[u8]) -> usize {
        top(image) * thin_image::BLOCK + 32 + 8 * 252 + 8
    }
    fn one_entry(image: &mut [u8], node: usize) {
        thin_image::put(image, node * thin_image::BLOCK + 16, 1, 4);
        thin_image::stamp(image, node, thin_image::NODE);
    }
    [
        ("its mapping tree's root fails its checksum", |image| {
            let node = usize::try_from(thin_image::get(image, root(image), 8)).expect("a block");
            image[node * thin_image::BLOCK + 100] ^= 1;
        }),
        ("its mapping tree is outside the metadata", |image| {
            thin_image::put(image, root(image), 1 << 20, 8);
            thin_image::stamp(image, top(image), thin_image::NODE);
        }),
        ("it has details and no mapping tree", |image| one_entry(image, top(image))),
        ("it has a mapping tree and no details", |image| one_entry(image, details(image))),
    ]
}

/// A volume whose metadata is damaged is listed and gives EIO, so that a copy of the pool fails.
#[test]
fn a_volume_with_damaged_metadata_is_listed_and_is_eio() {
    needs!(root);
    let devices = [Device::new(7, [1..4], 4), Device::new(8, [0..2], 8)];
    for (what, damage) in damages() {
        let mut image = thin_image::build(&devices, 64);
        damage(&mut image);
        let (data, metadata) = (Image::with_data(MIB, &[0..MIB]), Image::new(0));
        fs::write(metadata.path(), &image).expect("the image is ours");
        let mount = mount(metadata.path(), data.path());
        let names = fs::read_dir(mount.directory()).expect("readdir").map(|entry| entry.expect("an entry").file_name());
        assert_eq!(names.collect::<Vec<_>>(), ["7", "8"], "{what}");
        let damaged = mount.directory().join("8");
        assert_eq!(fs::metadata(&damaged).expect_err(what).raw_os_error(), Some(libc::EIO), "stat: {what}");
        assert_eq!(File::open(&damaged).expect_err(what).raw_os_error(), Some(libc::EIO), "open: {what}");
        let missing = fs::metadata(mount.directory().join("9")).expect_err("there is none");
        assert_eq!(missing.raw_os_error(), Some(libc::ENOENT), "{what}");
        let copies = tempfile::tempdir().expect("a temporary directory");
        let copied = Command::new("cp").arg("-r").arg(mount.directory()).arg(copies.path()).output().expect("cp runs");
        assert!(!copied.status.success(), "cp -r copies a pool without a volume: {what}");
        assert_map(&mount.directory().join("7"), &map_of(4 * BLOCK, &[BLOCK..4 * BLOCK]));
        assert!(mount.log().contains("cannot read volume 8"), "{what}: {}", mount.log());
    }
}

/// `cp` calls fstat first. The daemon replies without reading the mapping tree, and must not record the tree as read.
#[test]
fn damage_that_is_found_after_a_stat_is_logged() {
    needs!(root);
    let mut image = thin_image::build(&[Device::new(7, [1..4], 4)], 64);
    let details = usize::try_from(thin_image::get(&image, 328, 8)).expect("a block");
    // The device details contain a count of mappings that is one below that of the tree.
    let value = details * thin_image::BLOCK + 32 + 8 * 126;
    assert_eq!(thin_image::get(&image, value, 8), 3);
    thin_image::put(&mut image, value, 2, 8);
    thin_image::stamp(&mut image, details, thin_image::NODE);
    let (data, metadata) = (Image::with_data(MIB, &[0..MIB]), Image::new(0));
    fs::write(metadata.path(), &image).expect("the image is ours");
    let mount = mount(metadata.path(), data.path());
    let volume = open(&mount.directory().join("7"));
    assert_eq!(volume.metadata().expect("fstat").len(), 4 * BLOCK);
    assert_eq!((seek_data(&volume, 0), seek_hole(&volume, 0)), (Some(0), Some(4 * BLOCK)), "all is data");
    let logged = || mount.log().contains("all data: thin device 7 maps 3 blocks, but its details state 2");
    assert!(wait_until(logged), "{}", mount.log());
}

#[test]
fn a_pool_of_damaged_volumes_only_is_not_mounted() {
    let mut image = thin_image::build(&[Device::new(7, [1..4], 4)], 64);
    // The root of its only volume comes first.
    image[thin_image::BLOCK + 100] ^= 1;
    let (data, metadata) = (Image::new(MIB), Image::new(0));
    fs::write(metadata.path(), &image).expect("the image is ours");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mounted = Command::new(env!("CARGO_BIN_EXE_blkholefs"))
        .args(["mount", "-f", "-o", &format!("thin_metadata={}", metadata.path().display())])
        .args([data.path(), directory.path()])
        .output()
        .expect("the program starts");
    let stderr = String::from_utf8_lossy(&mounted.stderr);
    assert_eq!(mounted.status.code(), Some(32), "{stderr}");
    assert!(
        stderr.contains("cannot read volume 7") && stderr.contains("no volume of the pool can be read"),
        "{stderr}"
    );
}

/// The metadata that is read is the file that was checked to be unused and that is watched for changes, even if the
/// path refers to another file later.
#[test]
fn the_opened_metadata_is_read_wherever_its_path_leads_later() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let data = Image::new(MIB);
    let name = |name: &str| directory.path().join(name);
    for id in [7, 8] {
        let image = thin_image::build(&[Device::new(id, [1..4], 4)], 64);
        fs::write(name(&id.to_string()), image).expect("the image is ours");
    }
    let time = |id: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(id);
    let set = |path: &Path, time| {
        let file = open_for_writing(path);
        file.set_times(FileTimes::new().set_modified(time)).expect("the image is ours");
    };
    set(data.path(), time(0));
    (7..=8).for_each(|id| set(&name(&id.to_string()), time(id)));
    symlink(name("7"), name("metadata")).expect("a new name");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                for id in ["8", "7"] {
                    symlink(name(id), name("next")).expect("a new name");
                    fs::rename(name("next"), name("metadata")).expect("a rename");
                }
            }
        });
        let mut other = 0;
        for _ in 0..2000 {
            let pool = Arc::new(OfflinePool::open(&name("metadata"), data.path()).expect("the pool opens"));
            let found = pool.volumes().expect("its volumes").pop().expect("one volume");
            let watched =
                VolumeExport::new(found.volume.expect("the volume is undamaged")).host_node().expect("stat").mtime;
            other += u32::from(watched != time(found.id.get().into()));
        }
        done.store(true, Ordering::SeqCst);
        assert_eq!(other, 0, "of 2000 pools were read from an image that is not watched");
    });
}
