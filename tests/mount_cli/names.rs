//! The option `name`: what the file of a mount is called.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::bench::Bench;
use crate::common::check::check;
use crate::common::needs;

/// The names in a directory.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_file_and_its_views_have_the_name() {
    needs!(root);
    let bench = Bench::new();
    bench.mount(&["-o", "compact,name=weekly disk"]);
    assert_eq!(names(&bench.mnt()), ["weekly disk", "weekly disk.qcow2"]);
    check(&bench.mnt().join("weekly disk"), bench.device.path());
    assert!(!bench.file().exists(), "the device's own name");
    assert!(fs::read(bench.mnt().join("weekly disk.qcow2")).unwrap().starts_with(b"QFI\xfb"));
    bench.umount();
}

/// mount(8) has replaced a link by the device when it runs the helper, also in fstab.
#[test]
fn a_name_in_fstab() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount"]);
    let bench = Bench::new();
    let script = "ln -s \"$DEV\" by-id; mount -a -T fstab; ls mnt; umount mnt; rm by-id";
    let link = bench.path("by-id").display().to_string();
    let line = |options: &str| bench.fstab_line(options).replace(bench.device.path().to_str().unwrap(), &link);
    assert_eq!(bench.script(&line("ro"), script).out, format!("{}\n", bench.device.name()));
    let ran = bench.script(&line("ro,nofail,name=by-id"), script);
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("by-id\n", ""));
}

/// The inode number of a path is the same in every mount.
#[test]
fn a_path_has_one_inode_number() {
    needs!(root);
    let bench = Bench::new();
    let number = |options: &str, name: &str| {
        bench.mount(&["-o", options]);
        let number = fs::metadata(bench.mnt().join(name)).unwrap().ino();
        bench.umount();
        number
    };
    let plain = number("ro", bench.device.name());
    assert_eq!(number(&format!("name={}", bench.device.name()), bench.device.name()), plain);
    assert_eq!(number("name=a", "a"), number("name=a,compact", "a"));
    assert_ne!(number("name=a", "a"), number("name=b", "b"));
}

/// A directory has no entries that cannot be looked up.
#[test]
fn a_name_leaves_room_for_the_endings_of_views() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    let mount = |length: usize, more: &str| {
        let options = format!("name={}{more}", "n".repeat(length));
        bench.run("mount.blkholefs", [device, "mnt", "-o", &options])
    };
    let text =
        ": the name would have 256 bytes, and that of a file has at most 255\ngive the file a shorter name with name=";
    mount(250, ",compact").fails(1, text);
    for (length, more) in [(249, ",compact"), (255, "")] {
        mount(length, more).succeeds();
        for name in names(&bench.mnt()) {
            fs::metadata(bench.mnt().join(name)).unwrap();
        }
        bench.umount();
    }
    let long = "i".repeat(250);
    fs::copy(bench.image.path(), bench.path(&long)).unwrap();
    bench.run("mount.blkholefs", [&long, "mnt", "-o", "compact"]).fails(1, text);
    bench.run("mount.blkholefs", [&long, "mnt", "-o", "compact,name=i"]).succeeds();
    bench.umount();
    // The only file of such a mount has the name of the mountpoint.
    fs::write(bench.path("file"), "").unwrap();
    bench.run("mount.blkholefs", [&long, "file", "-o", "compact"]).succeeds();
    assert!(fs::read(bench.path("file")).unwrap().starts_with(b"QFI\xfb"));
    bench.umount_by(&[bench.path("file")]);
}

#[test]
fn a_name_for_none_or_for_many_files_is_refused() {
    needs!(root);
    let bench = Bench::new();
    let device = bench.device.path().to_str().unwrap();
    let image = bench.image.path().to_str().unwrap();
    fs::write(bench.path("file"), "").unwrap();
    for (words, text) in [
        (["/dev", "mnt", "-o", "name=x"], "option 'name' is for one file, and this SPEC has one for each device"),
        ([device, "file", "-o", "name=x"], "option 'name' is not possible: the mountpoint is a file"),
        ([device, "mnt", "-o", "name=a/b"], "option 'name=a/b': expected the name of a file"),
        ([device, "mnt", "-o", "name=.."], "option 'name=..': expected the name of a file"),
        ([device, "mnt", "-o", "name"], "option 'name' needs a value"),
        ([image, "mnt", "-o", "thin_metadata=/m,name=x"], "a thin pool has one for each volume"),
    ] {
        bench.run("mount.blkholefs", words).fails(1, text);
    }
    bench.run("blkholefs", ["map", device, "-o", "name=x"]).fails(1, "option 'name' is for mounts");
}
