//! What changed since an older snapshot, as an image over a copy of that.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::names::names;
use crate::common::image::Image;
use crate::common::mount::Mount;
use crate::common::nbd::{Server, directory};
use crate::common::{KIB, MIB, needs, run, wait_until};
use crate::thin_image::{self, Device};

const BLOCK: u64 = 64 * KIB;

/// Three volumes. 2 is a snapshot of 1 in which block 1 was written, 3 was discarded, 20 and 21 are new. 3 is 1 without its end.
fn pool() -> (tempfile::TempPath, Image) {
    let older: Vec<_> = [(0, 0), (1, 1), (2, 2), (3, 3), (9, 4), (15, 5)].into();
    let newer: Vec<_> = [(0, 0), (1, 6), (2, 2), (9, 4), (15, 5), (20, 7), (21, 8)].into();
    let shorter: Vec<_> = [(0, 0), (1, 1)].into();
    let devices = [(1, older), (2, newer), (3, shorter)].map(|(id, mappings)| Device { id, mappings });
    let metadata = tempfile::Builder::new().prefix("blkholefs-").tempfile().expect("a temporary file").into_temp_path();
    thin_image::restore(&thin_image::xml(&devices), 1024, &metadata);
    (metadata, Image::with_data(MIB, &[0..MIB]))
}

fn mount(metadata: &Path, data: &Path, more: &str) -> Mount {
    Mount::with_options(data, &["-o", &format!("thin_metadata={},{more}", metadata.display())])
}

#[test]
fn an_increment_over_a_copy_of_the_older_volume_is_the_newer_one() {
    needs!(root, programs["thin_restore", "qemu-img", "cp", "cmp"]);
    let (metadata, data) = pool();
    for (older, newer) in [(1, 2), (2, 1), (1, 3), (3, 1), (3, 2)] {
        let mount = mount(&metadata, data.path(), &format!("since={older}"));
        let file = |name: &str| mount.directory().join(name).into_os_string().into_string().unwrap();
        let copies = directory();
        let copy = |name: &str| copies.path().join(name).into_os_string().into_string().unwrap();
        let increment = format!("{newer}.since-{older}.qcow2");
        run("cp", ["--sparse=always", &file(&older.to_string()), &copy(&older.to_string())]);
        run("cp", [file(&increment), copy(&increment)]);
        run("qemu-img", ["check", "-q", &copy(&increment)]);
        // The name of the backing file is that of the copy beside it.
        let newer = file(&newer.to_string());
        run("qemu-img", ["compare", "-q", "-F", "raw", &copy(&increment), &newer]);
        run("qemu-img", ["convert", "-O", "raw", &copy(&increment), &copy("restored")]);
        run("cmp", [&copy("restored"), &newer]);
        run("qemu-img", ["rebase", "-q", "-b", "", "-F", "raw", &copy(&increment)]);
        run("qemu-img", ["compare", "-q", "-F", "raw", &copy(&increment), &newer]);
    }
}

#[test]
fn committed_into_the_copy_it_is_the_newer_volume() {
    needs!(root, programs["thin_restore", "qemu-img", "cp", "cmp"]);
    let (metadata, data) = pool();
    let mount = mount(&metadata, data.path(), "since=1,backing=full.raw");
    let copies = directory();
    let copy = |name: &str| copies.path().join(name).into_os_string().into_string().unwrap();
    run("cp", [mount.directory().join("1").as_os_str(), copy("full.raw").as_ref()]);
    run("cp", [mount.directory().join("2.since-1.qcow2").as_os_str(), copy("increment").as_ref()]);
    run("qemu-img", ["commit", "-q", &copy("increment")]);
    run("cmp", [mount.directory().join("2").as_os_str(), copy("full.raw").as_ref()]);
}

#[test]
fn an_increment_holds_what_changed_and_no_more() {
    needs!(root, programs["thin_restore", "qemu-img"]);
    let (metadata, data) = pool();
    let mount = mount(&metadata, data.path(), "compact,since=1");
    let expected = ["1", "1.qcow2", "2", "2.qcow2", "2.since-1.qcow2", "3", "3.qcow2", "3.since-1.qcow2"];
    assert_eq!(names(mount.directory()), expected);
    let increment = mount.directory().join("2.since-1.qcow2");
    // The copy is beside an empty file of the name of its backing file.
    let copies = directory();
    fs::write(copies.path().join("1"), []).unwrap();
    fs::copy(&increment, copies.path().join("increment")).unwrap();
    let map = run("qemu-img", ["map", "--output=json", copies.path().join("increment").to_str().unwrap()]);
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let own = |kind: &str| {
        let mut found = Vec::new();
        for extent in
            map.iter().filter(|extent| extent["depth"] == 0 && extent["present"] == true && extent[kind] == true)
        {
            let start = extent["start"].as_u64().unwrap();
            found.push((start / BLOCK, (start + extent["length"].as_u64().unwrap()) / BLOCK));
        }
        found
    };
    assert_eq!(own("data"), [(1, 2), (20, 22)]);
    assert!(own("zero").contains(&(3, 4)), "{map:?}");
    assert!(fs::metadata(&increment).unwrap().len() <= 9 * BLOCK);
}

#[test]
fn what_cannot_be_compared_is_refused_with_the_reason() {
    needs!(root, programs["thin_restore"]);
    let (metadata, data) = pool();
    let refused = |options: &str, spec: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blkholefs"));
        let place = directory();
        let output = command.args(["mount", "-f", "-o", options]).arg(spec).arg(place.path()).output().unwrap();
        assert!(!output.status.success(), "{options}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let offline = format!("thin_metadata={}", metadata.display());
    let error = refused(&format!("{offline},since=9"), data.path());
    assert!(error.contains("9"), "{error}");
    assert!(refused(&format!("{offline},since=x"), data.path()).contains("expected the id of a volume"));
    let error = refused("since=other", data.path());
    assert!(error.contains("other"), "{error}");
}

/// A device of device-mapper may have such a name. QEMU takes what is before a colon for a protocol.
#[test]
fn the_name_of_the_older_snapshot_is_no_protocol_and_its_format_is_raw() {
    needs!(root, programs["qemu-nbd", "qemu-img"]);
    for bitmap in ["a:b", "b0.qcow2", "with space"] {
        let copies = directory();
        let disk = copies.path().join("disk");
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        run("qemu-img", ["create", "-q", "-f", "qcow2", &text(&disk), "1M"]);
        run("qemu-img", ["bitmap", "--add", &text(&disk), bitmap]);
        let socket = copies.path().join("socket");
        let mut server = Command::new("qemu-nbd");
        server.args([
            "-r",
            "-t",
            "-e",
            "0",
            "-f",
            "qcow2",
            "-x",
            "disk",
            "-B",
            bitmap,
            "-k",
            &text(&socket),
            &text(&disk),
        ]);
        let server = Stopped(server.spawn().unwrap());
        assert!(wait_until(|| std::os::unix::net::UnixStream::connect(&socket).is_ok()));
        let uri = format!("nbd+unix:///disk?socket={}", text(&socket));
        let mount = Mount::with_options(Path::new(&uri), &["-o", &format!("since={bitmap}")]);
        let name = names(mount.directory()).into_iter().find(|name| name.ends_with(".qcow2")).unwrap();
        let copy = copies.path().join("increment");
        fs::copy(mount.directory().join(name), &copy).unwrap();
        let info = run("qemu-img", ["info", "--output=json", &text(&copy)]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["backing-filename-format"], "raw");
        // QEMU opens the file beside the image.
        fs::write(copies.path().join(bitmap), vec![7; 1 << 20]).unwrap();
        let restored = text(&copies.path().join("restored"));
        run("qemu-img", ["convert", "-O", "raw", &text(&copy), &restored]);
        assert_eq!(fs::read(&restored).unwrap()[0], 7, "nothing has changed");
        drop((mount, server));
    }
}

/// A process that is ended with this value.
struct Stopped(std::process::Child);

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_dirty_bitmap_of_a_server_is_an_older_state() {
    needs!(root, programs["qemu-img", "qemu-io", "qemu-nbd", "cp"]);
    let copies = directory();
    let copy = |name: &str| copies.path().join(name).into_os_string().into_string().unwrap();
    run("qemu-img", ["create", "-q", "-f", "qcow2", &copy("disk"), "64M"]);
    run("qemu-io", ["-c", "write -P 1 0 4M", &copy("disk")]);
    run("qemu-img", ["convert", "-O", "raw", &copy("disk"), &copy("older")]);
    run("qemu-img", ["bitmap", "--add", &copy("disk"), "monday"]);
    run("qemu-io", ["-c", "write -P 2 1M 64k", "-c", "write -P 3 20M 128k", "-c", "discard 3M 512k", &copy("disk")]);
    run("qemu-img", ["bitmap", "--disable", &copy("disk"), "monday"]);
    run("qemu-img", ["convert", "-O", "raw", &copy("disk"), &copy("newer")]);
    let socket = copies.path().join("socket");
    let _server = Server::qemu(&socket, &["--read-only", "--bitmap=monday", "--format=qcow2", &copy("disk")]);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let mount = Mount::with_options(Path::new(&uri), &["-o", "since=monday,backing=older"]);
    let names = names(mount.directory());
    let view = names.iter().find(|name| name.ends_with(".since-monday.qcow2")).expect("the view");
    run("cp", [mount.directory().join(view).as_os_str(), copy("increment").as_ref()]);
    run("qemu-img", ["compare", "-q", "-F", "raw", &copy("increment"), &copy("newer")]);
    assert!(fs::metadata(copy("increment")).unwrap().len() < MIB);
}
