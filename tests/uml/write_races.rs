//! Threads that write to a thin volume at the same time, through several names of it, while its pool and its tables change.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};

use crate::common::check::{check, check_same_bytes, seek_data};
use crate::common::dm::{Dm, Pool, sectors};
use crate::common::mount::Mount;
use crate::common::random::{Length, Random};
use crate::common::{KIB, MIB, needs, run};

const THREADS: u64 = 4;

/// The bytes of a volume belong to threads in turns of this many bytes, so that most blocks belong to several of them.
const TURN: u64 = 1700;

/// What is at an offset of the volume and belongs to one thread: this many bytes from there on.
struct Place {
    start: u64,
    bytes: Vec<u8>,
}

fn open_direct(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).expect("it can be opened")
}

fn punch(file: &File, start: u64, len: u64) {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let offset = |at: u64| i64::try_from(at).expect("an offset");
    fallocate(file, mode, offset(start), offset(len)).expect("the range is made zero");
}

/// One thread: writes its own bytes, and finds them as it has written them.
struct Owner<'a> {
    number: u64,
    random: Random,
    file: File,
    device: &'a File,
    /// Held for reading from a write until it is looked at, and for writing while all is made zero.
    epoch: &'a RwLock<u64>,
    places: Vec<Place>,
    known_epoch: u64,
    size: u64,
}

impl Owner<'_> {
    fn step(&mut self) {
        let epoch = self.epoch.read().expect("no thread has failed");
        if *epoch != self.known_epoch {
            self.places.clear();
            self.known_epoch = *epoch;
        }
        let turns = self.size / (TURN * THREADS);
        // Few places, so that threads meet.
        let turn = self.random.within(0..24) * turns / 24;
        let start = (turn * THREADS + self.number) * TURN;
        let (first, len) = match self.random.within(0..3) {
            0 => (0, TURN),
            1 => (self.random.within(0..TURN - 1), 1),
            _ => {
                let first = self.random.within(0..TURN - 1);
                (first, self.random.within(1..TURN - first))
            }
        };
        let is_zero = self.random.one_in(3);
        let index = match self.places.iter().position(|place| place.start == start) {
            Some(index) => index,
            None => {
                self.places.push(Place { start, bytes: vec![0; TURN as usize] });
                self.places.len() - 1
            }
        };
        let inside = first as usize..(first + len) as usize;
        if is_zero {
            punch(&self.file, start + first, len);
            self.places[index].bytes[inside].fill(0);
        } else {
            let bytes = self.random.bytes(len);
            self.file.write_all_at(&bytes, start + first).expect("the pool has room");
            self.places[index].bytes[inside].copy_from_slice(&bytes);
        }
        self.look(index);
        let other = self.random.within(0..self.places.len() as u64);
        self.look(other as usize);
    }

    fn look(&self, index: usize) {
        let place = &self.places[index];
        let mut bytes = vec![0; TURN as usize];
        self.file.read_exact_at(&mut bytes, place.start).expect("it can be read");
        assert!(bytes == place.bytes, "thread {}: bytes at {} by the mount", self.number, place.start);
        let first = place.start / 4096 * 4096;
        let mut aligned = vec![0; 4 * 4096];
        let skipped = aligned.as_ptr().align_offset(4096);
        let count = self.device.read_at(&mut aligned[skipped..skipped + 8192], first).expect("it can be read");
        let at = (place.start - first) as usize;
        let end = (at + TURN as usize).min(count);
        assert!(
            aligned[skipped + at..skipped + end] == place.bytes[..end - at],
            "thread {}: bytes at {} of the device",
            self.number,
            place.start
        );
        if let Some(used) = place.bytes.iter().position(|&byte| byte != 0) {
            let used = place.start + used as u64;
            assert_eq!(seek_data(&self.file, used), Some(used), "thread {}: a wrong hole", self.number);
        }
    }
}

/// Changes around the volume while threads write to it.
fn disturb(round: u64, pool: &Pool, thin: &Dm, mount: &Mount, device: &File, file: &File, epoch: &RwLock<u64>) {
    // One process: a process that starts closes the files that its parent has open, and that waits for a device that is suspended.
    let shell = |script: &str| {
        run("bash", ["-ec", script]);
    };
    let (pool, thin, path) = (pool.dm().name(), thin.name(), thin.path());
    match round % 7 {
        0 => {
            shell(&format!(
                "dmsetup suspend {thin}; dmsetup message {pool} 0 'create_snap 1 0'; dmsetup resume {thin}"
            ));
        }
        1 => shell(&format!("dmsetup message {pool} 0 'delete 1'")),
        2 => shell(&format!("dmsetup suspend {thin}; dmsetup resume {thin}")),
        3 => shell(&format!("dmsetup suspend {pool}; dmsetup resume {pool}")),
        4 => run("kill", ["-HUP", &mount.pid().to_string()]).clear(),
        5 => {
            let mut epoch = epoch.write().expect("no thread has failed");
            file.set_len(0).expect("it can be truncated");
            *epoch += 1;
        }
        // A write that is not of the mount, behind the places of the threads.
        _ => {
            let memory = vec![7; 8192];
            let skipped = memory.as_ptr().align_offset(4096);
            let end = sectors(path) * 512 / 4096 * 4096;
            device.write_all_at(&memory[skipped..skipped + 4096], end - 4096).expect("the pool has room");
            assert_eq!(seek_data(file, end - 4096), Some(end - 4096));
        }
    }
}

fn race(features: &'static [&'static str], block: u64, size: u64) {
    let pool = Pool::with_features(96 * MIB / block * block, block, features);
    // Every block has old bytes.
    let old = pool.thin(9, 96 * MIB / block * block);
    crate::common::image::write(old.path(), 0..24 * MIB / block * block);
    drop(old);
    pool.delete(9);
    let thin = pool.thin(0, size);
    let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    for name in 0..=THREADS {
        std::os::unix::fs::symlink(thin.path(), directory.path().join(name.to_string())).expect("a new name");
    }
    let mount = Mount::writable(directory.path());
    let open = |name: u64| {
        let path = mount.directory().join(name.to_string());
        OpenOptions::new().read(true).write(true).open(path).expect("it can be written")
    };
    let device = open_direct(thin.path());
    let (epoch, stop) = (RwLock::new(0), AtomicBool::new(false));
    let steps = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for number in 0..THREADS {
            let (epoch, device, stop, steps) = (&epoch, &device, &stop, &steps);
            let file = open(number);
            scope.spawn(move || {
                let random = Random::new(Random::seed_or(7) + number);
                let places = Vec::new();
                let mut owner = Owner { number, random, file, device, epoch, places, known_epoch: 0, size };
                let stops = StopAtEnd(stop);
                while !stop.load(Ordering::Relaxed) {
                    owner.step();
                    steps.fetch_add(1, Ordering::Relaxed);
                }
                drop(stops);
            });
        }
        let stops = StopAtEnd(&stop);
        let file = open(THREADS);
        for round in Length::rounds(8).numbers() {
            let before = steps.load(Ordering::Relaxed);
            disturb(round, &pool, &thin, &mount, &device, &file, &epoch);
            let start = Instant::now();
            while steps.load(Ordering::Relaxed) < before + 20 && start.elapsed() < Duration::from_secs(20) {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::yield_now();
            }
        }
        drop(stops);
    });
    println!("{block} {features:?}: {} steps", steps.load(Ordering::Relaxed));
    check_same_bytes(&mount.directory().join("0"), thin.path());
    check(&mount.directory().join("1"), thin.path());
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn in_a_pool_that_zeroes_new_blocks() {
    needs!(root, programs["dmsetup"]);
    race(&["error_if_no_space"], 64 * KIB, 8 * MIB + 3 * 512);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn in_a_pool_that_does_not_zero_new_blocks() {
    needs!(root, programs["dmsetup"]);
    race(&["skip_block_zeroing", "error_if_no_space"], 192 * KIB, 4 * MIB + 5 * 512);
}

/// The volume is smaller than one block.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn in_one_block() {
    needs!(root, programs["dmsetup"]);
    race(&["skip_block_zeroing", "ignore_discard", "error_if_no_space"], MIB, 700 * KIB);
}
