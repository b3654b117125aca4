//! The commands of `docs/programs.md`: how much they read of a device with holes through a mount.
//!
//! With `BLKHOLEFS_TABLE=1` the device has the size that the page names, and the rows of the programs that are installed are printed:
//! `BLKHOLEFS_TABLE=1 cargo test --test programs -- --nocapture --test-threads=1 | grep '^|'`. The rows of uutils are typed where it
//! is first in the search path.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::check::{bytes_read, check_same_bytes};
use common::image::Image;
use common::loop_device::Loop;
use common::{MIB, is_ci, needs, run};

/// What the kernel and the daemon read ahead, at most, behind each extent.
const READ_AHEAD: u64 = 6 * MIB;

/// A row of the page.
#[derive(Debug)]
struct Row {
    program: String,
    command: String,
}

/// The rows of the table in a section of the page.
fn rows(title: &str) -> Vec<Row> {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/programs.md")).expect("the page");
    let mut sections = page.split("\n### ").flat_map(|part| part.split("\n## ").take(1));
    let section = sections.find(|section| section.starts_with(&format!("{title}\n"))).expect("a section of this title");
    let of_line = |line: &str| {
        let (program, rest) = line.strip_prefix("| ")?.split_once(" | `")?;
        let (command, _) = rest.split_once("` | ")?;
        Some(Row { program: program.to_owned(), command: command.replace("\\|", "|") })
    };
    section.lines().filter_map(of_line).collect()
}

impl Row {
    /// Whether the program is installed: the first words of the command, without those that every system has.
    fn is_installed(&self) -> bool {
        let words = self.command.split([' ', '&', '|']).filter(|word| !word.is_empty());
        let program = words.clone().find(|word| !matches!(*word, "cd" | "/mnt" | "echo" | "disk" | "disk.qcow2"));
        let program = program.expect("a command");
        let Ok(version) = common::try_run("sh", ["-c", &format!("command -v {program} && {program} --version")], "")
        else {
            // Some programs have no --version.
            return common::try_run("sh", ["-c", &format!("command -v {program}")], "").is_ok();
        };
        // Both have programs of the same names.
        version.contains("uutils") == self.program.starts_with("uutils") || !version.contains("oreutils")
    }

    /// Whether the program is none of Debian's packages.
    fn is_optional(&self) -> bool {
        ["uutils", "xcp"].iter().any(|name| self.program.starts_with(name))
    }
}

/// An image with extents of 1 MiB at equal distances, its device, and its maps.
struct Source {
    directory: tempfile::TempDir,
    image: Image,
    device: Loop,
    extents: u64,
    size: u64,
}

impl Source {
    fn new() -> Self {
        let (size, extents, distance) = if is_table() { (512, 23, 22) } else { (128, 8, 15) };
        let image = Image::new(size * MIB);
        for extent in 0..extents {
            let words = ["if=/dev/urandom", "bs=1M", "count=1", "conv=notrunc,fsync", "status=none"].map(str::to_owned);
            let place = [format!("of={}", image.path().display()), format!("seek={}", extent * distance)];
            run("dd", words.iter().chain(&place));
        }
        let device = Loop::new(image.path());
        let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
        let source = Self { directory, image, device, extents, size: size * MIB };
        fs::create_dir(source.path("mnt")).expect("it is empty");
        for name in ["mnt/disk", "mnt/disk.qcow2"] {
            fs::write(source.path(name), "").expect("it is ours");
        }
        for (form, name) in [("bmap", "disk.bmap"), ("ddrescue", "disk.map")] {
            let map = source.program(&["map".as_ref(), "--format".as_ref(), form.as_ref(), source.device.path()]);
            fs::write(source.path(name), map).expect("it is ours");
        }
        source
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn program(&self, words: &[&Path]) -> String {
        run(env!("CARGO_BIN_EXE_blkholefs"), words)
    }

    /// Types a command on a new mount. Returns what was read from the device, and the size of what was made.
    fn cost(&self, command: &str) -> (u64, u64) {
        let (file, options) =
            if command.contains("disk.qcow2") { ("mnt/disk.qcow2", "ro,compact") } else { ("mnt/disk", "ro") };
        let made = self.path("made");
        fs::create_dir(&made).expect("it was removed");
        self.type_in(&made, &prepare(command));
        let before = self.disk_usage();
        run("blockdev", ["--flushbufs".as_ref(), self.device.path().as_os_str()]);
        self.program(&["mount".as_ref(), "-o".as_ref(), options.as_ref(), self.device.path(), &self.path(file)]);
        let read = bytes_read(self.device.path());
        self.type_in(&made, &command.replace("/mnt", self.path("mnt").to_str().expect("a temporary path is text")));
        let read = bytes_read(self.device.path()) - read;
        self.program(&["umount".as_ref(), &self.path(file)]);
        let written = self.disk_usage() - before;
        if made.join("copy").is_file() {
            check_same_bytes(&made.join("copy"), self.image.path());
        }
        fs::remove_dir_all(&made).expect("it is ours");
        (read, written)
    }

    /// The space of what a command made.
    fn disk_usage(&self) -> u64 {
        let printed = run("du", ["--summarize".as_ref(), "--block-size=1".as_ref(), self.path("made").as_os_str()]);
        printed.split_whitespace().next().and_then(|word| word.parse().ok()).expect("du prints a number")
    }

    fn type_in(&self, directory: &Path, command: &str) {
        let mut bash = Command::new("bash");
        bash.args(["-o", "pipefail", "-c", command]).current_dir(directory).env("TMPDIR", directory);
        bash.env("DEVICE", self.device.path()).env("SIZE", self.size.to_string());
        bash.env("BORG_REPO", directory.join("repository")).env("BORG_BASE_DIR", directory);
        bash.env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        bash.env("RESTIC_REPOSITORY", directory.join("repository")).env("RESTIC_PASSWORD", "word");
        bash.env("RESTIC_CACHE_DIR", self.path("cache")).env("RCLONE_CONFIG", self.path("rclone.conf"));
        bash.env("IMAGE", self.image.path()).env("MAPS", self.directory.path());
        let output = bash.output().expect("bash starts");
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// What is typed before the command.
fn prepare(command: &str) -> String {
    let repository = match command {
        _ if command.contains("borg") => "borg init --encryption=none",
        _ if command.contains("restic") => "restic -q init",
        _ => ":",
    };
    format!("ln -s \"$IMAGE\" disk.img && ln -s \"$MAPS\"/disk.bmap \"$MAPS\"/disk.map . && {repository}")
}

fn is_table() -> bool {
    std::env::var_os("BLKHOLEFS_TABLE").is_some()
}

/// Types the commands of a section. Each must read what `is_expected` takes, of a device with so many bytes and extents.
fn type_section(title: &str, is_expected: impl Fn(u64, &Source) -> bool) {
    let source = Source::new();
    let mut typed = 0;
    for row in rows(title) {
        if !row.is_installed() {
            // `tests/packages` installs all but those that Debian does not have, or has in another version than the page.
            assert!(row.is_optional() || !is_ci(), "{} is missing", row.program);
            eprintln!("skipped: {} is not installed: {}", row.program, row.command);
            continue;
        }
        let (read, written) = source.cost(&row.command);
        if is_table() {
            let [read, written] = [read, written].map(|bytes| (bytes + MIB / 2) / MIB);
            println!("| {} | `{}` | {read} | {written} |", row.program, row.command.replace('|', "\\|"));
        }
        assert!(is_expected(read, &source), "{row:?} read {read} bytes");
        typed += 1;
    }
    assert!(typed > 5, "{typed} commands of {title:?} were typed");
}

#[test]
fn holes_are_skipped() {
    needs!(root, programs["bsdtar", "qemu-img", "nbdcopy", "nbdkit", "borg", "bmaptool", "ddrescue", "zstd"]);
    type_section("Holes are skipped", |read, source| {
        let data = source.extents * MIB;
        (data..=data + source.extents * READ_AHEAD).contains(&read)
    });
}

#[test]
fn everything_is_read() {
    needs!(root, programs["borg", "restic", "rclone", "rsync", "zstd", "ddrescue", "busybox", "python3"]);
    type_section("Everything is read", |read, source| read >= source.size);
}

#[test]
fn everything_is_read_of_a_compact_image() {
    needs!(root, programs["borg", "restic", "rclone", "rsync", "zstd"]);
    type_section("Everything is read, of a compact image", |read, source| {
        (source.extents * MIB..=source.extents * MIB + 2 * MIB).contains(&read)
    });
}
