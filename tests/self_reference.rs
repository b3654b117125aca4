//! Devices whose lower device is a file of the mount that shows them. No request may wait for itself.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use common::check::{check_same_bytes, map_holes, map_of};
use common::image::Image;
use common::loop_device::Loop;
use common::mount::Mount;
use common::{MIB, needs, run, wait_until};

/// Runs all of `work` at the same time; panics when it does not end.
fn all_at_once(work: Vec<Box<dyn FnOnce() + Send>>) {
    let threads: Vec<_> = work.into_iter().map(thread::spawn).collect();
    assert!(wait_until(|| threads.iter().all(thread::JoinHandle::is_finished)), "a thread does not end");
    threads.into_iter().for_each(|thread| thread.join().expect("the work succeeds"));
}

/// A file of the mount is bound to a loop device, as `mount -o loop` does it, and the mount shows that device too.
#[test]
fn a_loop_device_over_a_file_of_its_own_mount_does_not_deadlock() {
    needs!(root);
    let nodes = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    let image = Image::with_data(16 * MIB, &[MIB..2 * MIB]);
    let device = Loop::new(image.path());
    let show = |device: &Loop, name: &str| {
        run("cp", ["--archive".as_ref(), device.path().as_os_str(), nodes.path().join(name).as_os_str()]);
    };
    show(&device, "disk");
    let mount = Mount::new(nodes.path());
    let disk = mount.directory().join("disk");
    let upper = Loop::with_options(&disk, &["--read-only"]);
    show(&upper, "upper");
    let shown = mount.directory().join("upper");
    // There are more readers than threads of the daemon, and each reads a device whose bytes come from the daemon.
    let reader = |_| {
        let (shown, device) = (shown.clone(), device.path().to_owned());
        Box::new(move || {
            fs::metadata(&shown).expect("stat");
            check_same_bytes(&shown, &device);
            // Only the daemon itself could report the holes of this device.
            assert_eq!(map_holes(&shown), [common::check::Extent(common::check::Kind::Data, 0..16 * MIB)]);
        }) as Box<dyn FnOnce() + Send>
    };
    all_at_once((0..12).map(reader).collect());
    assert_eq!(map_holes(&disk), map_of(16 * MIB, &[MIB..2 * MIB]), "other files keep their maps");
    fs::remove_file(nodes.path().join("upper")).expect("the node is ours");
    drop(upper);
}

/// The mount lies in the directory that it shows.
#[test]
fn a_mount_inside_its_spec_does_not_deadlock() {
    needs!(root);
    let image = Image::with_data(MIB, &[0..4096]);
    let device = Loop::new(image.path());
    let nodes = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    run("cp", ["--archive".as_ref(), device.path().as_os_str(), nodes.path().join("disk").as_os_str()]);
    let mount = Mount::inside(nodes.path());
    let directory = mount.directory().to_owned();
    let find = move |_| {
        let directory = directory.clone();
        Box::new(move || {
            let found = run("find", [directory.as_os_str()]);
            let disk = directory.join("disk");
            assert_eq!(found.lines().collect::<Vec<_>>(), [directory.to_str(), disk.to_str()].map(Option::unwrap));
        }) as Box<dyn FnOnce() + Send>
    };
    all_at_once((0..8).map(find).collect());
    drop(mount);
}

/// Two mounts, each in the directory that the other one shows. The paths would be endless, and each step would double
/// the number of requests between the mounts.
#[test]
fn two_mounts_inside_the_specs_of_each_other_do_not_deadlock() {
    needs!(root);
    let image = Image::with_data(MIB, &[0..4096]);
    let device = Loop::new(image.path());
    let nodes =
        [(); 2].map(|()| tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory"));
    for nodes in &nodes {
        fs::create_dir(nodes.path().join("below")).expect("the directory is ours");
        run("cp", ["--archive".as_ref(), device.path().as_os_str(), nodes.path().join("below/disk").as_os_str()]);
    }
    let first = Mount::of_inside(nodes[0].path(), nodes[1].path());
    let second = Mount::of_inside(nodes[1].path(), &nodes[0].path().join("below"));
    let name = |mount: &Mount| mount.directory().file_name().expect("a name").to_owned();
    // Through the second one, to the first, and so on: what was looked up before the second one was there does not
    // help.
    let mut path = first.directory().join("below").join(name(&second));
    for _ in 0..8 {
        path = path.join(name(&first)).join("below").join(name(&second));
    }
    let find = move |directory: &Path| {
        let directory = directory.to_owned();
        Box::new(move || {
            let found = run("find", [directory.as_os_str()]);
            let expected = ["", "/below", "/below/disk"].map(|path| format!("{}{path}", directory.display()));
            assert_eq!(found.lines().collect::<Vec<_>>(), expected);
        }) as Box<dyn FnOnce() + Send>
    };
    let look = Box::new(move || {
        let error = fs::metadata(path).expect_err("a mount in the SPEC is not shown");
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    });
    all_at_once(vec![look, find(first.directory()), find(second.directory())]);
    drop(second);
    drop(first);
}

/// A mount that covers its own SPEC could reach it only through itself.
#[test]
fn a_mount_over_its_spec_is_refused() {
    needs!(root);
    let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    let image = directory.path().join("image");
    fs::File::create(&image).and_then(|file| file.set_len(MIB)).expect("the directory is ours");
    for (spec, place) in [(&*image, directory.path()), (&image, &image), (directory.path(), directory.path())] {
        let refused = mount(spec, place);
        assert!(refused.contains("the mount would cover what it shows"), "{refused}");
    }
}

/// Runs `blkholefs mount`, which must fail, and returns its standard error.
fn mount(spec: &Path, place: &Path) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_blkholefs")).arg("mount").args([spec, place]).output();
    let output = output.expect("the program starts");
    assert_eq!(output.status.code(), Some(32));
    String::from_utf8(output.stderr).expect("text")
}
