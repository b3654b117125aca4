//! The kernel's NBD device: its bytes are read through the kernel, its holes over a second connection to the server.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};

use crate::common::check::{Extent, Kind, assert_map, check, map_holes, map_of, seek_data};
use crate::common::dm::Dm;
use crate::common::image::{Image, write};
use crate::common::mount::Mount;
use crate::common::nbd::{Server, directory};
use crate::common::{KIB, MIB, run, wait_until};

const SIZE: u64 = 32 * MIB;
const DATA: [std::ops::Range<u64>; 3] = [0..4 * KIB, 8 * MIB..9 * MIB, SIZE - 64 * KIB..SIZE];

/// Serializes the tests, because all of them use `/dev/nbd0`.
static ONE: Mutex<()> = Mutex::new(());

/// `/dev/nbd0` connected to a server. Dropping this value disconnects it.
struct Kernel {
    server: Server,
    image: Image,
    directory: tempfile::TempDir,
    _one: MutexGuard<'static, ()>,
}

impl Kernel {
    fn new(data: &[std::ops::Range<u64>]) -> Self {
        Self::with_filter(data, |_| None)
    }

    /// With an nbdkit filter and its parameter, which may name a file in the given directory.
    fn with_filter(data: &[std::ops::Range<u64>], filter: impl FnOnce(&Path) -> Option<(String, String)>) -> Self {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        run("modprobe", ["nbd", "nbds_max=2"]);
        let (image, directory) = (Image::with_data(SIZE, data), directory());
        let socket = directory.path().join("s");
        let mut words = vec!["file", image.path().to_str().expect("text")];
        let filter = filter(directory.path());
        if let Some((filter, setting)) = &filter {
            words.insert(0, filter);
            words.push(setting);
        }
        let server = Server::nbdkit(&socket, &words);
        connect(Self::path(), &socket);
        Self { server, image, directory, _one: one }
    }

    /// A server of the same size that is full of data.
    fn full(&self, socket: &str) -> (Server, Image, PathBuf) {
        let image = Image::with_data(SIZE, &[0..SIZE]);
        let socket = self.directory.path().join(socket);
        (Server::nbdkit(&socket, &["file", image.path().to_str().expect("text")]), image, socket)
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
        disconnect(Self::path());
        assert!(is_free(Self::path()) || std::thread::panicking(), "nbd0 stays connected");
    }
}

fn connect(device: &Path, socket: &Path) {
    run("nbd-client", ["-unix".as_ref(), socket.as_os_str(), device.as_os_str()]);
}

fn disconnect(device: &Path) {
    run("nbd-client", ["-d".as_ref(), device.as_os_str()]);
}

/// Waits until a device can be connected again; false when it does not become free.
fn is_free(device: &Path) -> bool {
    let name = device.file_name().expect("a node");
    let directory = Path::new("/sys/block").join(name);
    let size = || std::fs::read_to_string(directory.join("size")).unwrap_or_default();
    wait_until(|| size().trim() == "0" && !directory.join("pid").exists())
}

/// Opens the default export of a server on a Unix socket, up to the first request (`doc/proto.md` of the NBD project).
fn negotiate(path: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.read_exact(&mut [0; 18])?;
    // NBD_FLAG_C_FIXED_NEWSTYLE and NBD_FLAG_C_NO_ZEROES, then NBD_OPT_EXPORT_NAME with no name.
    stream.write_all(&3_u32.to_be_bytes())?;
    stream.write_all(&[b"IHAVEOPT".as_slice(), &[0, 0, 0, 1, 0, 0, 0, 0]].concat())?;
    stream.read_exact(&mut [0; 10])?;
    Ok(stream)
}

/// An attribute of a netlink message.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(value.len() + 4).expect("short");
    let mut bytes = [len.to_ne_bytes().as_slice(), &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Sends a message of generic netlink and reads the reply.
fn netlink(socket: &OwnedFd, family: u16, command: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
    // NLM_F_REQUEST and NLM_F_ACK.
    let (flags, body) = (5_u16, attributes.concat());
    let len = u32::try_from(20 + body.len()).expect("short").to_ne_bytes();
    let head = [len.as_slice(), &family.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8]].concat();
    let message = [head, vec![command, 1, 0, 0], body].concat();
    send(socket.as_raw_fd(), &message, MsgFlags::empty()).expect("the message is sent");
    let mut reply = vec![0; 8192];
    let count = recv(socket.as_raw_fd(), &mut reply, MsgFlags::empty()).expect("a reply");
    reply.truncate(count);
    reply
}

/// NBD_CMD_RECONFIGURE: replaces the dead socket of nbd0, as `nbd-client -persist` does.
fn reconfigure(stream: &UnixStream) {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkGeneric).expect("a socket");
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).expect("an address");
    // CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME; the reply has CTRL_ATTR_FAMILY_ID (1) among its attributes.
    let family = netlink(&socket, 16, 3, &[attribute(2, b"nbd\0")]);
    let id = family[20..].windows(6).find(|bytes| bytes[..4] == attribute(1, &[0; 2])[..4]).expect("the family nbd");
    let id = u16::from_ne_bytes([id[4], id[5]]);
    recv(socket.as_raw_fd(), &mut [0; 8192], MsgFlags::empty()).expect("the acknowledgement");
    // NBD_ATTR_INDEX, and NBD_ATTR_SOCKETS of one NBD_SOCK_ITEM with one NBD_SOCK_FD.
    let fd = attribute(1, &u32::try_from(stream.as_raw_fd()).expect("a descriptor").to_ne_bytes());
    let sockets = attribute(7 | 1 << 15, &attribute(1 | 1 << 15, &fd));
    let reply = netlink(&socket, id, 3, &[attribute(1, &0_u32.to_ne_bytes()), sockets]);
    assert_eq!(reply[16..20], [0; 4], "NBD_CMD_RECONFIGURE is refused");
}

#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn an_nbd_device_has_holes_only_with_its_export() {
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
    let single = kernel.directory.path().join("single");
    let image = kernel.image.path().to_str().expect("text");
    let _single = Server::nbdkit(&single, &["--filter=multi-conn", "file", image, "multi-conn-mode=disable"]);
    for (socket, why) in [("other", "not the same"), ("missing", "cannot connect"), ("single", "CAN_MULTI_CONN")] {
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

/// A URI names one export: another device has other bytes, even if its size is equal.
#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn an_export_gives_holes_only_to_its_own_device() {
    let kernel = Kernel::new(&[]);
    let image = Image::with_data(SIZE, &[0..SIZE]);
    let socket = kernel.directory.path().join("second");
    let _server = Server::nbdkit(&socket, &["file", image.path().to_str().expect("text")]);
    connect(Path::new("/dev/nbd1"), &socket);
    let refused = |spec: &Path| {
        let point = kernel.directory.path().join("point");
        std::fs::create_dir_all(&point).expect("the temporary directory is writable");
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_blkholefs"));
        let output = command
            .args(["mount", "-o", &kernel.option("s")])
            .args([spec, &point])
            .output()
            .expect("the program starts");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).expect("text")
    };
    let both = Dm::new("0 65536 linear /dev/nbd0 0\n65536 65536 linear /dev/nbd1 0");
    assert!(refused(both.path()).contains("several devices"), "{}", refused(both.path()));
    drop(both);
    assert!(refused(Path::new("/dev/mapper")).contains("more than one file"));
    assert!(refused(image.path()).contains("has no device of the kernel's NBD client"));
    // A table that is loaded later maps another NBD device.
    let device = Dm::new("0 65536 linear /dev/nbd0 0");
    let mount = kernel.mount(device.path());
    assert_map(mount.file(), &map_of(SIZE, &[]));
    device.reload("0 65536 linear /dev/nbd1 0");
    assert_map(mount.file(), &map_of(SIZE, &[0..SIZE]));
    check(mount.file(), device.path());
    drop((mount, device));
    disconnect(Path::new("/dev/nbd1"));
    assert!(is_free(Path::new("/dev/nbd1")));
}

/// The URI names the export of the device at mount time. A new connection may have another export.
#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn a_device_that_is_connected_again_is_all_data() {
    let kernel = Kernel::new(&[]);
    let (_full, _image, socket) = kernel.full("full");
    let mount = kernel.mount(Kernel::path());
    assert_map(mount.file(), &map_of(SIZE, &[]));
    // Connections of other devices, and uevents that are no disconnection, change nothing.
    let other = Path::new("/dev/nbd1");
    connect(other, &socket);
    disconnect(other);
    assert!(is_free(other));
    std::fs::write("/sys/block/nbd0/uevent", "change").expect("the kernel sends an event");
    assert_map(mount.file(), &map_of(SIZE, &[]));
    disconnect(Kernel::path());
    assert!(is_free(Kernel::path()));
    connect(Kernel::path(), &socket);
    assert_map(mount.file(), &map_of(SIZE, &[0..SIZE]));
    check(mount.file(), Kernel::path());
    assert!(mount.log().contains("no holes from now on"), "{}", mount.log());
    assert!(
        !mount.log().contains("changes faster"),
        "it must be all data because of the new connection, not because it changes: {}",
        mount.log()
    );
    // The same holds when it is connected to the old export again, because the kernel does not report the export.
    disconnect(Kernel::path());
    assert!(is_free(Kernel::path()));
    connect(Kernel::path(), &kernel.directory.path().join("s"));
    assert_map(mount.file(), &map_of(SIZE, &[0..SIZE]));
    drop(mount);
    let mount = kernel.mount(Kernel::path());
    assert_map(mount.file(), &map_of(SIZE, &[]));
}

/// Between two opens the device may have been connected to another export, or another client may have written to it.
#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn a_device_has_the_same_times_while_it_is_open_only() {
    let _kernel = Kernel::new(&[]);
    let linear = Dm::new("0 65536 linear /dev/nbd0 0");
    for device in [Kernel::path(), linear.path()] {
        let mut before = None;
        for _ in 0..3 {
            let mount = Mount::new(device);
            let _open = File::open(mount.file()).expect("the file opens");
            let time = || mount.file().metadata().and_then(|file| file.modified()).expect("a file with a time");
            let now = time();
            assert_eq!(time(), now, "{}", device.display());
            assert!(before < Some(now), "{}: {before:?}, {now:?}", device.display());
            before = Some(now);
        }
    }
}

#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn a_device_that_is_disconnected_while_its_file_is_open_is_all_data() {
    let kernel = Kernel::new(&[]);
    let mount = kernel.mount(Kernel::path());
    let file = File::open(mount.file()).expect("the file opens");
    assert_eq!(seek_data(&file, 0), None);
    disconnect(Kernel::path());
    assert_eq!(seek_data(&file, 0), Some(0), "{}", mount.log());
    assert!((&file).read(&mut [0; 4096]).is_err(), "a disconnected device is readable");
}

/// A dead socket is replaced without a uevent, and the device keeps its size, its number and its `pid`.
#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn a_device_whose_dead_socket_was_replaced_is_all_data() {
    let mut kernel = Kernel::new(&[]);
    let (_full, _image, socket) = kernel.full("full");
    let mount = kernel.mount(Kernel::path());
    let file = File::open(mount.file()).expect("the file opens");
    assert_eq!(seek_data(&file, 0), None);
    let pid = || std::fs::read_to_string("/sys/block/nbd0/pid").expect("it is connected");
    let before = pid();
    // The export of the URI is available again at once; the device is connected to the other one.
    kernel.server.kill();
    kernel.server.restart();
    reconfigure(&negotiate(&socket).expect("the server answers"));
    assert_eq!(pid(), before);
    let mut bytes = [0; 4096];
    (&file).read_exact(&mut bytes).expect("the device is read over its new socket");
    assert_ne!(bytes, [0; 4096], "the bytes of the other export");
    assert_eq!(seek_data(&file, 0), Some(0), "{}", mount.log());
    assert_map(mount.file(), &map_of(SIZE, &[0..SIZE]));
}

/// An export that has other bytes than the device is a user error. It is detected where the compared bytes differ.
#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn another_export_of_the_same_size_is_refused() {
    let kernel = Kernel::new(&[SIZE - 8 * KIB..SIZE]);
    let mut empty = kernel.directory.path().join("empty");
    let _empty = Server::nbdkit(&empty, &["memory", "32M"]);
    let point = kernel.directory.path().join("point");
    std::fs::create_dir_all(&point).expect("the temporary directory is writable");
    empty = PathBuf::from(kernel.option("empty"));
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_blkholefs"));
    let words = ["mount".as_ref(), "-o".as_ref(), empty.as_os_str(), Kernel::path().as_os_str(), point.as_os_str()];
    let output = command.args(words).output().expect("the program starts");
    let text = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(32), "{text}");
    assert!(text.contains("they differ at byte"), "{text}");
}

/// A write over the kernel's connection is visible on the daemon's connection only after a flush
/// (`NBD_FLAG_CAN_MULTI_CONN`).
#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn writes_over_the_kernels_connection_are_flushed_before_holes_are_asked_for() {
    let log = |directory: &Path| directory.join("log");
    let kernel = Kernel::with_filter(&[], |directory| {
        Some(("--filter=log".to_owned(), format!("logfile={}", log(directory).display())))
    });
    let mount = kernel.mount(Kernel::path());
    assert_map(mount.file(), &map_of(SIZE, &[]));
    let text = std::fs::read_to_string(log(kernel.directory.path())).expect("the filter writes it");
    let mut flushed = false;
    let mut requests = 0;
    for line in text.lines() {
        // The filter logs "Flush id=N" at the start and "...Flush id=N return=0" at the end of a flush.
        if line.contains("Extents id=") && !line.contains("...Extents") {
            assert!(flushed, "block status was requested before a flush was done:\n{text}");
            flushed = false;
            requests += 1;
        }
        flushed |= line.contains("...Flush");
    }
    assert!(requests > 0, "{text}");
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
    // A write to the image stands for a write by another client of the server.
    kernel.image.write(5 * MIB..6 * MIB);
    assert_eq!(seek_data(&file, 5 * MIB), Some(5 * MIB));
}

/// Writes of this host are seen. What is written at the server is what the user excludes.
#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn a_static_nbd_device_is_asked_once_until_this_host_writes() {
    let kernel = Kernel::new(&DATA);
    let mount = Mount::with_options(Kernel::path(), &["-o", &format!("static,{}", kernel.option("s"))]);
    let file = File::open(mount.file()).unwrap();
    assert_eq!(map_holes(mount.file()), map_of(SIZE, &DATA));
    assert_eq!(seek_data(&file, 12 * MIB), Some(SIZE - 64 * KIB));
    kernel.image.write(12 * MIB..13 * MIB);
    assert_eq!(seek_data(&file, 12 * MIB), Some(SIZE - 64 * KIB), "it is not asked again");
    assert!(!mount.log().contains("static"), "{}", mount.log());
    write(Kernel::path(), 20 * MIB..21 * MIB);
    assert_eq!(seek_data(&file, 20 * MIB), Some(20 * MIB), "{}", mount.log());
    assert_eq!(seek_data(&file, 12 * MIB), Some(12 * MIB), "it is asked at each question");
    assert_eq!(mount.log().matches("option 'static' ends").count(), 1, "{}", mount.log());
}

#[test]
#[ignore = "needs a kernel with nbd: run tests/run"]
fn another_export_moves_the_times_of_a_mount() {
    let kernel = Kernel::new(&DATA);
    let device = Kernel::path();
    let mount = Mount::new(device);
    let times = || {
        let metadata = std::fs::metadata(mount.file()).expect("it is shown");
        (metadata.modified().expect("a time"), metadata.len())
    };
    let before = times();
    disconnect(device);
    assert!(is_free(device));
    let (_server, _image, socket) = kernel.full("other");
    connect(device, &socket);
    let after = times();
    assert!(after.0 > before.0 && after.1 == before.1, "{before:?}, {after:?}");
    assert!(times().0 > after.0);
}
