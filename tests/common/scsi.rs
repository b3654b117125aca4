//! SCSI disks in memory, by the kernel's `scsi_debug` module.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::check::{Extent, Kind};
use super::{run, try_run, wait_until};

/// The module has one set of parameters, so there is one disk at a time.
static ONE: Mutex<()> = Mutex::new(());

/// A SCSI disk. Dropping this value removes it, and panics when the disk is still in use.
pub struct ScsiDisk {
    path: PathBuf,
    _one: MutexGuard<'static, ()>,
}

impl ScsiDisk {
    /// A thinly provisioned disk of `mib` MiB, with additional parameters of the module.
    pub fn new(mib: u64, parameters: &[&str]) -> Self {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        run("modprobe", ["sd_mod"]);
        let size = format!("dev_size_mb={mib}");
        let thin = ["scsi_debug", &size, "lbpu=1", "lbpws=1"];
        run("modprobe", thin.iter().chain(parameters));
        let mut found = None;
        let appears = wait_until(|| {
            found = Self::node();
            found.is_some()
        });
        assert!(appears, "scsi_debug does not create a disk");
        Self { path: found.expect("the disk exists"), _one: one }
    }

    /// The node of the module's disk.
    fn node() -> Option<PathBuf> {
        let disks = fs::read_dir("/sys/block").ok()?.flatten();
        let ours =
            |path: &Path| fs::read_to_string(path.join("device/model")).is_ok_and(|text| text.contains("scsi_debug"));
        let disk = disks.map(|disk| disk.path()).find(|path| ours(path))?;
        Some(Path::new("/dev").join(disk.file_name()?)).filter(|node| node.exists())
    }

    /// The disk's node.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The disk's partition `number`, once the kernel has made it.
    pub fn partition(&self, number: u32) -> PathBuf {
        let path = PathBuf::from(format!("{}{number}", self.path.display()));
        assert!(wait_until(|| path.exists()), "{} does not appear", path.display());
        path
    }

    /// Takes the disk away, as a pulled cable does.
    pub fn pull_out(&self) {
        let name = self.path.file_name().and_then(|name| name.to_str()).expect("a name");
        fs::write(format!("/sys/block/{name}/device/delete"), "1").expect("the disk is there");
    }

    /// Sends UNMAP for a range of logical blocks, past the block layer.
    pub fn unmap(&self, block: u64, blocks: u64) {
        let (lba, num) = (format!("--lba={block}"), format!("--num={blocks}"));
        run("sg_unmap", ["--force".as_ref(), lba.as_ref(), num.as_ref(), self.path.as_os_str()]);
    }

    /// The map that `sg_get_lba_status` reports.
    pub fn lba_status(&self) -> Vec<Extent> {
        let block: u64 = run("blockdev", ["--getss".as_ref(), self.path.as_os_str()]).trim().parse().expect("a number");
        let size: u64 = run("blockdev", ["--getsize64".as_ref(), self.path.as_os_str()]).trim().parse().expect("one");
        let mut extents: Vec<Extent> = Vec::new();
        let mut offset = 0;
        while offset < size {
            let lba = format!("--lba={}", offset / block);
            let text = run("sg_get_lba_status", ["--brief".as_ref(), lba.as_ref(), self.path.as_os_str()]);
            let line = text.lines().find(|line| line.starts_with("0x")).unwrap_or_default();
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            let [_, blocks, status, ..] = words[..] else { panic!("sg_get_lba_status: {text}") };
            let blocks = u64::from_str_radix(blocks.trim_start_matches("0x"), 16).expect("a number of blocks");
            let kind = if matches!(status, "1" | "2") { Kind::Hole } else { Kind::Data };
            let end = offset + blocks * block;
            match extents.last_mut() {
                Some(last) if last.0 == kind => last.1.end = end,
                _ => extents.push(Extent(kind, offset..end)),
            }
            offset = end;
        }
        extents
    }
}

impl Drop for ScsiDisk {
    fn drop(&mut self) {
        let mut removed = Ok(String::new());
        let gone = wait_until(|| {
            removed = try_run("rmmod", ["scsi_debug"], "");
            removed.is_ok()
        });
        assert!(gone || std::thread::panicking(), "{} is still held: {removed:?}", self.path.display());
    }
}
