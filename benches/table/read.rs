//! Reading from the first byte to the last.

use std::fs::OpenOptions;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use blkholefs::testing::sys::buffer::AlignedBuffer;

use crate::Bench;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::floor::Floor;
use crate::measure::{Contender, Table, rounds, seconds};
use crate::peer::Qemu;
use crate::shape::{Shape, forget};

/// Bytes of one read(2), as `dd bs=1M` has it.
const BLOCK: usize = 1 << 20;

/// What a reader asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Buffered,
    Direct,
}

/// Reads a file, and answers GiB per second turned round: seconds for each GiB.
fn read(path: &Path, how: How) -> f64 {
    let flags = if how == How::Direct { libc::O_DIRECT } else { 0 };
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path).expect("the file opens");
    let mut buffer = AlignedBuffer::new();
    let buffer = buffer.resize(BLOCK);
    let mut total = 0_u64;
    let taken = seconds(|| {
        loop {
            match file.read(buffer).expect("the file can be read") {
                0 => break,
                count => total += count as u64,
            }
        }
    });
    taken * (1_u64 << 30) as f64 / total as f64
}

/// Sequential reads of a loop device and of an image.
pub fn all(bench: &Bench, table: &mut Table) {
    let shape = Shape::dense(bench.scale(2 << 30, 8));
    let image = bench.scratch.image("read.img", shape);
    let device = Loop::new(&image);
    let floor = Floor::new(shape);
    for (what, spec) in [("image", image.as_path()), ("loop", device.path())] {
        let ours = Mount::new(spec);
        let qemu = bench.has(table, Qemu::PROGRAM, "reads").then(|| Qemu::new(spec));
        for (name, how, cold) in [
            ("buffered, hot", How::Buffered, false),
            ("O_DIRECT, hot", How::Direct, false),
            ("buffered, cold", How::Buffered, true),
            ("O_DIRECT, cold", How::Direct, true),
        ] {
            let prepare = || {
                if cold {
                    forget(device.path());
                    forget(&image);
                }
            };
            let one = |path: &Path| {
                prepare();
                read(path, how)
            };
            let mut contenders = vec![
                Contender::new("ours", || one(ours.file())),
                Contender::new(format!("the {what} itself"), || one(spec)),
            ];
            let mut targets = vec![Some(1.25)];
            if let Some(qemu) = &qemu {
                let file = qemu.file();
                contenders.push(Contender::new("qemu-storage-daemon", move || one(&file)));
                targets.push(Some(1.0));
            }
            if !cold {
                contenders.push(Contender::new("the floor, bytes from memory", || one(&floor.file())));
                targets.push(None);
            }
            let measured = rounds(bench.rounds(), contenders);
            table.add(&format!("read, {what}, {name}"), "s/GiB", &measured, &targets);
        }
    }
}

/// Bytes of a read by one of many clients.
const SMALL: usize = 4096;

/// Clients that read a device at the same time, as a copier with many requests under way does.
const CLIENTS: [u64; 2] = [4, 16];

/// Reads small pieces at random places with O_DIRECT, and answers microseconds for each of all clients together.
fn together(path: &Path, size: u64, clients: u64, reads: u64) -> f64 {
    let client = |seed: u64| {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).expect("the file opens");
        let (mut buffer, mut random) = (AlignedBuffer::new(), Random::new(seed));
        let buffer = buffer.resize(SMALL);
        for _ in 0..reads / clients {
            let at = random.within(0..size / SMALL as u64) * SMALL as u64;
            file.read_exact_at(buffer, at).expect("the file can be read");
        }
    };
    let taken = seconds(|| {
        std::thread::scope(|scope| {
            for seed in 0..clients {
                scope.spawn(move || client(seed));
            }
        });
    });
    taken * 1e6 / reads as f64
}

/// Small reads by many clients of a loop device.
pub fn many_clients(bench: &Bench, table: &mut Table) {
    let shape = Shape::dense(512 << 20);
    let image = bench.scratch.image("many.img", shape);
    let device = Loop::new(&image);
    let ours = Mount::new(device.path());
    let qemu = bench.has(table, Qemu::PROGRAM, "reads by many clients").then(|| Qemu::new(device.path()));
    for clients in CLIENTS {
        let one = |path: &Path| together(path, shape.size, clients, bench.scale(40_000, 10));
        let mut contenders = vec![Contender::new("ours", || one(ours.file()))];
        contenders.push(Contender::new("the loop itself", || one(device.path())));
        let mut targets = vec![None];
        if let Some(qemu) = &qemu {
            contenders.push(Contender::new("qemu-storage-daemon", || one(&qemu.file())));
            targets.push(Some(1.0));
        }
        let measured = rounds(bench.rounds(), contenders);
        table.add(&format!("read, loop, O_DIRECT 4 KiB at random, {clients} clients"), "us", &measured, &targets);
    }
}
