//! Reading from the first byte to the last.

use std::fs::OpenOptions;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use blkholefs::sys::buffer::AlignedBuffer;

use crate::Bench;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::floor::Floor;
use crate::measure::{Contender, Table, rounds, seconds};
use crate::peer::Qemu;
use crate::shape::{Shape, forget};

/// Bytes of one read(2), as `dd bs=1M` and our `st_blksize` have it.
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
                contenders.push(Contender::new("the floor, zeros from memory", || one(&floor.file())));
                targets.push(None);
            }
            let measured = rounds(bench.rounds(), contenders);
            table.add(&format!("read, {what}, {name}"), "s/GiB", &measured, &targets);
        }
    }
}
