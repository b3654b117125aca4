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

/// Bytes of the device, all data.
const SIZE: u64 = 512 << 20;

/// Reads `count` times with `read`, and answers seconds for each. Every call has other places.
fn at_random(seed: &Cell<u64>, count: u64, mut read: impl FnMut(&mut [u8], u64)) -> f64 {
    seed.set(seed.get() + 1);
    let mut random = Random::new(seed.get());
    let mut buffer = [0; SMALL];
    let taken = seconds(|| {
        for _ in 0..count {
            read(&mut buffer, random.within(0..SIZE / SMALL as u64) * SMALL as u64);
        }
    });
    taken / count as f64
}

/// [`at_random`] of a file, through its page cache.
fn of_file(seed: &Cell<u64>, count: u64, path: &Path) -> f64 {
    let file = File::open(path).expect("the file opens");
    at_random(seed, count, |buffer, at| file.read_exact_at(buffer, at).expect("the file can be read"))
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
        of_nbd(bench, table);
    }
    of_loop(bench, table);
}

/// Reads of an NBD server that takes 5 ms for each.
fn of_nbd(bench: &Bench, table: &mut Table) {
    let slow = Slow::new(bench, Shape::dense(SIZE), &[READS]);
    let (traffic, seed) = (Traffic::default(), Cell::new(0));
    let count = bench.scale(200, 4);
    let ours = || {
        // The mount ends within the closure: by then all that was read ahead has been counted.
        let read = || {
            let (_mount, file) = slow.mount(&[]);
            of_file(&seed, count, &file) * 1e3
        };
        traffic.of(count, || slow.bytes_read(), read)
    };
    let plain = || {
        let mut client = PlainClient::new(&slow.socket());
        at_random(&seed, count, |buffer, at| client.read(buffer, at)) * 1e3
    };
    let contenders =
        vec![Contender::new("ours", ours), Contender::new("a plain client, one request after another", plain)];
    let case = "read, NBD, 5 ms, 4 KiB at random";
    table.add(case, "ms", &rounds(bench.rounds(), contenders), &[None]);
    traffic.row(table, case, "server");
}

/// Reads of a loop device.
fn of_loop(bench: &Bench, table: &mut Table) {
    let directory = directory(bench);
    let image = directory.path().join("image");
    Shape::dense(SIZE).write(&image);
    let device = Loop::new(&image);
    let (traffic, seed) = (Traffic::default(), Cell::new(0));
    let count = bench.scale(20_000, 4);
    let ours = || {
        forget(device.path());
        let read = || {
            let mount = Mount::new(device.path());
            of_file(&seed, count, mount.file()) * 1e6
        };
        traffic.of(count, || device.bytes_read(), read)
    };
    let itself = || {
        forget(device.path());
        of_file(&seed, count, device.path()) * 1e6
    };
    let contenders = vec![Contender::new("ours", ours), Contender::new("the loop itself", itself)];
    let case = "read, loop, buffered, cold, 4 KiB at random";
    table.add(case, "us", &rounds(bench.rounds(), contenders), &[None]);
    traffic.row(table, case, "device");
}
