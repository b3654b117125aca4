//! What changed between two thin volumes, through the metadata snapshot of their pool.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use blkholefs::testing::source::changes::{self, Changes};
use blkholefs::testing::source::{BlockDevice, Context};

use crate::common::dm::Pool;
use crate::common::image::open_for_writing;
use crate::common::{MIB, assert_becomes, run};
use crate::thin_held::{record, while_it_commits};

const BLOCK: u64 = 64 << 10;

/// Without the metadata snapshot.
fn between(older: &Path, newer: &Path) -> Result<Changes, String> {
    let context = Context { no_metadata_snapshots: true, ..Context::default() };
    let [older, newer] = [older, newer].map(|path| BlockDevice::open(path).expect("the device opens"));
    changes::between(&older, &newer, &context).map_err(|error| error.to_string())
}

/// A pool that commits all the time is compared through its metadata snapshot only. The snapshot is released afterwards,
/// also when the program was killed while it was held.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_metadata_snapshot_is_used_and_released() {
    let pool = Pool::with_slow_commits(64 * MIB, BLOCK, 20, 10);
    while_it_commits(&pool, |thin| {
        let older = pool.snapshot(2, thin, 0);
        open_for_writing(thin.path()).write_all_at(&[2; 4096], 2 * MIB).expect("a write inside the device");
        let error = between(older.path(), thin.path()).expect_err("the pool commits all the time");
        assert!(error.contains("faster"), "{error}");
        // The program, because the process that releases a snapshot after a kill is started from it.
        let words = ["map", "--since"].map(AsRef::as_ref);
        let found = run(
            env!("CARGO_BIN_EXE_blkholefs"),
            words.into_iter().chain([older.path(), thin.path()].map(Path::as_os_str)),
        );
        assert!(found.contains("data"), "{found}");
        assert_becomes(&None, || pool.held_root());

        for _ in 0..4 {
            let mut command = Command::new(env!("CARGO_BIN_EXE_blkholefs"));
            let command = command.args(["map", "--since"]).arg(older.path()).arg(thin.path()).stdout(Stdio::null());
            let mut child = command.spawn().expect("the program starts");
            let mut was_recorded = false;
            while !was_recorded && child.try_wait().expect("our own child").is_none() {
                was_recorded = !record(&pool).is_empty();
            }
            assert!(was_recorded, "the comparison took no metadata snapshot");
            child.kill().expect("our own child");
            child.wait().expect("our own child");
            assert_becomes(&None, || pool.held_root());
        }
    });
    pool.thin_check();
}
