//! Loop devices.

use std::path::{Path, PathBuf};

use super::{run, try_run, wait_until};

/// A loop device, detached with this value. Panics when something still holds the device then.
pub struct Loop(PathBuf);

impl Loop {
    /// A loop device over the whole of `backing`.
    pub fn new(backing: &Path) -> Self {
        Self::with_options(backing, &[])
    }

    /// A loop device with more words for losetup(8).
    pub fn with_options(backing: &Path, options: &[&str]) -> Self {
        let backing = backing.to_str().expect("a temporary path is text");
        let arguments: Vec<_> = ["--find", "--show"].iter().chain(options).copied().chain([backing]).collect();
        // Another process may take the device between losetup's search and its use of it.
        let mut found = Err(String::new());
        for _ in 0..20 {
            found = try_run("losetup", &arguments, "");
            match &found {
                Err(error) if error.contains("busy") => {}
                _ => break,
            }
        }
        Self(found.unwrap_or_else(|error| panic!("{error}")).trim_end().into())
    }

    /// The device, such as /dev/loop7.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The device's name, such as loop7.
    pub fn name(&self) -> &str {
        self.0.file_name().and_then(|name| name.to_str()).expect("losetup prints a path")
    }

    /// Runs losetup with more words on this device.
    pub fn losetup(&self, options: &[&str]) {
        run("losetup", options.iter().copied().chain([self.0.to_str().expect("text")]));
    }

    /// Bytes that were read from the device so far, by anyone.
    pub fn bytes_read(&self) -> u64 {
        super::check::bytes_read(&self.0)
    }

    /// The device's partition `number`, once the kernel has made it.
    pub fn partition(&self, number: u32) -> PathBuf {
        let path = PathBuf::from(format!("{}p{number}", self.0.display()));
        assert!(wait_until(|| path.exists()), "{} does not appear", path.display());
        path
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = try_run("losetup", ["--detach".as_ref(), self.0.as_os_str()], "");
        let backing = format!("/sys/block/{}/loop", self.name());
        let gone = detached.is_ok() && wait_until(|| !Path::new(&backing).exists());
        assert!(gone || std::thread::panicking(), "{} is still held: {detached:?}", self.0.display());
    }
}
