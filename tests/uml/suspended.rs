//! Requests for a suspended device, except reads, are answered at once.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use crate::common::check::{Extent, Kind, assert_map, map_holes, map_of, open, seek_data, seek_hole};
use crate::common::dm::{Dm, Pool};
use crate::common::image::{Image, open_for_writing, write_at};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::{MIB, assert_becomes, run, wait_until};

/// Sends every request that reads no bytes (readdir, stat, lseek) while `suspended` is suspended and has dirty pages above
/// it that cannot be written back. Returns whether all requests ended at once, and the map.
fn query_while_suspended(suspended: &Dm, writer: &File, directory: &Path, file: &Path) -> (bool, Vec<Extent>) {
    suspended.suspend();
    write_at(writer, MIB..MIB + 4096);
    let paths = Arc::new((directory.to_owned(), file.to_owned()));
    let queries = thread::spawn(move || {
        assert_eq!(std::fs::read_dir(&paths.0).expect("readdir").count(), 1);
        std::fs::metadata(&paths.1).expect("stat");
        map_holes(&paths.1)
    });
    let ended = wait_until(|| queries.is_finished());
    suspended.resume();
    (ended, queries.join().expect("the queries succeed"))
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_suspended_device_blocks_only_reads() {
    let image = Image::new(4 * MIB);
    let disk = Loop::new(image.path());
    let below = Dm::linear(disk.path());
    let above = Dm::linear(below.path());
    let mount = Mount::new(above.path());
    assert_map(mount.file(), &map_of(4 * MIB, &[]));
    let writer = open_for_writing(above.path());
    for suspended in [&above, &below] {
        let (at_once, map) = query_while_suspended(suspended, &writer, mount.directory(), mount.file());
        assert!(at_once, "a query waited for the resume of {}", suspended.name());
        let covered = map.iter().any(|Extent(kind, range)| *kind == Kind::Data && range.contains(&MIB));
        assert!(covered, "the written range is in a hole: {map:?}");
    }
    assert_map(mount.file(), &map_of(4 * MIB, &[MIB..MIB + 4096]));
}

/// The device is suspended when its file is opened first. Queries do not wait, and the daemon can be terminated.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_device_that_is_suspended_at_the_first_open_blocks_only_reads() {
    let image = Image::with_data(4 * MIB, &[MIB..2 * MIB]);
    let disk = Loop::new(image.path());
    let below = Dm::linear(disk.path());
    let above = Dm::linear(below.path());
    for suspended in [&above, &below] {
        let mut mount = Mount::new(above.path());
        suspended.suspend();
        let file = mount.file().to_owned();
        let queries = thread::spawn(move || {
            std::fs::metadata(&file).expect("stat");
            map_holes(&file)
        });
        let at_once = wait_until(|| queries.is_finished());
        run("kill", ["-TERM".to_owned(), mount.pid().to_string()]);
        let ended = wait_until(|| !mount.is_running());
        suspended.resume();
        assert_eq!(queries.join().expect("the queries succeed"), [Extent(Kind::Data, 0..4 * MIB)], "all data");
        assert!(at_once, "a query waited for the resume of {}", suspended.name());
        assert!(ended, "the daemon waited for the resume of {}", suspended.name());
        mount.ended();
    }
    assert_map(Mount::new(above.path()).file(), &map_of(4 * MIB, &[MIB..2 * MIB]));
}

/// A file that was opened first while its device was suspended gets its map after the resume.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_resumed_device_has_its_holes_again() {
    let image = Image::with_data(4 * MIB, &[MIB..2 * MIB]);
    let disk = Loop::new(image.path());
    let device = Dm::linear(disk.path());
    let mount = Mount::new(device.path());
    device.suspend();
    let file = open(mount.file());
    let suspended = seek_data(&file, 0);
    device.resume();
    assert_eq!(suspended, Some(0), "all data");
    assert_becomes(&Some(MIB), || seek_data(&file, 0));
}

/// `blkholefs status` names the file whose answers are data because its device is suspended, until an answer is not.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn the_status_names_a_file_whose_device_is_suspended() {
    let image = Image::with_data(4 * MIB, &[MIB..2 * MIB]);
    let disk = Loop::new(image.path());
    let below = Dm::linear(disk.path());
    let above = Dm::linear(below.path());
    let mount = Mount::new(above.path());
    let file = open(mount.file());
    let degraded = || {
        let status = run(env!("CARGO_BIN_EXE_blkholefs"), ["status".as_ref(), mount.directory().as_os_str()]);
        let name = mount.file().file_name().unwrap().display().to_string();
        let mut lines = status.lines().filter(|line| line.starts_with(&format!("  {name}: degraded to data since 20")));
        lines.next().map(|line| line.rsplit(": ").next().unwrap().to_owned())
    };
    assert_eq!((seek_data(&file, 0), degraded()), (Some(MIB), None));
    for suspended in [&above, &below] {
        suspended.suspend();
        let (seen, reason) = (seek_data(&file, 0), degraded());
        suspended.resume();
        assert_eq!(seen, Some(0), "all data");
        assert_eq!(reason.as_deref(), Some("it, or a device below it, is suspended"));
        assert_becomes(&Some(MIB), || seek_data(&file, 0));
        assert_eq!(degraded(), None);
    }
}

/// No query waits for the suspended lower device of a dense layer, here a crypt device.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_suspended_device_below_a_dense_layer_blocks_only_reads() {
    run("modprobe", ["dm-crypt"]);
    let image = Image::new(4 * MIB);
    let disk = Loop::new(image.path());
    let below = Dm::linear(disk.path());
    let key = "00".repeat(32);
    let device = Dm::new(&format!("0 8192 crypt aes-xts-plain64 {key} 0 {} 0", below.path().display()));
    let mount = Mount::new(device.path());
    let writer = open_for_writing(device.path());
    let (at_once, map) = query_while_suspended(&below, &writer, mount.directory(), mount.file());
    assert!(at_once, "a query waited for the resume of {}", below.name());
    assert_eq!(map, [Extent(Kind::Data, 0..4 * MIB)]);
}

/// The metadata of a pool, or the store of a snapshot, is not read while its device is suspended.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn suspended_metadata_is_not_read() {
    let pool = Pool::with_slow_metadata(64 * MIB, 64 << 10);
    let thin = pool.thin(0, 64 * MIB);
    let mount = Mount::new(thin.path());
    let writer = open_for_writing(thin.path());
    let (at_once, map) = query_while_suspended(pool.slow(), &writer, mount.directory(), mount.file());
    assert!(at_once, "a query waited for the resume of the metadata device");
    assert_eq!(map, [Extent(Kind::Data, 0..64 * MIB)], "all data");
    drop(writer);
    assert_becomes(&Some(MIB + (64 << 10)), || seek_hole(&open(mount.file()), MIB));
}
