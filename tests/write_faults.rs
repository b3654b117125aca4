//! Faults while files of a mount are written: an error is reported, and what was acknowledged is on the device.

mod common;

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use common::check::{check, sysfs};
use common::history::{History, SECTOR, pattern};
use common::image::{Image, open_for_writing, try_punch};
use common::loop_device::Loop;
use common::mount::Mount;
use common::random::{Length, Random};
use common::{KIB, MIB, needs, wait_until};

const SIZE: u64 = 8 * MIB;
const WRITERS: u64 = 4;
/// Writers write to every fourth of these: they have blocks of the device in common, and no sectors.
const STRIPE: u64 = 6 * KIB;

/// What a request returns whose daemon has gone (`fuse_abort_conn` of `fs/fuse/dev.c`), and the requests after it.
fn is_of_a_lost_daemon(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::ENOTCONN))
}

/// Writes ranges at random, and makes zeros, until an error. Returns the error.
fn write_until_error(
    file: &Path,
    number: u64,
    seed: u64,
    history: &Mutex<History>,
    acknowledged: &AtomicU64,
) -> io::Error {
    let mut random = Random::new(seed * WRITERS + number);
    let file = match OpenOptions::new().write(true).open(file) {
        Ok(file) => file,
        Err(error) => return error,
    };
    loop {
        let stripe = random.within(0..SIZE / STRIPE / WRITERS) * WRITERS + number;
        let within = random.range(STRIPE, SECTOR);
        let range = stripe * STRIPE + within.start..stripe * STRIPE + within.end;
        let is_zero = random.one_in(8);
        let operation = history.lock().expect("no writer panics").begin(&range, is_zero);
        let done = if is_zero {
            try_punch(&file, &range)
        } else {
            file.write_all_at(&pattern(&range, operation), range.start)
        };
        if let Err(error) = done {
            history.lock().expect("no writer panics").fail(&range, operation);
            return error;
        }
        acknowledged.fetch_add(1, Ordering::SeqCst);
    }
}

/// Fills a device with the pattern of one operation.
fn fill(device: &Path, history: &mut History) {
    let all = 0..history.size();
    let operation = history.begin(&all, false);
    let file = open_for_writing(device);
    file.write_all_at(&pattern(&all, operation), 0).and_then(|()| file.sync_all()).expect("the device is written");
}

/// The sectors that were written to a device so far, by all processes.
fn sectors_written(device: &Path) -> u64 {
    let stat = fs::read_to_string(sysfs(device).join("stat")).expect("the device exists");
    stat.split_ascii_whitespace().nth(6).and_then(|sectors| sectors.parse().ok()).expect("a number")
}

/// Checks that nothing holds a device any more.
fn assert_unclaimed(device: &Path) {
    let exclusive = || OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(device);
    assert!(wait_until(|| exclusive().is_ok()), "{} is still claimed: {:?}", device.display(), exclusive());
}

#[test]
fn what_was_acknowledged_is_on_the_device_after_the_daemon_is_killed() {
    needs!(root);
    let seed = Random::seed_or(1);
    let mut random = Random::new(seed);
    let image = Image::new(SIZE);
    let device = Loop::new(image.path());
    let mut history = History::new(SIZE);
    fill(device.path(), &mut history);
    let history = Mutex::new(history);
    let acknowledged = AtomicU64::new(0);
    let mut kills = 0;
    for kill in Length::rounds(30).numbers() {
        let mut mount = Mount::writable(device.path());
        let file = mount.file().to_owned();
        let enough = acknowledged.load(Ordering::SeqCst) + random.within(1..200);
        thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|number| {
                    let (file, history, acknowledged) = (&file, &history, &acknowledged);
                    scope.spawn(move || write_until_error(file, number, seed + kill, history, acknowledged))
                })
                .collect();
            let wrote = wait_until(|| acknowledged.load(Ordering::SeqCst) >= enough);
            mount.kill();
            assert!(wrote, "the writers do not go on: {}", mount.log());
            for writer in writers {
                let error = writer.join().expect("the writer ends");
                assert!(is_of_a_lost_daemon(&error), "seed {seed}, kill {kill}: {error}");
            }
        });
        drop(mount);
        assert_unclaimed(device.path());
        history.lock().expect("no writer panics").check(device.path());
        kills += 1;
    }
    println!("{kills} kills, {} acknowledged operations, none of them lost", acknowledged.into_inner());
    let mount = Mount::writable(device.path());
    check(mount.file(), device.path());
}

/// Fills a source of copies anew: every second MiB is data, and the others are holes.
fn new_source(source: &Path, history: &mut History) {
    let file = open_for_writing(source);
    file.set_len(0).and_then(|()| file.set_len(SIZE)).expect("the source is ours");
    for number in 0..SIZE / MIB {
        let range = number * MIB..(number + 1) * MIB;
        let is_zero = number % 2 == 1;
        let operation = history.begin(&range, is_zero);
        if !is_zero {
            file.write_all_at(&pattern(&range, operation), range.start).expect("the source is written");
        }
    }
}

/// The programs fail, and every sector is as it was, or as it is in the source, or zeros if the program empties its target first.
#[test]
fn a_copy_whose_daemon_is_killed_fails_and_leaves_old_and_new_bytes_only() {
    needs!(root, programs["cp", "dd"]);
    let seed = Random::seed_or(1);
    let mut random = Random::new(seed);
    let (image, source) = (Image::new(SIZE), Image::new(SIZE));
    let device = Loop::new(image.path());
    let mut history = History::new(SIZE);
    fill(device.path(), &mut history);
    let programs: [&[&str]; 3] = [&["cp", "--sparse=always"], &["cp"], &["dd", "bs=48K", "conv=notrunc"]];
    let (mut killed, mut ended) = (0, 0);
    for kill in Length::rounds(18).numbers() {
        let program = programs[usize::try_from(kill).expect("small") % programs.len()];
        let settled = history.last();
        if program[0] == "cp" {
            history.begin(&(0..SIZE), true);
        }
        new_source(source.path(), &mut history);
        let mut mount = Mount::writable(device.path());
        let enough = sectors_written(device.path()) + random.within(0..SIZE / 2 / SECTOR);
        let mut command = Command::new(program[0]);
        command.args(&program[1..]);
        if program[0] == "cp" {
            command.arg(source.path()).arg(mount.file());
        } else {
            command.arg(format!("if={}", source.path().display())).arg(format!("of={}", mount.file().display()));
        }
        let mut copy = command.stderr(std::process::Stdio::null()).spawn().expect("the program starts");
        let _ =
            wait_until(|| sectors_written(device.path()) >= enough || copy.try_wait().expect("our child").is_some());
        mount.kill();
        let status = copy.wait().expect("our child");
        drop(mount);
        assert_unclaimed(device.path());
        let compared = history.compare_device(device.path(), settled, history.last());
        let counts = compared.unwrap_or_else(|error| panic!("seed {seed}, kill {kill}, {command:?}: {error}"));
        if status.success() {
            ended += 1;
            history.check(device.path());
        } else {
            killed += 1;
        }
        println!("{command:?}: {status}, {counts:?}");
        // The next copy begins with a device whose bytes are certain.
        fill(device.path(), &mut history);
    }
    println!("{killed} copies failed, {ended} had ended; old and new sectors only");
    assert!(killed > 0, "no copy was in progress");
}
