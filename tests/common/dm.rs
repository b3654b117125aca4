//! Device-mapper devices.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::check::open;
use super::image::Image;
use super::loop_device::Loop;
use super::{run, run_with_input, try_run, wait_until};

/// A device-mapper device. Dropping this value removes it, and panics when the device is still in use.
pub struct Dm {
    name: String,
    path: PathBuf,
}

impl Dm {
    /// A device with this table, one target in a line.
    pub fn new(table: &str) -> Self {
        Self::with_options(table, &[])
    }

    /// A device with this uuid.
    pub fn with_uuid(table: &str, uuid: &str) -> Self {
        Self::with_options(table, &["--uuid", uuid])
    }

    fn with_options(table: &str, options: &[&str]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        run_with_input("dmsetup", ["create", &name].iter().chain(options), table);
        let path = Path::new("/dev/mapper").join(&name);
        Self { name, path }
    }

    /// A device that shows the whole of another one.
    pub fn linear(below: &Path) -> Self {
        Self::new(&format!("0 {} linear {} 0", sectors(below), below.display()))
    }

    /// The device below /dev/mapper.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Replaces the table of the live device.
    pub fn reload(&self, table: &str) {
        run_with_input("dmsetup", ["load", &self.name], table);
        self.resume();
    }

    /// Suspends the device: reads and writes wait until [`Dm::resume`].
    pub fn suspend(&self) {
        run("dmsetup", ["suspend", &self.name]);
    }

    /// Resumes the device, and makes a loaded table live.
    pub fn resume(&self) {
        run("dmsetup", ["resume", &self.name]);
    }

    /// Sends a message to the first target.
    pub fn message(&self, text: &str) {
        run("dmsetup", ["message", &self.name, "0", text]);
    }

    /// The status line.
    pub fn status(&self) -> String {
        run("dmsetup", ["status", &self.name])
    }
}

impl Drop for Dm {
    fn drop(&mut self) {
        // Another test's child has this process's descriptors between its fork and its exec, and so the device is busy.
        let mut removed = Ok(String::new());
        let _ = wait_until(|| {
            removed = try_run("dmsetup", ["remove", &self.name], "");
            !removed.as_ref().is_err_and(|error| error.contains("busy")) || std::thread::panicking()
        });
        assert!(removed.is_ok() || std::thread::panicking(), "{removed:?}");
    }
}

impl Make {
    fn new(size: u64, block: u64) -> Self {
        let metadata = 16 << 20;
        Self {
            size,
            block,
            metadata,
            metadata_reads: 0,
            metadata_writes: 0,
            slow_data: 0,
            features: &["skip_block_zeroing", "error_if_no_space"],
            data: None,
        }
    }
}

/// A thin pool, by default on two loop devices.
pub struct Pool {
    pool: Dm,
    slow: Vec<Dm>,
    _data: Option<Loop>,
    metadata: Loop,
    _images: [Image; 2],
}

/// How a pool is made. Writes that find no space fail.
struct Make {
    size: u64,
    block: u64,
    metadata: u64,
    /// Milliseconds that a read of the metadata takes.
    metadata_reads: u32,
    /// Milliseconds that a write of the metadata takes.
    metadata_writes: u32,
    /// Bytes at the start of the data device whose writes and discards are slow.
    slow_data: u64,
    features: &'static [&'static str],
    /// The data device, if it is not a loop device.
    data: Option<PathBuf>,
}

impl Pool {
    /// A pool for `size` bytes of data in blocks of `block` bytes.
    pub fn new(size: u64, block: u64) -> Self {
        Self::make(&Make::new(size, block))
    }

    /// A pool that fills the part of a new block that is not written with zeros.
    pub fn with_zeroing(size: u64, block: u64) -> Self {
        Self::make(&Make { features: &["error_if_no_space"], ..Make::new(size, block) })
    }

    /// A pool with exactly these features.
    pub fn with_features(size: u64, block: u64, features: &'static [&'static str]) -> Self {
        Self::make(&Make { features, ..Make::new(size, block) })
    }

    /// A pool whose metadata is slow to read and fast to write.
    pub fn with_slow_metadata(size: u64, block: u64) -> Self {
        Self::make(&Make { metadata_reads: 10, ..Make::new(size, block) })
    }

    /// A pool whose metadata takes so many milliseconds to be read and written: so do its messages and commits.
    pub fn with_slow_commits(size: u64, block: u64, reads: u32, writes: u32) -> Self {
        Self::make(&Make { metadata_reads: reads, metadata_writes: writes, ..Make::new(size, block) })
    }

    /// A pool whose first blocks, which are allocated first, are slow to write and discard.
    pub fn with_slow_data(size: u64, block: u64, slow: u64) -> Self {
        Self::make(&Make { slow_data: slow, ..Make::new(size, block) })
    }

    /// A pool whose data is on `data`.
    pub fn over(data: &Path, block: u64) -> Self {
        Self::make(&Make { data: Some(data.to_owned()), ..Make::new(sectors(data) * 512, block) })
    }

    /// [`Pool::new`] with `metadata` bytes for the metadata.
    pub fn with_metadata(size: u64, block: u64, metadata: u64) -> Self {
        Self::make(&Make { metadata, ..Make::new(size, block) })
    }

    fn make(make: &Make) -> Self {
        let images = [Image::new(make.size), Image::new(make.metadata)];
        let data = make.data.is_none().then(|| Loop::new(images[0].path()));
        let metadata = Loop::new(images[1].path());
        let data_device = data.as_ref().map(Loop::path).or(make.data.as_deref());
        let (mut data_path, mut metadata_path) = (data_device.expect("one of both"), metadata.path());
        let mut slow = Vec::new();
        let (reads, writes) = (make.metadata_reads, make.metadata_writes);
        if reads + writes > 0 {
            let path = metadata_path.display();
            slow.push(Dm::new(&format!("0 {} delay {path} 0 {reads} {path} 0 {writes}", sectors(metadata_path))));
        }
        if make.slow_data > 0 {
            let (path, first, all) = (data_path.display(), make.slow_data / 512, sectors(data_path));
            let delay = format!("0 {first} delay {path} 0 0 {path} 0 2000 {path} 0 0");
            slow.push(Dm::new(&format!("{delay}\n{first} {} linear {path} {first}", all - first)));
        }
        if let Some(slow) = slow.last() {
            *(if reads + writes > 0 { &mut metadata_path } else { &mut data_path }) = slow.path();
        }
        let pool = Dm::new(&format!(
            "0 {} thin-pool {} {} {} 0 {} {}",
            make.size / 512,
            metadata_path.display(),
            data_path.display(),
            make.block / 512,
            make.features.len(),
            make.features.join(" ")
        ));
        Self { pool, slow, _data: data, metadata, _images: images }
    }

    /// The pool's own device.
    pub fn dm(&self) -> &Dm {
        &self.pool
    }

    /// The device that makes the metadata or the data slow.
    pub fn slow(&self) -> &Dm {
        &self.slow[0]
    }

    /// The device with the metadata.
    pub fn metadata(&self) -> &Path {
        self.metadata.path()
    }

    /// The device that makes the metadata slow.
    pub fn slow_metadata(&self) -> &Dm {
        self.slow.first().expect("the pool was made with slow metadata")
    }

    /// A new, empty volume of `size` bytes.
    pub fn thin(&self, id: u32, size: u64) -> Dm {
        self.pool.message(&format!("create_thin {id}"));
        self.activate(id, size, None)
    }

    /// A snapshot of a volume.
    pub fn snapshot(&self, id: u32, origin: &Dm, origin_id: u32) -> Dm {
        origin.suspend();
        self.pool.message(&format!("create_snap {id} {origin_id}"));
        origin.resume();
        self.activate(id, sectors(origin.path()) * 512, None)
    }

    /// Shows the volume `id`, which must exist, reading from `origin` what is not provisioned.
    pub fn activate(&self, id: u32, size: u64, origin: Option<&Path>) -> Dm {
        let origin = origin.map_or(String::new(), |path| path.display().to_string());
        Dm::new(&format!("0 {} thin {} {id} {origin}", size / 512, self.pool.path().display()))
    }

    /// The root of the metadata snapshot, if one is held.
    pub fn held_root(&self) -> Option<u64> {
        let status = self.pool.status();
        // start, length, target, transaction, used metadata, used data, held root
        let held = status.split(' ').nth(6).unwrap_or_else(|| panic!("{status}"));
        (held != "-").then(|| held.parse().expect("a block number"))
    }

    /// Removes the pool, and calls `work` with its metadata and its data.
    pub fn offline<T>(self, work: impl FnOnce(&Path, &Path) -> T) -> T {
        let Self { pool, slow, metadata, _data: data, .. } = self;
        drop(pool);
        drop(slow);
        work(metadata.path(), data.expect("a pool with a data device of its own").path())
    }

    /// Removes the pool and checks its metadata with `thin_check`.
    pub fn thin_check(self) {
        let Self { pool, slow, metadata, .. } = self;
        drop(pool);
        drop(slow);
        run("thin_check", ["--quiet".as_ref(), metadata.path().as_os_str()]);
    }

    /// Deletes the volume `id`, which must not be shown any more.
    pub fn delete(&self, id: u32) {
        self.pool.message(&format!("delete {id}"));
    }
}

/// The result of `work` from a call during which device-mapper raised no event. Other tests make and remove devices at the
/// same time, so it may be called several times.
pub fn without_events<T>(mut work: impl FnMut() -> T) -> T {
    let mut result = None;
    let quiet = wait_until(|| {
        let control = File::open("/dev/mapper/control").expect("root opens it");
        result = Some(work());
        // It is readable after the first event since it was opened.
        let mut polled = [PollFd::new(control.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::ZERO).expect("it can be polled") == 0
    });
    assert!(quiet, "device-mapper raises events all the time");
    result.expect("it was called")
}

/// The size of a block device in sectors.
pub fn sectors(device: &Path) -> u64 {
    open(device).seek(SeekFrom::End(0)).expect("devices have an end") / 512
}
