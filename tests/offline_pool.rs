//! Volumes of a pool that is not active: their bytes are the data device's, and so are their rights.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;
#[path = "support/thin_image.rs"]
#[allow(dead_code, reason = "only the makers of images are needed here")]
mod thin_image;

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;

use common::check::{assert_map, map_of, open, seek_data, seek_hole};
use common::image::{Image, open_for_writing};
use common::loop_device::Loop;
use common::mount::Mount;
use common::{KIB, MIB, requires_root, run, wait_until};
use thin_image::Device;

const BLOCK: u64 = 64 * KIB;

/// Metadata of a volume 7 that has its blocks 1 to 3 in the data blocks 4 to 6.
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
    if !requires_root() || !thin_image::tools() {
        return;
    }
    let image = Image::with_data(MIB, &[0..MIB]);
    let data = Loop::new(image.path());
    // Somebody has the device open, so its pages stay; then the pool was active, and wrote past them.
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
    assert!(bytes[block(2)].iter().all(|byte| *byte == 7), "what was written last");
    // Small reads at odd places.
    let mut some = [0; 100];
    let file = open(&volume);
    file.read_exact_at(&mut some, 2 * BLOCK - 50).expect("the volume can be read");
    assert!(some[..50] == pages[block(4)][BLOCK as usize - 50..] && some[50..] == [7; 50]);
    drop(cached);
}

#[test]
fn rights_are_those_of_the_data() {
    if !requires_root() || !thin_image::tools() {
        return;
    }
    let (data, metadata) = (Image::new(MIB), metadata());
    for (of_data, of_metadata) in [(0o600, 0o644), (0o640, 0o600)] {
        fs::set_permissions(data.path(), fs::Permissions::from_mode(of_data)).expect("the image is ours");
        fs::set_permissions(&metadata, fs::Permissions::from_mode(of_metadata)).expect("the image is ours");
        let mount = mount(&metadata, data.path());
        let shown = fs::metadata(mount.directory().join("7")).expect("stat").permissions().mode();
        assert_eq!(shown & 0o777, of_data & 0o444);
    }
}

/// Nobody may write the metadata while its volumes are open. If somebody does, nothing is claimed any more.
#[test]
fn metadata_that_changes_makes_an_open_volume_dense() {
    if !requires_root() || !thin_image::tools() {
        return;
    }
    let (data, metadata) = (Image::with_data(MIB, &[0..MIB]), metadata());
    let mount = mount(&metadata, data.path());
    let volume = open(&mount.directory().join("7"));
    assert_eq!((seek_data(&volume, 0), seek_hole(&volume, BLOCK)), (Some(BLOCK), Some(4 * BLOCK)));
    // The same bytes: that they are the same is not known without reading all of them.
    let image = open_for_writing(&metadata);
    image.write_all_at(&fs::read(&metadata).expect("it can be read")[..4096], 0).expect("a write");
    assert_eq!((seek_data(&volume, 0), seek_hole(&volume, 0)), (Some(0), Some(4 * BLOCK)), "all is data");
    volume.read_exact_at(&mut [0; 512], 0).expect_err("it may lie elsewhere now");
    // A map that was just made is not made again at once, and the reason is known only then.
    let told = || {
        assert_eq!(seek_data(&volume, 0), Some(0), "all is data");
        mount.log().contains("all data: the metadata changed while it was open")
    };
    assert!(wait_until(told), "{}", mount.log());
    drop(volume);
    assert_map(&mount.directory().join("7"), &map_of(4 * BLOCK, &[BLOCK..4 * BLOCK]));
}

#[test]
fn totals_are_the_sums_of_the_runs() {
    if !requires_root() || !thin_image::tools() {
        return;
    }
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
