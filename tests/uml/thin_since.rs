//! What changed between two thin volumes, through the metadata snapshot of their pool, and as a view of a mount.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use blkholefs::testing::source::changes::{self, Changes};
use blkholefs::testing::source::{BlockDevice, Context};

use crate::common::dm::Pool;
use crate::common::image::{discard, open_for_writing};
use crate::common::mount::Mount;
use crate::common::random::{Random, seeds};
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

fn with_ending(file: &Path, ending: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn assert_same(image: &Path, device: &Path) {
    let words = ["compare", "-q", "-f", "qcow2", "-F", "raw"].map(AsRef::as_ref);
    run("qemu-img", words.into_iter().chain([image.as_os_str(), device.as_os_str()]));
}

/// After random writes and discards, the increment of a mount over a copy of the older volume is the newer volume, and so
/// is the compact image.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn views_of_a_mount_give_the_bytes_of_the_newer_volume() {
    let size = 8 * MIB + 5 * 512;
    for seed in seeds(1, 2) {
        let mut random = Random::new(seed);
        let pool = Pool::with_zeroing(128 * MIB, BLOCK);
        let thin = pool.thin(0, size);
        for step in 1..6 {
            let older = pool.snapshot(step, &thin, 0);
            let file = open_for_writing(thin.path());
            for _ in 0..random.within(1..8) {
                let start = random.within(0..size / 512) * 512;
                let len = (random.within(1..1024) * 512).min(size - start);
                match random.one_in(3) {
                    true => discard(thin.path(), start..start + len),
                    false => file.write_all_at(&random.bytes(len), start).expect("a write inside the device"),
                }
            }
            file.sync_data().expect("data reaches the device");
            drop(file);
            let since = format!("compact,since={}", older.path().display());
            let mount = Mount::with_options(thin.path(), &["-o", &since]);
            let copies = tempfile::tempdir().expect("a temporary directory");
            let older_name = older.path().file_name().expect("a device has a name");
            let bytes = fs::read(older.path()).expect("the older volume can be read");
            fs::write(copies.path().join(older_name), bytes).expect("the temporary directory is writable");
            let ending = format!(".since-{}.qcow2", older_name.to_str().expect("a name of the tests"));
            let increment = copies.path().join("increment");
            fs::copy(with_ending(mount.file(), &ending), &increment).expect("the view can be read");
            assert_same(&increment, thin.path());
            assert_same(&with_ending(mount.file(), ".qcow2"), thin.path());
        }
        drop(thin);
        pool.thin_check();
    }
}
