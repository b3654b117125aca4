//! Restores of a large sparse image: through a mount that can be written, and to the device itself.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::Bench;
use crate::common::dm::{Dm, Pool};
use crate::common::image::open_for_writing;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::{KIB, MIB, run, try_run};
use crate::kernel;
use crate::measure::{Contender, Pair, Table, rounds, seconds};
use crate::shape::Shape;

/// Bytes of an extent; one in a hundred of the image is data.
const EXTENT: u64 = 64 * KIB;

/// Bytes in a block of the pool.
const BLOCK: u64 = 64 * KIB;

/// How much smaller the volume is that all zeros are written to: the time and the blocks are multiplied.
const SHARE: u64 = 16;

fn one_percent(size: u64) -> Shape {
    Shape::new(size, size / 100 / EXTENT, EXTENT)
}

/// A program that restores an image.
#[derive(Clone, Copy)]
enum Program {
    Cp,
    QemuImg,
}

impl Program {
    /// Restores to a file or device, with everything on it when this returns. Answers seconds.
    fn restore(self, from: &Path, to: &Path) -> f64 {
        seconds(|| {
            let (program, words): (_, &[&str]) = match self {
                Self::Cp => ("cp", &["--sparse=always"]),
                Self::QemuImg => ("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw"]),
            };
            run(program, words.iter().map(AsRef::as_ref).chain([from.as_os_str(), to.as_os_str()]));
            open_for_writing(to).sync_data().expect("the data reaches the device");
        })
    }
}

fn mount(device: &Path) -> Mount {
    Mount::with_options(device, &["-o", "rw"])
}

/// A restore to a loop device that has the image of the round before.
pub fn to_loop_device(bench: &Bench, table: &mut Table) {
    if !bench.has(table, "qemu-img", "restores") {
        return;
    }
    let size = bench.scale(64 << 30, 8);
    let image = bench.scratch.image("backup.img", one_percent(size));
    let [backing, plain] = ["target.img", "plain.img"].map(|name| bench.scratch.path(name));
    for path in [&backing, &plain] {
        fs::File::create_new(path).and_then(|file| file.set_len(one_percent(size).size)).expect("a sparse file");
    }
    let device = Loop::new(&backing);
    let mounted = mount(device.path());
    let [with_cp, with_qemu] = [Program::Cp, Program::QemuImg];
    let contenders = vec![
        Contender::new("ours", || with_cp.restore(&image, mounted.file())),
        Contender::new("cp to an image", || with_cp.restore(&image, &plain)),
        Contender::new("ours, qemu-img", || with_qemu.restore(&image, mounted.file())),
        Contender::new("qemu-img convert -n to the device", || with_qemu.restore(&image, device.path())),
    ];
    let measured = rounds(bench.rounds().min(5), contenders);
    let case = |program| format!("restore, loop, {program}, {} GiB with 1 % data", size >> 30);
    for (program, ours, other, target) in
        [("cp", 0, 3, Some(1.0)), ("cp", 0, 1, None), ("qemu-img convert -n", 2, 3, Some(1.0))]
    {
        table.pair(&case(program), "s", &measured, Pair { ours, other, target });
    }
    let allocated = |program: Program, to: &Path| {
        program.restore(&image, to);
        fs::metadata(&backing).expect("it exists").blocks() as f64 * 512.0 / MIB as f64
    };
    let ours = allocated(with_cp, mounted.file());
    let theirs = allocated(with_qemu, device.path());
    table.row(
        &format!("{}, allocated", case("cp")),
        "MiB",
        ours,
        ("qemu-img convert -n to the device", theirs),
        Some(1.0),
    );
}

/// A new volume, in a pool whose data device drops what is written and takes no time for it.
struct Volume {
    thin: Dm,
    _pool: Pool,
    _data: Dm,
}

impl Volume {
    fn new(size: u64) -> Self {
        let data = Dm::new(&format!("0 {} zero", size.next_multiple_of(BLOCK) / 512));
        let pool = Pool::over(data.path(), BLOCK);
        let thin = pool.thin(0, size);
        Self { thin, _pool: pool, _data: data }
    }

    /// The blocks of the pool that are mapped.
    fn blocks(&self) -> f64 {
        let status = self.thin.status();
        // start, length, target, mapped sectors
        let mapped = status.split(' ').nth(3).and_then(|word| word.parse::<f64>().ok());
        mapped.unwrap_or_else(|| panic!("{status}")) * 512.0 / BLOCK as f64
    }
}

/// What a restore to a new volume costs.
struct Cost {
    seconds: f64,
    blocks: f64,
}

/// Restores to a thin volume. On a kernel without device-mapper this runs in user-mode-linux.
pub fn to_thin_volume(bench: &Bench, table: &mut Table) {
    if !bench.has(table, "qemu-img", "restores") {
        return;
    }
    if try_run("modprobe", ["--dry-run", "dm-thin-pool"], "").is_err() {
        return kernel::in_user_mode_linux(bench, "restore-thin", table);
    }
    run("modprobe", ["-a", "dm-thin-pool", "dm-zero"]);
    let size = bench.scale(64 << 30, 16);
    let image = |name, size| (bench.scratch.image(name, one_percent(size)), one_percent(size).size);
    let (whole, share) = (image("backup.img", size), image("share.img", size / SHARE));
    let cost = |through_mount: bool, program: Program, (image, size): &(PathBuf, u64)| {
        let volume = Volume::new(*size);
        let mounted = through_mount.then(|| mount(volume.thin.path()));
        let seconds = program.restore(image, mounted.as_ref().map_or(volume.thin.path(), Mount::file));
        drop(mounted);
        Cost { seconds, blocks: volume.blocks() }
    };
    let device = cost(false, Program::QemuImg, &share);
    let name = format!("qemu-img convert -n to the device ({} MiB, times {SHARE})", (size / SHARE) >> 20);
    let theirs = |cost: f64| (name.as_str(), cost * SHARE as f64);
    for (name, program) in [("cp", Program::Cp), ("qemu-img convert -n", Program::QemuImg)] {
        let ours = cost(true, program, &whole);
        let case = format!("restore, thin, {name}, {} GiB with 1 % data", size >> 30);
        table.row(&case, "s", ours.seconds, theirs(device.seconds), Some(1.0));
        table.row(&format!("{case}, allocated"), "blocks", ours.blocks, theirs(device.blocks), Some(0.1));
    }
}
