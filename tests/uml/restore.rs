//! Programs that restore a sparse image into a thin volume: through a mount with `-o rw`, and to the device itself.
//!
//! Each program restores once over old data everywhere. With `BLKHOLEFS_TABLE=1` it also restores over some old data, to a new
//! volume, and to the device itself, which takes five times as long, and the rows of the table in `docs/restoring.md` are printed:
//! `BLKHOLEFS_TABLE=1 tests/run restore:: --nocapture | grep '^|'`.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::stat::{Mode, SFlag, mknod};

use crate::common::dm::{Dm, Pool};
use crate::common::image::{Image, discard, open_for_writing, write};
use crate::common::mount::Mount;
use crate::common::nbd::{self, Server};
use crate::common::{KIB, MIB, needs, run};

/// The length of the volume and of the image: the last block of the pool is cut.
const SIZE: u64 = 16 * MIB + 20 * KIB;

/// The data of the image: at the start and at the end, smaller and larger than blocks, and across them.
const DATA: [Range<u64>; 9] = [
    0..4 * KIB,
    100 * KIB..300 * KIB,
    MIB + 12 * KIB..MIB + 16 * KIB,
    3 * MIB..4 * MIB + 4 * KIB,
    6 * MIB + 4 * KIB..6 * MIB + 132 * KIB,
    8 * MIB..11 * MIB,
    13 * MIB + 60 * KIB..13 * MIB + 68 * KIB,
    14 * MIB + 508 * KIB..15 * MIB + 100 * KIB,
    SIZE - 8 * KIB..SIZE,
];

/// What a program makes of a volume that had other data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The bytes of the image, and nothing is mapped but its data.
    Sparse,
    /// The same, and the program ends with an error, because it cannot set the mode or the times of the file.
    Attributes,
    /// The bytes of the image. The zeros are written, so they are mapped too.
    Dense,
    /// The program writes the data alone: what was in the holes before stays there.
    DataOnly,
    /// The program cannot write into a file that exists, and ends with an error.
    Refused,
}
use Outcome::{Attributes, DataOnly, Dense, Refused, Sparse};

impl Outcome {
    /// What a reader of the table has to know.
    fn remark(self) -> &'static str {
        match self {
            Sparse => "",
            Attributes => "an error at the end: mode and times cannot be set",
            Dense => "writes the zeros too",
            DataOnly => "old data stays in the holes",
            Refused => "makes a new file",
        }
    }
}

/// A command that restores to the file `/mnt/thin`, and its expected outcome. It runs in the directory of [`Backup`]. A command without
/// that name writes into the directory `/mnt`, and cannot be run on a device itself.
struct Tool(&'static str, Outcome);

/// One image in the forms that the programs read. Dropping this value removes them.
struct Backup(tempfile::TempDir);

impl Backup {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
        let backup = Self(directory);
        let image = Image::with_data(SIZE, &DATA);
        backup.shell(&format!("cp --sparse=always {} backup.img", image.path().display()));
        backup.shell("cp --sparse=never backup.img dense.img && ln backup.img thin && tar -cSf backup.tar thin");
        backup
    }

    /// Makes one more form of the image.
    fn and(self, command: &str) -> Self {
        self.shell(command);
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn shell(&self, command: &str) {
        let (code, message) = self.try_shell(command);
        assert_eq!(code, 0, "{command}: {message}");
    }

    /// Runs a command to its end, for at most two minutes. Returns its exit code and the last line of its messages.
    fn try_shell(&self, command: &str) -> (i32, String) {
        let mut timeout = Command::new("timeout");
        let words = ["--kill-after=5", "120", "bash", "-o", "pipefail", "-c", command];
        let output = timeout.args(words).current_dir(self.0.path()).stdin(Stdio::null()).output().expect("bash starts");
        let messages = String::from_utf8_lossy(&output.stderr);
        (output.status.code().unwrap_or(-1), messages.lines().last().unwrap_or_default().to_owned())
    }
}

/// What is on the volume before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    /// Zeros, and nothing is mapped but the last block.
    Nothing,
    /// Data in pieces that begin and end inside blocks, in the holes of the image too.
    Somewhere,
    Everywhere,
}

/// What a command made of the volume.
struct Restored {
    code: i32,
    message: String,
    is_equal: bool,
    blocks: u64,
}

/// A thin volume in a pool of its own.
struct Volume {
    thin: Dm,
    block: u64,
    /// A directory with a node `thin` of the device, which some programs replace by a file.
    nodes: tempfile::TempDir,
    /// What is on the volume when it is full.
    old: Image,
    _pool: Pool,
}

impl Volume {
    fn new(pool: Pool, block: u64) -> Self {
        let thin = pool.thin(0, SIZE);
        let nodes = tempfile::tempdir().expect("a temporary directory");
        Self { thin, block, nodes, old: Image::with_data(SIZE, &[0..SIZE]), _pool: pool }
    }

    fn node(&self) -> PathBuf {
        self.nodes.path().join("thin")
    }

    fn make_node(&self) {
        let _ = fs::remove_file(self.node());
        let number = fs::metadata(self.thin.path()).expect("the device exists").rdev();
        let mode = Mode::from_bits_truncate(0o660);
        mknod(&self.node(), SFlag::S_IFBLK, mode, number).expect("root makes nodes");
    }

    fn prepare(&self, before: Before) {
        discard(self.thin.path(), 0..SIZE);
        // A discard of a block that is cut by the end of the volume does not unmap it.
        let (device, tail) = (open_for_writing(self.thin.path()), SIZE / self.block * self.block);
        let zeros = vec![0; usize::try_from(SIZE - tail).expect("less than a block")];
        device.write_all_at(&zeros, tail).and_then(|()| device.sync_data()).expect("a write inside the device");
        drop(device);
        match before {
            Before::Nothing => {}
            Before::Somewhere => {
                for start in (1..SIZE / MIB).step_by(3) {
                    write(self.thin.path(), start * MIB + 36 * KIB..start * MIB + 700 * KIB);
                }
            }
            Before::Everywhere => {
                let [from, to] = [self.old.path(), self.thin.path()].map(Path::display);
                run("dd", [&format!("if={from}"), &format!("of={to}"), "bs=1M", "status=none", "conv=fsync"]);
            }
        }
    }

    /// Runs a command with another file or device in place of `/mnt/thin`, and looks at the volume.
    fn restore(&self, backup: &Backup, command: &str, before: Before, file: impl FnOnce() -> Target) -> Restored {
        self.prepare(before);
        self.make_node();
        let target = file();
        let path = |path: &Path| path.to_str().expect("temporary paths are text").to_owned();
        let command = match &target {
            Target::Mount(mount) => command.replace("/mnt", &path(mount.directory())),
            Target::Device => command.replace("/mnt/thin", &path(&self.node())),
        };
        let (code, message) = backup.try_shell(&command);
        // The mount has ended when this returns, and so has its claim of the device.
        drop(target);
        run("blockdev", ["--flushbufs".as_ref(), self.thin.path().as_os_str()]);
        let [image, device] = [&backup.path("backup.img"), self.thin.path()];
        let is_equal = Command::new("cmp").arg("-s").args([image, device]).status().expect("cmp starts").success();
        Restored { code, message, is_equal, blocks: self.blocks() }
    }

    fn through_the_mount(&self, backup: &Backup, command: &str, before: Before) -> Restored {
        let mount = || Target::Mount(Mount::writable(&self.node()));
        self.restore(backup, command, before, mount)
    }

    fn to_the_device(&self, backup: &Backup, command: &str, before: Before) -> Restored {
        self.restore(backup, command, before, || Target::Device)
    }

    /// How many blocks of the pool are mapped.
    fn blocks(&self) -> u64 {
        let status = self.thin.status();
        // start, length, target, mapped sectors
        let mapped: u64 =
            status.split(' ').nth(3).and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("{status}"));
        mapped * 512 / self.block
    }

    /// How many blocks have data of the image.
    fn least(&self) -> u64 {
        let blocks = DATA.iter().flat_map(|range| range.start / self.block..range.end.div_ceil(self.block));
        let distinct: std::collections::BTreeSet<u64> = blocks.collect();
        distinct.len() as u64
    }

    fn all(&self) -> u64 {
        SIZE.div_ceil(self.block)
    }

    /// What is wrong with what the command made of the volume through the mount.
    fn fault(&self, tool: &Tool, before: Before, restored: &Restored) -> Option<String> {
        let Restored { code, message, is_equal, blocks } = restored;
        let is_as_expected = match tool.1 {
            Sparse => *code == 0 && *is_equal && *blocks <= self.least() + DATA.len() as u64,
            Attributes => *code != 0 && *is_equal && *blocks <= self.least() + DATA.len() as u64,
            Dense => *code == 0 && *is_equal && *blocks <= self.all(),
            DataOnly => *code == 0 && *is_equal == (before == Before::Nothing),
            Refused => *code != 0 && !is_equal,
        };
        let made = format!("exit code {code}, equal: {is_equal}, {blocks} of {} blocks: {message}", self.all());
        (!is_as_expected).then(|| format!("{} on {before:?}: not {:?}: {made}", tool.0, tool.1))
    }
}

/// What a command restores to.
enum Target {
    Mount(Mount),
    Device,
}

/// Runs each command through the mount over old data; with a table, in all ways.
fn restore_with(backup: &Backup, tools: &[Tool]) {
    let block = 64 * KIB;
    let volume = Volume::new(Pool::new(64 * MIB, block), block);
    let faults = match std::env::var_os("BLKHOLEFS_TABLE") {
        Some(_) => print_table(&volume, backup, tools),
        None => {
            let restore = |tool: &Tool| volume.through_the_mount(backup, tool.0, Before::Everywhere);
            tools.iter().filter_map(|tool| volume.fault(tool, Before::Everywhere, &restore(tool))).collect()
        }
    };
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Runs each command through the mount and to the device itself, and prints a row of the table. Returns what is wrong with those through
/// the mount.
fn print_table(volume: &Volume, backup: &Backup, tools: &[Tool]) -> Vec<String> {
    println!("the image has data in {} of {} blocks", volume.least(), volume.all());
    let mut faults = Vec::new();
    for tool in tools {
        let mounted = [Before::Everywhere, Before::Somewhere, Before::Nothing]
            .map(|before| (before, volume.through_the_mount(backup, tool.0, before)));
        let device = [Before::Everywhere, Before::Nothing]
            .map(|before| tool.0.contains("/mnt/thin").then(|| volume.to_the_device(backup, tool.0, before)));
        let cell = |restored: &Restored| match restored {
            Restored { code: 0, is_equal: true, blocks, .. } => blocks.to_string(),
            Restored { code, is_equal: true, blocks, .. } => format!("{blocks}, exit {code}"),
            Restored { code: 0, .. } => "wrong".to_owned(),
            Restored { code, .. } => format!("exit {code}"),
        };
        let [old, _, new] = mounted.each_ref().map(|(_, restored)| cell(restored));
        let [device_old, device_new] = device.each_ref().map(|restored| restored.as_ref().map_or(String::new(), cell));
        let (command, remark) = (tool.0.replace('|', "\\|"), tool.1.remark());
        println!("| `{command}` | {old} | {new} | {device_old} | {device_new} | {remark} |");
        faults.extend(mounted.iter().filter_map(|(before, restored)| volume.fault(tool, *before, restored)));
    }
    faults
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn copying_programs() {
    needs!(root, programs["rsync", "python3", "busybox", "zstd", "ddrescue", "bmaptool"]);
    let map = format!("{} map --format bmap backup.img >backup.bmap", env!("CARGO_BIN_EXE_blkholefs"));
    let backup = Backup::new().and("zstd -q backup.img -o backup.zst").and(&map);
    restore_with(
        &backup,
        &[
            Tool("cp --sparse=always backup.img /mnt/thin", Sparse),
            Tool("cp backup.img /mnt/thin", Sparse),
            Tool("cp -a backup.img /mnt/thin", Attributes),
            Tool("cp --sparse=always dense.img /mnt/thin", Sparse),
            Tool("cp dense.img /mnt/thin", Dense),
            Tool("dd if=backup.img of=/mnt/thin bs=64K conv=sparse status=none", Sparse),
            Tool("dd if=backup.img of=/mnt/thin bs=64K conv=sparse oflag=direct status=none", Sparse),
            Tool("dd if=backup.img of=/mnt/thin bs=64K conv=sparse,notrunc status=none", DataOnly),
            Tool("dd if=backup.img of=/mnt/thin bs=1M status=none", Dense),
            Tool("zstd -dc backup.zst | dd of=/mnt/thin bs=64K iflag=fullblock conv=sparse status=none", Sparse),
            Tool("zstd -dqc --sparse backup.zst >/mnt/thin", Sparse),
            Tool("zstd -dqf --sparse backup.zst -o /mnt/thin", Sparse),
            Tool("rsync --inplace -S backup.img /mnt/thin", Sparse),
            Tool("rsync --inplace backup.img /mnt/thin", Dense),
            Tool("rsync -S backup.img /mnt/thin", Refused),
            Tool("ddrescue -q -f -S -t backup.img /mnt/thin", Sparse),
            Tool("ddrescue -q -f -S backup.img /mnt/thin", DataOnly),
            Tool("ddrescue -q -f backup.img /mnt/thin", Dense),
            Tool("bmaptool -q copy --bmap backup.bmap backup.img /mnt/thin", Sparse),
            Tool("busybox cp backup.img /mnt/thin", Dense),
            Tool("python3 -c 'import shutil; shutil.copyfile(\"backup.img\", \"/mnt/thin\")'", Dense),
        ],
    );
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn qemu_img() {
    needs!(root, programs["qemu-img", "qemu-io"]);
    let backup = Backup::new().and("qemu-img convert -f raw -O qcow2 backup.img backup.qcow2");
    restore_with(
        &backup,
        &[
            Tool("qemu-img convert -n -O raw backup.qcow2 /mnt/thin", Sparse),
            Tool("qemu-img convert -n -O raw -t none backup.qcow2 /mnt/thin", Sparse),
            Tool("qemu-img convert -n -O raw -W -m 16 backup.qcow2 /mnt/thin", Sparse),
            Tool("qemu-img convert -n -O raw -t none -W -m 16 backup.qcow2 /mnt/thin", Sparse),
            Tool("qemu-img convert -n -O raw --target-is-zero backup.qcow2 /mnt/thin", DataOnly),
            Tool("qemu-img convert -O raw backup.qcow2 /mnt/thin", Sparse),
            Tool("qemu-img dd -O raw if=backup.qcow2 of=/mnt/thin bs=1M", Dense),
        ],
    );
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn nbd_programs() {
    needs!(root, programs["nbdcopy", "nbdkit", "qemu-nbd", "qemu-img"]);
    let backup = Backup::new().and("qemu-img convert -f raw -O qcow2 backup.img backup.qcow2");
    restore_with(
        &backup,
        &[
            Tool("nbdcopy backup.img /mnt/thin", Sparse),
            Tool("nbdcopy -- [ nbdkit --exit-with-parent file backup.img ] /mnt/thin", Sparse),
            Tool("nbdcopy -- [ qemu-nbd -f qcow2 backup.qcow2 ] /mnt/thin", Sparse),
            Tool("nbdcopy -- backup.img [ nbdkit --exit-with-parent file /mnt/thin ]", Sparse),
            Tool("nbdcopy -- backup.img [ qemu-nbd -f raw --discard=unmap /mnt/thin ]", Sparse),
            Tool("nbdcopy -- backup.img [ qemu-nbd -f raw --discard=ignore /mnt/thin ]", Sparse),
            Tool("nbdcopy -- dense.img [ qemu-nbd -f raw --discard=unmap --detect-zeroes=unmap /mnt/thin ]", Sparse),
            Tool("nbdkit -U - file /mnt/thin --run 'qemu-img convert -n -O raw backup.qcow2 $uri'", Sparse),
        ],
    );
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn archives() {
    needs!(root, programs["tar", "bsdtar"]);
    restore_with(
        &Backup::new(),
        &[
            Tool("tar -xf backup.tar --overwrite -C /mnt", Attributes),
            Tool("tar -xf backup.tar -C /mnt", Refused),
            Tool("tar -xOf backup.tar | dd of=/mnt/thin bs=64K iflag=fullblock conv=sparse status=none", Sparse),
            Tool("bsdtar -xf backup.tar -C /mnt", Refused),
            Tool("bsdtar -xOf backup.tar | dd of=/mnt/thin bs=64K iflag=fullblock conv=sparse status=none", Sparse),
        ],
    );
}

/// Blocks that are larger than most extents, or no power of two; and a pool that fills new blocks with zeros itself.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn blocks_of_other_sizes() {
    needs!(root, programs["qemu-img"]);
    let backup = Backup::new().and("qemu-img convert -f raw -O qcow2 backup.img backup.qcow2");
    let tools = [
        Tool("cp --sparse=always backup.img /mnt/thin", Sparse),
        Tool("qemu-img convert -n -O raw backup.qcow2 /mnt/thin", Sparse),
    ];
    for (block, is_zeroing) in [(192 * KIB, false), (MIB, false), (192 * KIB, true)] {
        let make = if is_zeroing { Pool::with_zeroing } else { Pool::new };
        let volume = Volume::new(make(96 * MIB, block), block);
        for tool in &tools {
            for before in [Before::Everywhere, Before::Somewhere, Before::Nothing] {
                let restored = volume.through_the_mount(&backup, tool.0, before);
                assert_eq!(volume.fault(tool, before, &restored), None, "blocks of {block} bytes");
            }
        }
    }
}

/// What a virtual machine discards on a disk that qemu-nbd serves from the file.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_server_of_the_file_passes_discards_on() {
    needs!(root, programs["qemu-nbd", "qemu-io"]);
    let block = 64 * KIB;
    let volume = Volume::new(Pool::new(64 * MIB, block), block);
    let sockets = nbd::directory();
    for (mode, unmapped) in [("unmap", 64), ("ignore", 0)] {
        volume.prepare(Before::Everywhere);
        volume.make_node();
        let mount = Mount::writable(&volume.node());
        let socket = sockets.path().join(mode);
        let file = mount.file().to_str().expect("temporary paths are text");
        let server = Server::qemu(&socket, &["--format=raw", &format!("--discard={mode}"), file]);
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        run("qemu-io", ["-f", "raw", "-c", "discard 1M 4M", "-c", "flush", &uri]);
        drop(server);
        drop(mount);
        assert_eq!(volume.blocks(), volume.all() - unmapped, "--discard={mode}");
    }
}
