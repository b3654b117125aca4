//! Memory of the daemon.

use std::fs::{self, File};

use crate::Bench;
use crate::common::check::{seek_data, seek_hole};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::measure::Table;
use crate::metadata::{Layout, Metadata, in_memory};
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

/// Files that are open at the same time.
const FILES: usize = 100;

/// Mappings of each thin volume.
const MAPPINGS: u64 = 10_000_000;

/// The daemon idle, with one file open, and with a hundred.
pub fn all(bench: &Bench, table: &mut Table) {
    loop_devices(bench, table);
    if bench.has(table, "thin_restore", "memory with thin volumes") {
        thin_volumes(bench, table);
    }
}

fn thin_volumes(bench: &Bench, table: &mut Table) {
    let directory = in_memory(bench.scratch.directory());
    let mappings = bench.scale(MAPPINGS, 10);
    let metadata = Metadata::new(&directory, Layout::Random, mappings);
    let image = metadata.snapshots(&directory, FILES as u64);
    let ours = Mount::with_options(&metadata.data, &["-o", &metadata.option(&image)]);
    let mut open = Vec::new();
    for number in 1..=FILES {
        let file = File::open(ours.directory().join(number.to_string())).expect("the file opens");
        assert!(seek_data(&file, 0).is_some());
        open.push(file);
        if open.len() == 1 || open.len() == FILES {
            let case = format!("memory of the daemon, thin volumes of {mappings} mappings open: {}", open.len());
            table.note(&case, resident(ours.pid()));
        }
    }
    drop(open);
    // The kernel tells of the last close in its own time.
    let name = format!("memory of the daemon, after {FILES} thin volumes were closed");
    std::thread::sleep(std::time::Duration::from_secs(1));
    table.note(&name, resident(ours.pid()));
}

fn loop_devices(bench: &Bench, table: &mut Table) {
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
