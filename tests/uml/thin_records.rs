//! What a killed daemon left of a metadata snapshot, as its record tells.

use std::fs;
use std::path::Path;

use crate::common::MIB;
use crate::common::check::check;
use crate::common::dm::Pool;
use crate::common::image::write;
use crate::common::mount::Mount;

/// Our own snapshot is released by the next start, and nobody else's.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn the_next_start_releases_what_is_ours() {
    let pool = Pool::new(64 * MIB, 64 << 10);
    let thin = pool.thin(0, 64 * MIB);
    write(thin.path(), MIB..2 * MIB);
    let directory = Path::new("/run/blkholefs.thin");
    fs::create_dir_all(directory).expect("/run is ours");
    let record = directory.join(pool.dm().name());
    for (steps, ours) in [("wanted", false), ("wanted\ntaken", true), ("wanted\ntaken\nheld ROOT", true)] {
        for (offset, same) in [(0, true), (1, false)] {
            pool.dm().message("reserve_metadata_snap");
            let root = pool.held_root().expect("it was taken just now");
            // A pool made without LVM has no uuid: the first line is empty.
            let text = format!("\n{steps}\n").replace("ROOT", &(root + offset).to_string());
            fs::write(&record, &text).expect("/run is ours");
            let mount = Mount::new(thin.path());
            check(mount.file(), thin.path());
            drop(mount);
            assert!(!record.exists(), "the record of {text:?} is cleared away");
            let released = ours && (same || !steps.contains("ROOT"));
            assert_eq!(pool.held_root(), (!released).then_some(root), "after {text:?}");
            if !released {
                pool.dm().message("release_metadata_snap");
            }
        }
    }
    drop(thin);
    pool.thin_check();
}
