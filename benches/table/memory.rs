//! Memory of the daemon.

use std::fs::{self, File};

use crate::Bench;
use crate::common::check::seek_hole;
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::measure::Table;
use crate::shape::Shape;

/// Resident memory of a process, from proc(5).
pub fn resident(pid: u32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon runs");
    let line = |name: &str| {
        let found = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        let kib: u64 = found.trim().trim_end_matches(" kB").parse().unwrap_or_default();
        format!("{:.1} MiB", kib as f64 / 1024.0)
    };
    format!("{} now, {} at most", line("VmRSS:"), line("VmHWM:"))
}

/// The daemon idle, with one file open, and with a hundred.
pub fn all(bench: &Bench, table: &mut Table) {
    const FILES: usize = 100;
    let image = bench.scratch.image("memory.img", Shape::new(1 << 30, 10_000, 4096));
    let device = Loop::new(&image);
    let directory = bench.scratch.path("hundred");
    fs::create_dir(&directory).expect("a new directory");
    for number in 0..FILES {
        let link = directory.join(format!("device{number}"));
        std::os::unix::fs::symlink(device.path(), link).expect("a new name");
    }
    let ours = Mount::new(&directory);
    table.note("memory of the daemon, idle", resident(ours.pid()));
    let mut open = Vec::new();
    for number in 0..FILES {
        let file = File::open(ours.directory().join(format!("device{number}"))).expect("the file opens");
        assert_eq!(seek_hole(&file, 0), Some(4096));
        open.push(file);
        if open.len() == 1 || open.len() == FILES {
            table.note(&format!("memory of the daemon, loop devices open: {}", open.len()), resident(ours.pid()));
        }
    }
}
