//! The inputs that the fuzz targets found, through the same code without libFuzzer.

use std::fs;
use std::path::Path;

#[path = "support/fuzz/mod.rs"]
mod targets;

/// Runs all inputs of a target. The last name that is printed is the one of an input that fails.
fn replay(target: &str, run: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut paths: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{target} has inputs");
    for path in paths {
        println!("{}", path.display());
        run(&fs::read(path).unwrap());
    }
}

macro_rules! replayed {
    ($($target:ident),*) => {
        $(
            #[test]
            fn $target() {
                replay(stringify!($target), targets::$target::run);
            }
        )*

        #[test]
        fn every_target_is_replayed() {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/fuzz_targets");
            let mut all: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            all.sort();
            assert_eq!(all, [$(concat!(stringify!($target), ".rs")),*]);
        }
    };
}

replayed!(dm_tables, kernel_texts, mount_words, nbd, nbd_client, scsi_pages, thin_metadata, thin_params);
