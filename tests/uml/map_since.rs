//! `blkholefs map --since` of two live thin devices.

use std::fs;
use std::path::Path;

use crate::common::dm::Pool;
use crate::common::image::{Image, discard, write};
use crate::common::{MIB, run, try_run};

const BLOCK: u64 = 64 << 10;

fn map(words: &[&str], older: &Path, newer: &Path) -> String {
    let paths = ["--since".as_ref(), older.as_os_str(), newer.as_os_str()];
    run(env!("CARGO_BIN_EXE_blkholefs"), ["map"].iter().chain(words).map(AsRef::as_ref).chain(paths))
}

/// The ranges of the csi form over a copy of the older device make the newer one.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn the_changes_of_a_live_volume_make_it_of_its_snapshot() {
    let pool = Pool::new(64 * MIB, BLOCK);
    let thin = pool.thin(0, 16 * MIB);
    write(thin.path(), MIB..4 * MIB);
    let older = pool.snapshot(1, &thin, 0);
    write(thin.path(), 2 * MIB..2 * MIB + 4096);
    discard(thin.path(), 3 * MIB..4 * MIB);
    write(thin.path(), 8 * MIB..9 * MIB);

    let json: serde_json::Value = serde_json::from_str(&map(&["--json"], older.path(), thin.path())).expect("JSON");
    assert_eq!(json["identity"]["kind"], "thin");
    let number = |value: &serde_json::Value| value.as_u64().expect("a number");
    let extents = json["extents"].as_array().expect("a list").iter();
    let found: Vec<_> = extents
        .map(|extent| (number(&extent["start"]), number(&extent["length"]), extent["state"].as_str().expect("a word")))
        .collect();
    let expected = [
        (0, 2 * MIB, "unchanged"),
        (2 * MIB, BLOCK, "data"),
        (2 * MIB + BLOCK, MIB - BLOCK, "unchanged"),
        (3 * MIB, MIB, "zero"),
        (4 * MIB, 4 * MIB, "unchanged"),
        (8 * MIB, MIB, "data"),
        (9 * MIB, 7 * MIB, "unchanged"),
    ];
    assert_eq!(found, expected);

    let csi: serde_json::Value =
        serde_json::from_str(&map(&["--format", "csi"], older.path(), thin.path())).expect("JSON");
    let mut copy = fs::read(older.path()).expect("the snapshot can be read");
    let bytes = fs::read(thin.path()).expect("the volume can be read");
    for tuple in csi["blockMetadata"].as_array().expect("a list") {
        let number = |name| tuple[name].as_str().expect("a string").parse::<usize>().expect("a number");
        let range = number("byteOffset")..number("byteOffset") + number("sizeBytes");
        copy[range.clone()].copy_from_slice(&bytes[range]);
    }
    assert!(copy == bytes, "the changes over the snapshot are the volume");

    let image = Image::new(MIB);
    for (older, newer) in [(image.path(), thin.path()), (thin.path(), thin.path())] {
        let words = ["map".as_ref(), "--since".as_ref(), older.as_os_str(), newer.as_os_str()];
        assert!(try_run(env!("CARGO_BIN_EXE_blkholefs"), words, "").is_err(), "these cannot be compared");
    }
    drop((older, thin));
    pool.thin_check();
}
