//! Small reads at random places: reading ahead gains nothing for them, and must not cost anything.

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::directory;
use super::nbd::{READS, Slow};
use super::plain_client::PlainClient;
use crate::Bench;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::random::Random;
use crate::measure::{Contender, Table, rounds, seconds};
use crate::shape::{Shape, forget};

/// Bytes of a read.
const SMALL: usize = 4096;

/// Bytes of a device that is all data.
const SIZE: u64 = 512 << 20;

/// Where to read: in the data of a shape. Each round has other places.
struct Places {
    shape: Shape,
    count: u64,
    seed: Cell<u64>,
}

impl Places {
    /// `count` places in each round.
    fn new(shape: Shape, count: u64) -> Self {
        Self { shape, count, seed: Cell::new(0) }
    }

    /// Reads with `read`, and answers seconds for each.
    fn read(&self, mut read: impl FnMut(&mut [u8], u64)) -> f64 {
        self.seed.set(self.seed.get() + 1);
        let mut random = Random::new(self.seed.get());
        let mut buffer = [0; SMALL];
        let taken = seconds(|| {
            for _ in 0..self.count {
                let extent = random.within(0..self.shape.extents()) * self.shape.pitch;
                let block = random.within(0..self.shape.data / SMALL as u64) * SMALL as u64;
                read(&mut buffer, extent + block);
            }
        });
        taken / self.count as f64
    }

    /// [`Places::read`] of a file, through its page cache.
    fn read_file(&self, path: &Path) -> f64 {
        let file = File::open(path).expect("the file opens");
        self.read(|buffer, at| file.read_exact_at(buffer, at).expect("the file can be read"))
    }
}

/// What was read from a device, and what its client asked for.
#[derive(Default)]
struct Traffic {
    read: Cell<u64>,
    asked: Cell<u64>,
}

impl Traffic {
    /// Runs something that asks for `count` reads, and adds what `bytes_read` counts more after it than before.
    fn of(&self, count: u64, bytes_read: impl Fn() -> u64, work: impl FnOnce() -> f64) -> f64 {
        let before = bytes_read();
        let cost = work();
        self.read.set(self.read.get() + bytes_read() - before);
        self.asked.set(self.asked.get() + count * SMALL as u64);
        cost
    }

    /// Adds the row: bytes for each byte that was asked for.
    fn row(&self, table: &mut Table, case: &str, from: &str) {
        let share = self.read.get() as f64 / self.asked.get() as f64 * SMALL as f64;
        let case = format!("{case}, bytes read from the {from}");
        table.row(&case, "bytes", share, ("bytes asked for", SMALL as f64), Some(1.0));
    }
}

/// Reads of a slow NBD server and of a loop device.
pub fn all(bench: &Bench, table: &mut Table) {
    if bench.has(table, "nbdkit", "reads at random") {
        of_nbd(bench, table, Shape::dense(SIZE), "512 MiB of data");
        of_nbd(bench, table, Shape::new(2 << 30, 320, 64 << 10), "320 extents of 64 KiB");
    }
    of_loop(bench, table);
}

/// Reads of an NBD server that takes 5 ms for each.
fn of_nbd(bench: &Bench, table: &mut Table, shape: Shape, what: &str) {
    let slow = Slow::new(bench, shape, &[READS]);
    let (traffic, places) = (Traffic::default(), Places::new(shape, bench.scale(200, 4)));
    let ours = || {
        // The mount ends within the closure: by then all that was read ahead has been counted.
        let read = || {
            let (_mount, file) = slow.mount(&[]);
            places.read_file(&file) * 1e3
        };
        traffic.of(places.count, || slow.bytes_read(), read)
    };
    let plain = || {
        let mut client = PlainClient::new(&slow.socket());
        places.read(|buffer, at| client.read(buffer, at)) * 1e3
    };
    let contenders =
        vec![Contender::new("ours", ours), Contender::new("a plain client, one request after another", plain)];
    let case = format!("read, NBD, 5 ms, 4 KiB at random in {what}");
    table.add(&case, "ms", &rounds(bench.rounds(), contenders), &[None]);
    traffic.row(table, &case, "server");
}

/// Reads of a loop device.
fn of_loop(bench: &Bench, table: &mut Table) {
    let directory = directory(bench);
    let image = directory.path().join("image");
    let shape = Shape::dense(SIZE);
    shape.write(&image);
    let device = Loop::new(&image);
    let (traffic, places) = (Traffic::default(), Places::new(shape, bench.scale(20_000, 4)));
    let ours = || {
        forget(device.path());
        let read = || {
            let mount = Mount::new(device.path());
            places.read_file(mount.file()) * 1e6
        };
        traffic.of(places.count, || device.bytes_read(), read)
    };
    let itself = || {
        forget(device.path());
        places.read_file(device.path()) * 1e6
    };
    let contenders = vec![Contender::new("ours", ours), Contender::new("the loop itself", itself)];
    let case = "read, loop, buffered, cold, 4 KiB at random";
    table.add(case, "us", &rounds(bench.rounds(), contenders), &[None]);
    traffic.row(table, case, "device");
}
