//! A compact image: a qcow2 image of the device.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirEntryExt as _, FileExt as _, MetadataExt as _};
use std::path::Path;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{check_image, read_at, view};
use crate::common::check::{check_blocks, open};
use crate::common::image::{Image, open_for_writing};
use crate::common::loop_device::Loop;
use crate::common::mount::{LoopMount, Mount};
use crate::common::nbd::{Server, directory, image};
use crate::common::random::Random;
use crate::common::{KIB, MIB, assert_becomes, needs, run};

const COMPACT: &[&str] = &["-o", "compact"];

/// A loop device of `size` bytes with data in the ranges, mounted with a compact image.
fn mounted(size: u64, data: &[std::ops::Range<u64>]) -> (Mount, Loop, Image) {
    let image = Image::with_data(size, data);
    let device = Loop::new(image.path());
    let mount = Mount::with_options(device.path(), COMPACT);
    (mount, device, image)
}

#[test]
fn qemu_finds_the_device_in_the_image_and_restores_it() {
    needs!(root, programs["qemu-img", "cp", "cmp"]);
    for (size, data) in [
        (512 * MIB, vec![0..MIB, 100 * MIB + 4 * KIB..101 * MIB, 511 * MIB..512 * MIB]),
        (64 * MIB, vec![]),
        (16 * MIB, vec![0..16 * MIB]),
        (MIB + 3 * 512, vec![MIB..MIB + 512]),
    ] {
        let (mount, device, _image) = mounted(size, &data);
        let view = view(&mount, ".qcow2");
        check_image(&view, device.path());
        let directory = directory();
        let (copy, restored) = (directory.path().join("copy.qcow2"), directory.path().join("restored"));
        run("cp", [&view, &copy]);
        assert_eq!(fs::metadata(&copy).unwrap().len(), fs::metadata(&view).unwrap().len());
        check_image(&copy, device.path());
        run("qemu-img", ["convert".as_ref(), "-O".as_ref(), "raw".as_ref(), copy.as_os_str(), restored.as_os_str()]);
        run("cmp", [&*restored, device.path()]);
    }
}

#[test]
fn the_attributes_are_exact_before_and_while_the_image_is_open() {
    needs!(root);
    let (mount, _device, _image) = mounted(256 * MIB, &[MIB..2 * MIB]);
    let view = view(&mount, ".qcow2");
    let before = fs::metadata(&view).unwrap();
    let file = open(&view);
    let open = file.metadata().unwrap();
    assert_eq!((before.len(), before.ino(), before.mtime_nsec()), (open.len(), open.ino(), open.mtime_nsec()));
    let exact = fs::metadata(mount.file()).unwrap();
    assert_eq!((exact.mtime(), exact.mtime_nsec()), (open.mtime(), open.mtime_nsec()));
    assert_eq!((exact.mode(), exact.uid(), exact.gid()), (open.mode(), open.uid(), open.gid()));
    let mut bytes = vec![0; 4 * MIB as usize];
    assert_eq!(file.read_at(&mut bytes, 0).unwrap() as u64, open.len(), "all of it and no more");
    assert!(open.len() < 2 * MIB && open.blocks() * 512 == open.len());
    check_blocks(&view);
    // A program that asks for no attributes before it reads gets everything.
    assert_eq!(fs::read(&view).unwrap().len() as u64, open.len());
}

#[test]
fn random_pieces_are_those_of_the_whole_image() {
    needs!(root, programs["dd"]);
    let mut random = Random::new(Random::seed_or(12));
    let data: Vec<_> =
        (0..60).map(|_| random.range(200 * MIB, 4 * KIB)).map(|r| r.start..r.end.min(r.start + 300 * KIB)).collect();
    let (mount, device, _image) = mounted(200 * MIB, &data);
    let view = view(&mount, ".qcow2");
    let whole = fs::read(&view).unwrap();
    let file = open(&view);
    for _ in 0..300 {
        let start = random.within(0..whole.len() as u64);
        let length = random.within(1..300 * KIB).min(whole.len() as u64 - start) as usize;
        assert_eq!(read_at(&file, start, length), whole[start as usize..start as usize + length], "{start} {length}");
    }
    let directory = directory();
    let direct = directory.path().join("direct.qcow2");
    let (from, to) = (format!("if={}", view.display()), format!("of={}", direct.display()));
    run("dd", [&*from, &to, "bs=1M", "iflag=direct", "status=none"]);
    assert!(fs::read(&direct).unwrap() == whole, "read with and without O_DIRECT");
    check_image(&direct, device.path());
}

#[test]
fn an_open_image_keeps_its_layout_and_a_new_one_has_what_was_written() {
    needs!(root, programs["qemu-img"]);
    let (mount, device, _image) = mounted(64 * MIB, &[MIB..2 * MIB]);
    let path = view(&mount, ".qcow2");
    let old = open(&path);
    let (len, first) = (old.metadata().unwrap().len(), read_at(&old, 0, 512 * KIB as usize));
    let writer = open_for_writing(device.path());
    writer.write_all_at(&[7; 64 << 10], 32 * MIB).unwrap();

    let new = open(&path);
    let (old_now, new_now) = (old.metadata().unwrap(), new.metadata().unwrap());
    assert_eq!((old_now.len(), new_now.len()), (len, len + 64 * KIB));
    assert_eq!(old_now.ino(), new_now.ino(), "the number of a path");
    assert!(read_at(&old, 0, 512 * KIB as usize) == first);
    check_image(&path, device.path());
    // By a link to the open file: the same open image.
    let again = open(Path::new(&format!("/proc/self/fd/{}", old.as_raw_fd())));
    assert_eq!(again.metadata().unwrap().len(), len);
    drop((old, new, again));
    assert_eq!(fs::metadata(&path).unwrap().len(), len + 64 * KIB);
}

#[test]
fn a_device_that_became_shorter_is_an_error() {
    needs!(root);
    let (mount, device, image) = mounted(64 * MIB, &[0..MIB, 63 * MIB..64 * MIB]);
    let file = open(&view(&mount, ".qcow2"));
    let len = file.metadata().unwrap().len();
    image.resize(32 * MIB);
    device.losetup(&["-c"]);
    let mut bytes = vec![0; 64 << 10];
    let error = file.read_exact_at(&mut bytes, len - 128 * KIB).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

#[test]
fn the_cluster_size_is_the_users() {
    needs!(root, programs["qemu-img"]);
    let image = Image::with_data(64 * MIB, &[4 * KIB..8 * KIB, 40 * MIB..41 * MIB]);
    for size in ["4K", "16K", "128K", "2M"] {
        let mount = Mount::with_options(image.path(), &["-o", &format!("compact,cluster_size={size}")]);
        let view = view(&mount, ".qcow2");
        check_image(&view, image.path());
        let info = run("qemu-img", ["info", "--output=json", view.to_str().unwrap()]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        let expected =
            size.trim_end_matches(['K', 'M']).parse::<u64>().unwrap() << if size.ends_with('K') { 10 } else { 20 };
        assert_eq!(info["cluster-size"], expected);
    }
    for wrong in ["512", "4M", "65K", "x"] {
        let option = format!("compact,cluster_size={wrong}");
        let mut command = Command::new(env!("CARGO_BIN_EXE_blkholefs"));
        let output =
            command.args(["mount", "-f", "-o", &option]).arg(image.path()).arg("/nonexistent").output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("a power of two from 4K to 2M"), "{output:?}");
    }
}

#[test]
fn an_image_is_a_backing_file() {
    needs!(root, programs["qemu-img", "qemu-io"]);
    let (mount, device, _image) = mounted(64 * MIB, &[MIB..2 * MIB]);
    let directory = directory();
    let overlay = directory.path().join("overlay.qcow2");
    let (backing, overlay) = (view(&mount, ".qcow2"), overlay.to_str().unwrap().to_owned());
    run("qemu-img", ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing.to_str().unwrap(), &overlay]);
    run("qemu-img", ["compare", "-q", "-F", "raw", &overlay, device.path().to_str().unwrap()]);
    run("qemu-io", ["-c", "write -P 9 1M 64K", &overlay]);
    run("qemu-io", ["-c", "read -P 9 1M 64K", &overlay]);
    run("qemu-img", ["check", "-q", &overlay]);
}

#[test]
fn an_export_of_a_server_has_an_image() {
    needs!(root, programs["qemu-img", "nbdkit"]);
    let directory = directory();
    let (raw, socket) = (directory.path().join("raw"), directory.path().join("socket"));
    image(&raw, 64 * MIB, &[0..256, 5120..5379]);
    let _server = Server::nbdkit(&socket, &["file", raw.to_str().unwrap()]);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let mount = Mount::with_options(Path::new(&uri), COMPACT);
    let names: Vec<_> = fs::read_dir(mount.directory()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let view = names.iter().find(|name| name.extension().is_some_and(|ending| ending == "qcow2")).unwrap();
    check_image(view, &raw);
    assert!(fs::metadata(view).unwrap().len() < 3 * MIB);
}

#[test]
fn a_server_is_asked_for_many_extents_at_once() {
    needs!(root, programs["qemu-img", "nbdkit", "cp"]);
    let directory = directory();
    let place = |name: &str| directory.path().join(name);
    image(&place("raw"), 256 * MIB, &(0..500).map(|index| index * 128..index * 128 + 16).collect::<Vec<_>>());
    let log = format!("logfile={}", place("log").display());
    let words = ["-r", "--filter=log", "file", place("raw").to_str().unwrap(), &log].map(str::to_owned);
    let _server = Server::nbdkit(&place("socket"), &words.each_ref().map(String::as_str));
    let uri = format!("nbd+unix:///disk?socket={}", place("socket").display());
    let mount = Mount::with_options(Path::new(&uri), COMPACT);
    run("cp", [mount.directory().join("disk.qcow2"), place("copy")]);
    check_image(&place("copy"), &place("raw"));
    // There are 1000 extents. They are asked for an open, and for the attributes before and after it.
    let asked = fs::read_to_string(place("log")).unwrap().matches(" Extents ").count();
    assert!((1..200).contains(&asked), "{asked} queries");
}

/// Without a lookup, as a mount on a regular file has none, an image that is out of date cannot give way to a new one.
#[test]
fn a_mount_on_a_file_has_one_image_at_a_time() {
    needs!(root, programs["qemu-img"]);
    let source = Image::with_data(64 * MIB, &[MIB..2 * MIB]);
    let point = Image::new(0);
    let mount = MountOnFile::new(source.path(), point.path(), "compact");
    check_image(point.path(), source.path());
    let first = open(point.path());
    assert_eq!(File::open(point.path()).unwrap_err().raw_os_error(), Some(libc::EBUSY));
    drop(first);
    source.write(10 * MIB..11 * MIB);
    check_image(point.path(), source.path());
    drop(mount);

    let mut command = Command::new(env!("CARGO_BIN_EXE_blkholefs"));
    let output = command.args(["mount", "-o", "compact,used"]).arg(source.path()).arg(point.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("choose one"), "{output:?}");
}

/// A mount on a regular file, which is unmounted when this is dropped.
struct MountOnFile<'a>(&'a Path);

impl<'a> MountOnFile<'a> {
    fn new(spec: &Path, point: &'a Path, options: &str) -> Self {
        let program = env!("CARGO_BIN_EXE_blkholefs");
        run(program, ["mount".as_ref(), "-o".as_ref(), options.as_ref(), spec.as_os_str(), point.as_os_str()]);
        Self(point)
    }
}

impl Drop for MountOnFile<'_> {
    fn drop(&mut self) {
        run(env!("CARGO_BIN_EXE_blkholefs"), ["umount".as_ref(), self.0.as_os_str()]);
    }
}

#[test]
fn a_device_that_nobody_has_open_is_free() {
    needs!(root);
    let LoopMount { mount, device, image } = LoopMount::new(MIB, &[0..4 * KIB]);
    drop(mount);
    let mount = Mount::with_options(device.path(), COMPACT);
    fs::read(view(&mount, ".qcow2")).unwrap();
    assert!(fs::metadata(view(&mount, ".qcow2")).is_ok());
    // A device that is still open would be detached only later (autoclear).
    assert_becomes(&false, || mount.has_open(device.path()));
    drop((mount, device, image));
}

#[test]
fn a_copy_of_a_device_that_is_written_has_each_byte_of_some_time() {
    needs!(root, programs["qemu-img"]);
    let (mount, device, _image) = mounted(32 * MIB, &[0..MIB]);
    let writer = open_for_writing(device.path());
    for round in 0..20_u8 {
        writer.write_all_at(&[round + 1; 128 << 10], u64::from(round) * MIB).unwrap();
        let path = view(&mount, ".qcow2");
        check_image(&path, device.path());
    }
    let lost = io::Error::last_os_error;
    assert!(fs::metadata(mount.file()).is_ok(), "{}", lost());
}

#[test]
fn copies_that_begin_at_the_same_time_find_one_inode_number() {
    needs!(root);
    let (mount, _device, _image) = mounted(64 * MIB, &[MIB..2 * MIB]);
    let path = view(&mount, ".qcow2");
    let whole = fs::read(&path).unwrap();
    thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                for _ in 0..10 {
                    // As cp does: it skips a file that has another number after the open.
                    let before = fs::metadata(&path).unwrap();
                    let file = open(&path);
                    let after = file.metadata().unwrap();
                    assert_eq!((before.ino(), before.len()), (after.ino(), after.len()));
                    assert!(read_at(&file, 0, whole.len()) == whole);
                }
            });
        }
    });
    let listed = fs::read_dir(mount.directory()).unwrap().map(|entry| entry.unwrap());
    let listed = listed.filter(|entry| entry.path() == path).map(|entry| entry.ino()).collect::<Vec<_>>();
    assert_eq!(listed, [fs::metadata(&path).unwrap().ino()]);
}

/// Copies all of `from`, and asks for no attributes.
fn sendfile(from: &File, to: &File) -> u64 {
    let mut sum = 0;
    loop {
        // SAFETY: both descriptors are open, and there is no pointer.
        let sent = unsafe { libc::sendfile(to.as_raw_fd(), from.as_raw_fd(), ptr::null_mut(), 1 << 20) };
        match u64::try_from(sent).expect("sendfile succeeds") {
            0 => return sum,
            some => sum += some,
        }
    }
}

#[test]
fn a_program_that_asks_for_no_length_gets_all_of_an_image_that_grows() {
    needs!(root);
    let (mount, device, _image) = mounted(128 * MIB, &[]);
    let path = view(&mount, ".qcow2");
    let writer = open_for_writing(device.path());
    let is_written = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for cluster in 0..1000 {
                writer.write_all_at(&[7; 4096], cluster * 128 * KIB).unwrap();
                writer.sync_data().unwrap();
            }
            is_written.store(true, Ordering::Relaxed);
        });
        for _ in 0..3 {
            scope.spawn(|| {
                while !is_written.load(Ordering::Relaxed) {
                    let file = open(&path);
                    let sent = sendfile(&file, &tempfile::tempfile().unwrap());
                    let exact = file.metadata().unwrap().len();
                    assert!(sent >= exact, "{sent} bytes of {exact}");
                }
            });
        }
    });
}
