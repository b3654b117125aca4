//! `blkholefs map --since`: what it prints, and that stock programs make the newer volume of the older one with it.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;
#[path = "support/thin_image.rs"]
#[allow(dead_code, reason = "only the makers of images are needed here")]
mod thin_image;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::check::check_same_bytes;
use common::image::Image;
use common::loop_device::Loop;
use common::mount::Mount;
use common::{KIB, MIB, needs, run, try_run};
use thin_image::Device;

const BLOCK: u64 = 64 * KIB;
/// The length of the newer volume, which ends with its last mapped block.
const LEN: u64 = 11 * BLOCK;

/// A pool that is not active. The newer volume 2 differs from the older volume 1: block 2 is written again, block 3 is
/// discarded, block 10 is new. Blocks 1, 4 and 8 are shared.
struct Pool {
    data: Image,
    metadata: tempfile::TempPath,
    directory: tempfile::TempDir,
}

impl Pool {
    fn new() -> Self {
        let builder = || tempfile::Builder::new();
        let metadata = builder().prefix("blkholefs-").tempfile().expect("a temporary file").into_temp_path();
        let older = Device { id: 1, mappings: vec![(1, 4), (2, 5), (3, 6), (4, 7), (8, 8)] };
        let newer = Device { id: 2, mappings: vec![(1, 4), (2, 9), (4, 7), (8, 8), (10, 10)] };
        thin_image::restore(&thin_image::xml(&[older, newer]), 1024, &metadata);
        let directory = builder().prefix("blkholefs-").tempdir().expect("a temporary directory");
        Self { data: Image::with_data(MIB, &[0..MIB]), metadata, directory }
    }

    fn option(&self) -> String {
        format!("thin_metadata={}", self.metadata.display())
    }

    fn map(&self, more: &[&str]) -> String {
        let option = self.option();
        let words = ["map", "--since", "1", "--volume", "2", "-o", &option];
        run(env!("CARGO_BIN_EXE_blkholefs"), words.iter().chain(more).chain([&text(self.data.path())]))
    }

    /// A file with the map of changes in that form.
    fn form(&self, form: &str) -> PathBuf {
        let file = self.directory.path().join(form);
        fs::write(&file, self.map(&["--format", form])).expect("a file in a directory of ours");
        file
    }

    /// The volumes as files.
    fn mount(&self) -> Mount {
        Mount::with_options(self.data.path(), &["-o", &self.option()])
    }

    /// A copy of the older volume that is as long as the newer one, with old bytes at the end.
    fn copy_of_older(&self, mount: &Mount) -> PathBuf {
        let copy = self.directory.path().join("copy");
        let mut bytes = fs::read(mount.directory().join("1")).expect("the volume can be read");
        bytes.resize(LEN as usize, 0xff);
        fs::write(&copy, bytes).expect("a file in a directory of ours");
        copy
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

/// The columns of each line.
fn columns(output: &str) -> Vec<Vec<&str>> {
    output.lines().map(|line| line.split_whitespace().collect()).collect()
}

/// The changes in blocks. Past the end of the older volume nothing is unchanged.
const STATES: [(u64, u64, &str); 7] = [
    (0, 2, "unchanged"),
    (2, 1, "data"),
    (3, 1, "zero"),
    (4, 5, "unchanged"),
    (9, 1, "zero"),
    (10, 1, "data"),
    (11, 0, ""),
];

#[test]
fn changes_are_data_zero_or_unchanged() {
    needs!(programs["thin_restore"]);
    let pool = Pool::new();
    let states = STATES.iter().filter(|state| state.1 > 0);
    let plain = pool.map(&[]);
    let found = columns(&plain).iter().map(|line| format!("{} {} {}", line[0], line[1], line[3])).collect::<Vec<_>>();
    let expected = states.clone().map(|(at, count, word)| format!("{} {} {word}", at * BLOCK, count * BLOCK));
    assert_eq!(found, expected.collect::<Vec<_>>());

    let json: serde_json::Value = serde_json::from_str(&pool.map(&["--json"])).expect("JSON");
    let extents = states
        .clone()
        .map(|(at, count, word)| serde_json::json!({ "start": at * BLOCK, "length": count * BLOCK, "state": word }));
    assert_eq!(json["extents"].as_array().expect("a list"), &extents.collect::<Vec<_>>());
    assert_eq!(json["identity"]["kind"], "thin");
    assert_eq!(json["identity"].to_string().matches(&LEN.to_string()).count(), 1, "{}", json["identity"]);

    let sum = |word| states.clone().filter(|state| state.2 == word).map(|state| state.1 * BLOCK).sum::<u64>();
    let totals = pool.map(&["--totals"]);
    let found = columns(&totals).iter().map(|line| (line[0].to_owned(), line[3].to_owned())).collect::<Vec<_>>();
    let expected = ["data", "zero", "unchanged"].map(|word| (sum(word).to_string(), word.to_owned()));
    assert_eq!(found, expected);

    let part = pool.map(&["--offset", "100K", "--length", "64K"]);
    assert_eq!(columns(&part), [["102400", "28672", "0", "unchanged"], ["131072", "36864", "0", "data"]]);
}

#[test]
fn a_picture_has_three_kinds() {
    needs!(programs["thin_restore"]);
    let pool = Pool::new();
    let option = pool.option();
    let words = ["map", "--since", "1", "--volume", "2", "-o", &option, "--picture", "--ascii", text(pool.data.path())];
    let output = Command::new(env!("CARGO_BIN_EXE_blkholefs")).args(words).env_remove("COLUMNS").output();
    let picture = String::from_utf8(output.expect("the program runs").stdout).expect("text");
    // Block 9 is behind the end of the older volume.
    let block = |cell: &str| cell.repeat((BLOCK / (4 * KIB)) as usize);
    let rows = [
        block(".") + &block(".") + &block("#") + &block("0"),
        block(".").repeat(4),
        block(".") + &block("0") + &block("#"),
    ];
    let rows: Vec<_> =
        ["       0B", "   256KiB", "   512KiB"].iter().zip(rows).map(|(at, row)| format!("{at}  {row}\n")).collect();
    assert!(picture.contains(&rows.concat()), "{picture}");
    assert!(
        picture.lines().next().is_some_and(|title| title.ends_with(".img, volume 2, changes since 1")),
        "{picture}"
    );
    for sum in ["changed data 128KiB (18.2%)", "zeros now 128KiB (18.2%)", "unchanged 448KiB (63.6%)"] {
        assert!(picture.contains(sum), "{sum}: {picture}");
    }
    let svg = pool.map(&["--svg", "-"]);
    assert!(svg.contains("<title>all changed</title>") && svg.contains("<title>all zeros now</title>"), "{svg}");
}

#[test]
fn bmaptool_makes_the_newer_volume_of_the_older() {
    needs!(root, programs["thin_restore", "bmaptool"]);
    let pool = Pool::new();
    let mount = pool.mount();
    let newer = mount.directory().join("2");
    let copy = pool.copy_of_older(&mount);
    let device = Loop::new(&copy);
    let bmap = pool.form("bmap");
    run("bmaptool", ["copy".as_ref(), "--bmap".as_ref(), bmap.as_path(), newer.as_path(), device.path()]);
    check_same_bytes(&newer, device.path());
}

#[test]
fn ddrescue_makes_the_newer_volume_of_the_older() {
    needs!(root, programs["thin_restore", "ddrescue"]);
    let pool = Pool::new();
    let mount = pool.mount();
    let newer = mount.directory().join("2");
    let copy = pool.copy_of_older(&mount);
    let domain = format!("--domain-mapfile={}", pool.form("ddrescue").display());
    run("ddrescue", [&domain, text(&newer), text(&copy)]);
    check_same_bytes(&copy, &newer);
}

#[test]
fn the_tuples_of_csi_and_the_states_of_borg_make_the_newer_volume_of_the_older() {
    needs!(root, programs["thin_restore"]);
    let pool = Pool::new();
    let mount = pool.mount();
    let newer = fs::read(mount.directory().join("2")).expect("the volume can be read");
    let copied = |changed: &[(u64, u64, bool)]| {
        let copy = pool.copy_of_older(&mount);
        let file = File::options().write(true).open(&copy).expect("a file of ours");
        for (at, length, is_zero) in changed {
            let (from, length) = (*at as usize, *length as usize);
            let bytes = if *is_zero { vec![0; length] } else { newer[from..from + length].to_vec() };
            file.write_all_at(&bytes, *at).expect("a file of ours");
        }
        fs::read(&copy).expect("a file of ours")
    };
    let csi: serde_json::Value = serde_json::from_str(&pool.map(&["--format", "csi"])).expect("JSON");
    let number = |value: &serde_json::Value| value.as_str().expect("a string").parse::<u64>().expect("a number");
    let tuples = csi["blockMetadata"].as_array().expect("a list").iter();
    let tuples: Vec<_> =
        tuples.map(|tuple| (number(&tuple["byteOffset"]), number(&tuple["sizeBytes"]), false)).collect();
    assert_eq!(tuples.len(), 2, "neighbouring changes are one tuple");
    assert!(copied(&tuples) == newer, "by the tuples of CSI");

    let borg = pool.map(&["--format", "borg"]);
    let lines = columns(&borg).into_iter().filter(|line| line[0] != "#" && line[2] != "same");
    let ranges: Vec<_> =
        lines.map(|line| (line[0].parse().unwrap(), line[1].parse().unwrap(), line[2] == "zero")).collect();
    assert!(copied(&ranges) == newer, "by the states of borg");
}

#[test]
fn what_cannot_be_compared_is_refused_with_the_reason() {
    needs!(programs["thin_restore"]);
    let pool = Pool::new();
    let option = pool.option();
    let data = text(pool.data.path());
    for (words, reason) in [
        (&["--since", "x", "nbd+unix:///?socket=/nonexistent"][..], "cannot connect"),
        (&["--since", "x", "-o", "nbd=nbd://h/x", "/dev/null"], "-o nbd"),
        (&["--since", "x", "--volume", "2", "-o", &option, data], "is no id of a volume"),
        (&["--since", "1", "-o", &option, data], "--volume"),
        (&["--since", "5", "--volume", "2", "-o", &option, data], "5"),
        (&["--since", data, data], "not a block device"),
    ] {
        let error = try_run(env!("CARGO_BIN_EXE_blkholefs"), ["map"].iter().chain(words), "");
        let error = error.expect_err("these cannot be compared");
        assert!(error.contains(reason), "{words:?}: {error}");
    }
}
