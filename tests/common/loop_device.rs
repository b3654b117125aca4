//! Loop devices.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::{ioctl, run, try_run, wait_until};

/// A loop device. Dropping this value detaches it, and panics when the device is still in use.
pub struct Loop {
    path: PathBuf,
    /// The number of a device that [`Loop::reserved`] made.
    reserved: Option<u32>,
    partitions: Vec<u32>,
}

impl Loop {
    /// A loop device over the whole of `backing`.
    pub fn new(backing: &Path) -> Self {
        Self::with_options(backing, &[])
    }

    /// A loop device with additional options for losetup(8).
    pub fn with_options(backing: &Path, options: &[&str]) -> Self {
        let backing = backing.to_str().expect("a temporary path is text");
        let arguments: Vec<_> = ["--find", "--show"].iter().chain(options).copied().chain([backing]).collect();
        // Another process may take the device between losetup's search and its use of it, each time.
        let mut found = Err(String::new());
        let _ = wait_until(|| {
            found = try_run("losetup", &arguments, "");
            !found.as_ref().is_err_and(|error| error.contains("busy"))
        });
        let path = found.unwrap_or_else(|error| panic!("{error}")).trim_end().into();
        Self { path, reserved: None, partitions: Vec::new() }
    }

    /// A loop device of a number that no search for a free one finds, so that no other process binds it while it is
    /// unbound.
    pub fn reserved(backing: &Path) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // Where another process has some of these numbers, the next ones are tried.
        let first = 1000 + std::process::id() % 100_000 * 8;
        let number =
            (0..1000).map(|_| first + NUMBER.fetch_add(1, Ordering::Relaxed)).find(|number| ioctl::loop_add(*number));
        let number = number.expect("an unused number");
        let device = Self { path: format!("/dev/loop{number}").into(), reserved: Some(number), partitions: Vec::new() };
        device.bind(backing);
        device
    }

    /// Binds the device, which must not be bound.
    pub fn bind(&self, backing: &Path) {
        run("losetup", [&self.path, backing]);
    }

    /// Unbinds the device. Panics when something still holds it.
    pub fn detach(&self) {
        let backing = self.backing();
        run("losetup", ["--detach".as_ref(), self.path.as_os_str()]);
        assert!(wait_until(|| self.backing() != backing), "{} is still held", self.path.display());
    }

    /// The backing file as the kernel names it, if the device is bound. Another test may use the number as soon as it is
    /// free, but not the same image.
    fn backing(&self) -> Option<Vec<u8>> {
        std::fs::read(format!("/sys/block/{}/loop/backing_file", self.name())).ok()
    }

    /// The device, such as /dev/loop7.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The device's name, such as loop7.
    pub fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).expect("losetup prints a path")
    }

    /// Runs losetup with additional options on this device.
    pub fn losetup(&self, options: &[&str]) {
        run("losetup", options.iter().copied().chain([self.path.to_str().expect("text")]));
    }

    /// Bytes that were read from the device so far, by all processes.
    pub fn bytes_read(&self) -> u64 {
        super::check::bytes_read(&self.path)
    }

    /// Adds a partition of these sectors, whether or not this kernel reads partition tables.
    pub fn add_partition(&mut self, number: u32, start: u64, size: u64) -> PathBuf {
        let words = [number.to_string(), start.to_string(), size.to_string()];
        run("addpart", std::iter::once(self.path.as_os_str()).chain(words.iter().map(AsRef::as_ref)));
        self.partitions.push(number);
        let path = PathBuf::from(format!("{}p{number}", self.path.display()));
        assert!(wait_until(|| path.exists()), "{} does not appear", path.display());
        path
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let device = self.path.as_os_str();
        if std::thread::panicking() {
            let _ = try_run("losetup", ["--detach".as_ref(), device], "");
            return;
        }
        for number in &self.partitions {
            run("delpart", [device, number.to_string().as_ref()]);
        }
        self.detach();
        if let Some(number) = self.reserved {
            ioctl::loop_remove(number);
        }
    }
}
