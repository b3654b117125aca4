//! `blkholefs map --json`, compared byte for byte with `qemu-img map --output=json`.

mod common;

use std::path::Path;

use common::image::Image;
use common::loop_device::Loop;
use common::mount::Mount;
use common::{KIB, MIB, needs, run};

/// A key that QEMU prints since version 8.2, and its value for a raw image.
const SINCE_8_2: &str = " \"compressed\": false,";

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

/// Compares the two programs' maps of what is in `ours` and `theirs`: with these options of ours, and those of QEMU that mean the same.
fn compare(ours: &Path, theirs: &Path, part: Option<(u64, u64)>) -> String {
    let (mut our_words, mut their_words) = (Vec::new(), Vec::new());
    if let Some((offset, length)) = part {
        our_words = vec![format!("--offset={offset}"), format!("--length={length}")];
        their_words = vec![format!("--start-offset={offset}"), format!("--max-length={length}")];
    }
    let our_words = ["map", "--json"].into_iter().chain(our_words.iter().map(String::as_str)).chain([text(ours)]);
    let map = run(env!("CARGO_BIN_EXE_blkholefs"), our_words);
    let their_words = ["map", "-f", "raw", "--output=json"].into_iter().chain(their_words.iter().map(String::as_str));
    let qemu = run("qemu-img", their_words.chain([text(theirs)]));
    let expected = match qemu.contains("\"compressed\"") {
        true => map.clone(),
        // The key is the last but one, and the last one where there is no offset.
        false => map.replace(SINCE_8_2, "").replace(&format!(",{}", SINCE_8_2.trim_end_matches(',')), ""),
    };
    assert_eq!(expected, qemu, "{} {} {part:?}", ours.display(), theirs.display());
    map
}

#[test]
fn a_loop_device_has_the_map_of_its_image() {
    needs!(root, programs["qemu-img"]);
    let image = Image::with_data(8 * MIB + 512, &[64 * KIB..192 * KIB, MIB..MIB + 4 * KIB, 8 * MIB..8 * MIB + 512]);
    image.write(192 * KIB..256 * KIB);
    let device = Loop::new(image.path());
    let mount = Mount::new(device.path());
    for part in [None, Some((0, 64 * KIB)), Some((100 * KIB, MIB)), Some((8 * MIB, MIB)), Some((9 * MIB, 1))] {
        let map = compare(device.path(), mount.file(), part);
        assert_eq!(map, compare(image.path(), image.path(), part), "{part:?}");
    }
    let whole = compare(device.path(), image.path(), None);
    assert!(whole.lines().all(|line| line.contains(SINCE_8_2)), "{whole}");
    drop(mount);
}

/// QEMU counts in sectors of 512 bytes.
#[test]
fn the_end_of_a_file_is_a_whole_sector() {
    needs!(programs["qemu-img"]);
    for (size, data) in
        [(0, None), (1024, None), (1025, Some(0..1025)), (9000, Some(0..4096)), (9000, Some(8192..9000))]
    {
        let image = Image::with_data(size, data.as_slice());
        let end = size.next_multiple_of(512);
        for part in [None, Some((0, size)), Some((0, size + 1)), Some((size, end)), Some((end, 1)), Some((end + 1, 1))]
        {
            compare(image.path(), image.path(), part);
        }
    }
}
