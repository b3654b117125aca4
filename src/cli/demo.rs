//! `blkholefs demo`: mounts and copies a sparse image that it makes, and removes everything.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};

use crate::error::{Error, Result};
use crate::output::{self, say};
use crate::report::human;
use crate::source::BlockDevice;
use crate::sys::device::DeviceId;
use crate::sys::sysfs::StatFile;
use crate::units::{Bytes, Sectors};

/// The length of the image.
const IMAGE: Bytes = Bytes::new(1 << 30);
/// The number of its extents of data, which are at equal distances.
const EXTENTS: u64 = 256;
/// The length of each of them in bytes.
const EXTENT: usize = 64 << 10;

/// Runs the demonstration.
///
/// # Errors
/// When a step fails. Everything that was made is removed all the same.
pub fn run() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::usage("the demo makes a loop device, which needs root"));
    }
    // The signals are delivered after the clean-up.
    let blocked = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    let _ = blocked.thread_block();
    let result = Scratch::new().and_then(|scratch| show(&scratch));
    let _ = blocked.thread_unblock();
    result
}

fn show(scratch: &Scratch) -> Result<()> {
    let image = scratch.path("image");
    make_image(&image)?;
    let device = LoopDevice::bind(&image)?;
    let data = Bytes::new(EXTENTS * EXTENT as u64);
    print(&format!("image   {} with {} of data, on {}", human(IMAGE), human(data), device.path.display()))?;

    let mount = Mount::new(&device.path, scratch.path("mnt"))?;
    let shown = mount.file(&device.path);
    print(&format!("mount   blkholefs mount {} {}", device.path.display(), mount.directory.display()))?;

    let (from_device, from_mount) = (scratch.path("from-device"), scratch.path("from-mount"));
    let whole = device.timed_copy(&device.path, &from_device)?;
    let sparse = device.timed_copy(&shown, &from_mount)?;
    print(&format!("cp from the device   read {:>8} in {:.2} s", human(whole.read), whole.took.as_secs_f64()))?;
    print(&format!("cp from the mount    read {:>8} in {:.2} s", human(sparse.read), sparse.took.as_secs_f64()))?;

    for copy in [&from_device, &from_mount] {
        if !identical(&image, copy)? {
            return Err(Error::failed("differs from the image").on(copy));
        }
    }
    print("copies  identical to the image, byte for byte")?;
    mount.end()?;
    device.end()
}

/// Prints a line. What was made is removed also if it cannot be printed.
fn print(line: &str) -> Result<()> {
    output::print(&format!("{line}\n"))
}

/// A temporary directory. Dropping it removes it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let base = std::env::temp_dir().join("blkholefs-demo-XXXXXX");
        let made = nix::unistd::mkdtemp(&base);
        made.map(Self).map_err(|error| Error::failed("cannot create a directory").on(&base).because(error))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            say(format_args!("blkholefs: {}: cannot remove: {error}", self.0.display()));
        }
    }
}

/// Creates a sparse file with extents of bytes that are not zero.
fn make_image(path: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::failed("cannot write").on(path).because(error);
    let file = File::create_new(path).map_err(failed)?;
    file.set_len(IMAGE.get()).map_err(failed)?;
    let mut extent = vec![0; EXTENT];
    for index in 0..EXTENTS {
        for (at, byte) in extent.iter_mut().enumerate() {
            *byte = u8::try_from((at as u64 * 31 + index) % 251 + 1).unwrap_or(1);
        }
        file.write_all_at(&extent, index * (IMAGE.get() / EXTENTS)).map_err(failed)?;
    }
    file.sync_all().map_err(failed)
}

/// A loop device. Dropping it detaches it.
struct LoopDevice {
    path: PathBuf,
    id: DeviceId,
    bound: bool,
}

/// The cost of a copy.
struct Cost {
    /// The bytes that were read from the device.
    read: Bytes,
    took: Duration,
}

impl LoopDevice {
    fn bind(image: &Path) -> Result<Self> {
        let output = output(Command::new("losetup").args(["--find", "--show", "--read-only"]).arg(image))?;
        let path = PathBuf::from(output.trim());
        let id = BlockDevice::open(&path)?.id;
        Ok(Self { path, id, bound: true })
    }

    /// Copies a file with cp(1).
    fn timed_copy(&self, from: &Path, to: &Path) -> Result<Cost> {
        let failed = |error: io::Error| Error::failed("cannot read its counters").on(&self.path).because(error);
        let stat = StatFile::open(self.id).map_err(failed)?;
        let before = stat.sectors_read().map_err(failed)?;
        let start = Instant::now();
        output(Command::new("cp").arg("--sparse=always").arg(from).arg(to))?;
        let took = start.elapsed();
        let after = stat.sectors_read().map_err(failed)?;
        let sectors = Sectors::new(after.get().saturating_sub(before.get()));
        Ok(Cost { read: sectors.bytes().unwrap_or(Bytes::MAX), took })
    }

    fn end(mut self) -> Result<()> {
        self.detach()
    }

    fn detach(&mut self) -> Result<()> {
        self.bound = false;
        output(Command::new("losetup").arg("--detach").arg(&self.path)).map(drop)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if self.bound
            && let Err(error) = self.detach()
        {
            say(format_args!("blkholefs: {error}"));
        }
    }
}

/// A mount. Dropping it unmounts it.
struct Mount {
    directory: PathBuf,
    mounted: bool,
}

impl Mount {
    fn new(device: &Path, directory: PathBuf) -> Result<Self> {
        fs::create_dir(&directory)
            .map_err(|error| Error::failed("cannot create the directory").on(&directory).because(error))?;
        output(own_program()?.arg("mount").arg(device).arg(&directory))?;
        Ok(Self { directory, mounted: true })
    }

    fn file(&self, device: &Path) -> PathBuf {
        self.directory.join(device.file_name().unwrap_or_default())
    }

    fn end(mut self) -> Result<()> {
        self.unmount()
    }

    fn unmount(&mut self) -> Result<()> {
        self.mounted = false;
        output(own_program()?.arg("umount").arg(&self.directory)).map(drop)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted
            && let Err(error) = self.unmount()
        {
            say(format_args!("blkholefs: {error}"));
        }
    }
}

fn own_program() -> Result<Command> {
    let program = std::env::current_exe();
    program
        .map(Command::new)
        .map_err(|error| Error::new(crate::error::ErrorKind::System, "cannot find the program").because(error))
}

/// Runs a program. Returns its standard output, or an error with its standard error.
fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_owned();
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| Error::failed("cannot run").on(&name).because(error))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(Error::failed(format!("failed ({}): {}", output.status, stderr.trim())).on(&name))
}

/// Whether two files have the same contents.
fn identical(one: &Path, other: &Path) -> Result<bool> {
    let open = |path: &Path| File::open(path).map_err(|error| Error::failed("cannot open").on(path).because(error));
    let (one_file, other_file) = (open(one)?, open(other)?);
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = Bytes::ZERO;
    loop {
        let read = |file: &File, buffer: &mut [u8], path: &Path| {
            crate::sys::file::read_full(file, buffer, at)
                .map_err(|error| Error::failed("cannot read").on(path).because(error))
        };
        let count = read(&one_file, &mut left, one)?;
        if read(&other_file, &mut right, other)? != count || left[..count] != right[..count] {
            return Ok(false);
        }
        if count == 0 {
            return Ok(true);
        }
        at = at.saturating_add(Bytes::new(count as u64));
    }
}
