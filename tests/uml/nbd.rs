//! The kernel's NBD device: its bytes come through the kernel, its holes on a connection beside it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::common::check::{Extent, Kind, assert_map, check, map_holes, map_of, seek_data};
use crate::common::dm::Dm;
use crate::common::image::{Image, write};
use crate::common::mount::Mount;
use crate::common::nbd::{Server, directory};
use crate::common::{KIB, MIB, run, wait_until};

const SIZE: u64 = 32 * MIB;
const DATA: [std::ops::Range<u64>; 3] = [0..4 * KIB, 8 * MIB..9 * MIB, SIZE - 64 * KIB..SIZE];

/// There is one device.
static ONE: Mutex<()> = Mutex::new(());

/// `/dev/nbd0` connected to a server, disconnected with this value.
struct Kernel {
    _server: Server,
    image: Image,
    directory: tempfile::TempDir,
    _one: MutexGuard<'static, ()>,
}

impl Kernel {
    fn new(data: &[std::ops::Range<u64>]) -> Self {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        run("modprobe", ["nbd", "nbds_max=2"]);
        let (image, directory) = (Image::with_data(SIZE, data), directory());
        let socket = directory.path().join("s");
        let server = Server::nbdkit(&socket, &["file", image.path().to_str().expect("text")]);
        run("nbd-client", ["-unix".as_ref(), socket.as_os_str(), Self::path().as_os_str()]);
        Self { _server: server, image, directory, _one: one }
    }

    fn path() -> &'static Path {
        Path::new("/dev/nbd0")
    }

    fn option(&self, socket: &str) -> String {
        format!("nbd=nbd+unix:///?socket={}", self.directory.path().join(socket).display())
    }

    fn mount(&self, device: &Path) -> Mount {
        Mount::with_options(device, &["-o", &self.option("s")])
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        run("nbd-client", ["-d", "/dev/nbd0"]);
        let size = PathBuf::from("/sys/block/nbd0/size");
        let gone = wait_until(|| std::fs::read_to_string(&size).is_ok_and(|size| size.trim() == "0"));
        assert!(gone || std::thread::panicking(), "nbd0 stays connected");
    }
}

#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn a_device_with_and_without_its_export() {
    let kernel = Kernel::new(&DATA);
    {
        let mount = Mount::new(Kernel::path());
        assert_eq!(map_holes(mount.file()), [Extent(Kind::Data, 0..SIZE)]);
        assert!(mount.log().contains("-o nbd=URI"), "{}", mount.log());
        check(mount.file(), Kernel::path());
    }
    {
        let mount = kernel.mount(Kernel::path());
        assert_eq!(map_holes(mount.file()), map_of(SIZE, &DATA), "{}", mount.log());
        check(mount.file(), Kernel::path());
    }
    // Another export, or none.
    let other = kernel.directory.path().join("other");
    let _other = Server::nbdkit(&other, &["memory", "16M"]);
    for (socket, why) in [("other", "not the same"), ("nobody", "cannot connect")] {
        let mount = Mount::with_options(Kernel::path(), &["-o", &kernel.option(socket)]);
        assert_eq!(map_holes(mount.file()), [Extent(Kind::Data, 0..SIZE)]);
        assert!(mount.log().contains(why), "{}", mount.log());
    }
    // Below a table of device-mapper.
    let part = Dm::new("0 20480 linear /dev/nbd0 8192");
    let mount = kernel.mount(part.path());
    assert_eq!(map_holes(mount.file()), map_of(10 * MIB, &[4 * MIB..5 * MIB]), "{}", mount.log());
    check(mount.file(), part.path());
}

/// A URI is of one export: another device has other bytes, even if it is as long.
#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn the_export_of_one_device_is_not_that_of_another() {
    let kernel = Kernel::new(&[]);
    let image = Image::with_data(SIZE, &[0..SIZE]);
    let socket = kernel.directory.path().join("second");
    let _server = Server::nbdkit(&socket, &["file", image.path().to_str().expect("text")]);
    run("nbd-client", ["-unix".as_ref(), socket.as_os_str(), "/dev/nbd1".as_ref()]);
    let refused = |spec: &Path| {
        let point = kernel.directory.path().join("point");
        std::fs::create_dir_all(&point).expect("the directory is ours");
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_blkholefs"));
        let output =
            command.args(["mount", "-o", &kernel.option("s")]).args([spec, &point]).output().expect("it starts");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).expect("text")
    };
    let both = Dm::new("0 65536 linear /dev/nbd0 0\n65536 65536 linear /dev/nbd1 0");
    assert!(refused(both.path()).contains("several devices"), "{}", refused(both.path()));
    drop(both);
    assert!(refused(Path::new("/dev/mapper")).contains("more than one file"));
    assert!(refused(image.path()).contains("does not stand on"));
    // A table that is loaded later leads elsewhere.
    let device = Dm::new("0 65536 linear /dev/nbd0 0");
    let mount = kernel.mount(device.path());
    assert_map(mount.file(), &map_of(SIZE, &[]));
    device.reload("0 65536 linear /dev/nbd1 0");
    assert_map(mount.file(), &map_of(SIZE, &[0..SIZE]));
    check(mount.file(), device.path());
    drop((mount, device));
    run("nbd-client", ["-d", "/dev/nbd1"]);
}

#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn writes_and_discards_through_the_kernel_are_seen() {
    let kernel = Kernel::new(&[]);
    let mount = kernel.mount(Kernel::path());
    let file = File::open(mount.file()).expect("the file opens");
    assert_eq!(seek_data(&file, 0), None);
    let mut data = Vec::new();
    for turn in 0..8 {
        let start = turn * 4 * MIB;
        data.push(start..start + 128 * KIB);
        write(Kernel::path(), start..start + 128 * KIB);
        assert_eq!(seek_data(&file, start), Some(start), "turn {turn}: {}", mount.log());
        assert_map(mount.file(), &map_of(SIZE, &data));
    }
    run("blkdiscard", ["--offset", "4194304", "--length", "8388608", "/dev/nbd0"]);
    data.drain(1..3);
    assert_map(mount.file(), &map_of(SIZE, &data));
    check(mount.file(), Kernel::path());
    // What another client of the server writes.
    kernel.image.write(5 * MIB..6 * MIB);
    assert_eq!(seek_data(&file, 5 * MIB), Some(5 * MIB));
}
