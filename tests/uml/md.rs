//! Software RAID arrays.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::common::check::{Extent, Kind, assert_map, check, map_holes, map_of};
use crate::common::image::write;
use crate::common::mount::Mount;
use crate::common::{KIB, MIB, assert_becomes, needs, run, try_run, wait_until};
use crate::targets::Disk;

/// An array. Dropping this value stops it, and panics when the array is still in use.
pub struct Array {
    pub path: PathBuf,
    legs: Vec<Disk>,
}

impl Array {
    /// An array of legs of these sizes; `words` are additional arguments for `mdadm --create`. The modules must be loaded.
    pub fn new(words: &[&str], sizes: &[u64]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let legs: Vec<_> = sizes.iter().map(|size| Disk::new(*size, &[])).collect();
        let free = std::iter::repeat_with(|| format!("/dev/md{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let mut free = free.skip_while(|path| Path::new(path).exists());
        let path = PathBuf::from(free.next().expect("numbers do not end"));
        let count = format!("--raid-devices={}", legs.len());
        let legs_of = legs.iter().map(|leg| leg.path().to_string());
        let fixed = ["--create", path.to_str().expect("text"), "--run", "--quiet", "--metadata=1.2", &count];
        let arguments: Vec<String> = fixed.iter().chain(words).map(|word| (*word).to_owned()).chain(legs_of).collect();
        run("mdadm", arguments);
        assert!(wait_until(|| path.exists()), "{} does not appear", path.display());
        Self { path, legs }
    }

    fn size(&self) -> u64 {
        crate::common::dm::sectors(&self.path) * 512
    }

    fn attribute(&self, name: &str) -> PathBuf {
        let array = self.path.file_name().expect("a path in /dev");
        Path::new("/sys/block").join(array).join("md").join(name)
    }

    /// Checks that the map has exactly these ranges as data, and that it agrees with the device.
    fn assert_map(&self, data: &[std::ops::Range<u64>]) {
        let mount = Mount::new(&self.path);
        assert_eq!(map_holes(mount.file()), map_of(self.size(), data), "{}", mount.log());
        check(mount.file(), &self.path);
    }

    fn assert_dense(&self, reason: &str) {
        let mount = Mount::new(&self.path);
        assert_eq!(map_holes(mount.file()), [Extent(Kind::Data, 0..self.size())]);
        assert!(mount.log().contains(reason), "{}", mount.log());
        check(mount.file(), &self.path);
    }
}

impl Drop for Array {
    fn drop(&mut self) {
        let path = self.path.to_str().expect("text");
        let mut stopped = Ok(String::new());
        let gone = wait_until(|| {
            stopped = try_run("mdadm", ["--stop", "--quiet", path], "");
            stopped.is_ok()
        });
        assert!(gone || std::thread::panicking(), "{path} is still held: {stopped:?}");
    }
}

const LEG: u64 = 8 * MIB;

#[test]
#[ignore = "needs a kernel with md: run tests/run"]
fn raid1_has_a_hole_where_all_legs_have_one() {
    needs!(modules["md-mod", "raid1"]);
    let array = Array::new(&["--level=1", "--assume-clean"], &[LEG, LEG]);
    array.assert_map(&[]);
    let mount = Mount::new(&array.path);
    write(&array.path, MIB..MIB + 64 * KIB);
    assert_eq!(map_holes(mount.file()), map_of(array.size(), &[MIB..MIB + 64 * KIB]), "a write while it is open");
    drop(mount);
    array.assert_map(&[MIB..MIB + 64 * KIB]);
    let mount = Mount::new(&array.path);
    assert_eq!(map_holes(mount.file()).len(), 3);
    let leg = array.legs[1].path().to_string();
    run("mdadm", ["--quiet", array.path.to_str().expect("text"), "--fail", &leg]);
    assert_eq!(map_holes(mount.file()).len(), 1, "it became degraded while it was open");
    drop(mount);
    array.assert_dense("degraded");
}

#[test]
#[ignore = "needs a kernel with md: run tests/run"]
fn raid1_that_resyncs_is_dense() {
    needs!(modules["md-mod", "raid1"]);
    let array = Array::new(&["--level=1", "--assume-clean"], &[LEG, LEG]);
    write(&array.path, MIB..MIB + 64 * KIB);
    let limit = |speed: &str| {
        for attribute in ["sync_speed_min", "sync_speed_max"] {
            std::fs::write(array.attribute(attribute), speed).expect("a speed in KiB/s, or the system's");
        }
    };
    for action in ["check", "repair"] {
        limit("1");
        std::fs::write(array.attribute("sync_action"), action).expect("the array can be checked");
        array.assert_dense(&format!("its sync_action is {action}"));
        std::fs::write(array.attribute("sync_action"), "idle").expect("the check can be ended");
        // Some kernels continue an interrupted check to its end.
        limit("system");
        assert_becomes(&"idle\n".to_owned(), || {
            std::fs::read_to_string(array.attribute("sync_action")).expect("a state")
        });
    }
    let mount = Mount::new(&array.path);
    assert_map(mount.file(), &map_of(array.size(), &[MIB..MIB + 64 * KIB]));
    check(mount.file(), &array.path);
}

#[test]
#[ignore = "needs a kernel with md: run tests/run"]
fn raid0_has_the_holes_of_its_legs() {
    needs!(modules["md-mod", "raid0"]);
    let array = Array::new(&["--level=0", "--chunk=64"], &[LEG, LEG, LEG]);
    array.assert_map(&[]);
    let data = [64 * KIB..256 * KIB, MIB + 32 * KIB..MIB + 36 * KIB, array.size() - 4 * KIB..array.size()];
    data.iter().for_each(|range| write(&array.path, range.clone()));
    array.assert_map(&data);
}

#[test]
#[ignore = "needs a kernel with md: run tests/run"]
fn raid0_with_legs_of_two_lengths_is_dense() {
    needs!(modules["md-mod", "raid0"]);
    // The kernel starts such an array only with an explicit layout (`drivers/md/raid0.c`).
    std::fs::write("/sys/module/raid0/parameters/default_layout", "2").expect("the module is there");
    Array::new(&["--level=0", "--chunk=64"], &[LEG, 2 * LEG]).assert_dense("legs differ in length");
}

#[test]
#[ignore = "needs a kernel with md: run tests/run"]
fn linear_has_the_holes_of_its_legs() {
    needs!(modules["md-mod", "linear"]);
    let array = Array::new(&["--level=linear"], &[LEG, 2 * LEG]);
    let first = LEG / 2;
    write(&array.path, first..first + 8 * KIB);
    write(&array.path, 2 * LEG..2 * LEG + 4 * KIB);
    array.assert_map(&[first..first + 8 * KIB, 2 * LEG..2 * LEG + 4 * KIB]);
}

#[test]
#[ignore = "needs a kernel with md: run tests/run"]
fn raid10_has_a_hole_where_all_copies_have_one() {
    needs!(modules["md-mod", "raid10"]);
    for (layout, legs) in [("n2", 4), ("n2", 2), ("n3", 3)] {
        let words = ["--level=10", "--chunk=64", &format!("--layout={layout}"), "--assume-clean"];
        let array = Array::new(&words, &vec![LEG; legs]);
        array.assert_map(&[]);
        let data = [64 * KIB..128 * KIB, MIB + 32 * KIB..MIB + 36 * KIB, array.size() - 4 * KIB..array.size()];
        data.iter().for_each(|range| write(&array.path, range.clone()));
        array.assert_map(&data);
    }
    let words = |layout| ["--level=10", "--chunk=64", layout, "--assume-clean"];
    Array::new(&words("--layout=f2"), &[LEG; 2]).assert_dense("layout");
    Array::new(&words("--layout=o2"), &[LEG; 2]).assert_dense("layout");
    Array::new(&words("--layout=n2"), &[LEG; 3]).assert_dense("divide");
}

#[test]
#[ignore = "needs a kernel with md: run tests/run"]
fn raid_with_parity_is_dense() {
    needs!(modules["md-mod", "raid456"]);
    Array::new(&["--level=5", "--assume-clean"], &[LEG; 3]).assert_dense("raid5");
}
