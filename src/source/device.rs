//! An open block device, and the guards that every block device has.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result, shown};
use crate::source::{Guard, Reach, Trace, nbd};
use crate::sys::block;
use crate::sys::device::{self, DeviceId};
use crate::sys::sysfs;
use crate::units::Bytes;

/// A block device, open for reading.
#[derive(Clone, Debug)]
pub struct BlockDevice {
    /// Its number.
    pub id: DeviceId,
    /// The path of the node by which it was opened.
    pub path: PathBuf,
    /// The descriptor. It identifies the device: nothing is opened by path again.
    pub file: Arc<File>,
    /// Its length when it was opened.
    pub len: Bytes,
}

impl BlockDevice {
    /// Opens the block device at `path`.
    ///
    /// # Errors
    /// When it cannot be opened, is no block device, or its size cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let file = device::open(path, false).map_err(|error| Error::failed("cannot open").on(path).because(error))?;
        Self::from_file(file, path)
    }

    /// Takes an open block device.
    ///
    /// # Errors
    /// When it is no block device, or its size cannot be read.
    pub fn from_file(file: File, path: &Path) -> Result<Self> {
        let failed = |what: &str, error: io::Error| Error::failed(what).on(path).because(error);
        let metadata = file.metadata().map_err(|error| failed("cannot stat", error))?;
        if !metadata.file_type().is_block_device() {
            return Err(Error::failed("is not a block device").on(path));
        }
        let len = block::len(&file).map_err(|error| failed("cannot read the size", error))?;
        Ok(Self { id: DeviceId::from_dev(metadata.rdev()), path: path.to_owned(), file: Arc::new(file), len })
    }

    /// Opens a block device by its number.
    ///
    /// # Errors
    /// As open(2), and when no node in `/dev` is that device.
    pub fn open_id(id: DeviceId) -> io::Result<Self> {
        let (file, path) = device::open_id(id, false)?;
        let len = block::len(&file)?;
        Ok(Self { id, path, file: Arc::new(file), len })
    }

    /// The path of the device's node, for people.
    pub fn name(&self) -> String {
        shown(&self.path).to_string()
    }
}

/// Guards the length of a block device and the end of its whole logical blocks.
pub struct SizeGuard {
    id: DeviceId,
    file: Arc<File>,
    len: Bytes,
    whole: Option<Bytes>,
}

impl SizeGuard {
    /// Guards the length that a device had when it was opened.
    pub fn new(device: &BlockDevice) -> Self {
        let whole = block::whole_blocks(&device.file, device.len).ok();
        Self { id: device.id, file: device.file.clone(), len: device.len, whole }
    }

    /// The end of the whole logical blocks: reads up to there are certain to work. `None` where the block size is not known.
    pub fn whole(&self) -> Option<Bytes> {
        self.whole
    }
}

impl Guard for SizeGuard {
    fn unchanged(&self) -> bool {
        block::len(&self.file).is_ok_and(|len| len == self.len)
            && block::whole_blocks(&self.file, self.len).ok() == self.whole
    }

    fn is_of_length(&self) -> bool {
        true
    }

    /// The device and all below it are known by more than their numbers, which are used again. A device of the kernel's NBD
    /// client may get another export, and its server may have other clients that write: it counts as unchanged while it is open.
    fn trace(&self, trace: &mut Trace) {
        trace.add(&self.len);
        let devices = sysfs::incarnations(self.id);
        if devices.as_ref().is_ok_and(|devices| devices.keys().any(|id| id.major == nbd::MAJOR)) {
            trace.limit(Reach::Open);
        }
        trace.add_or_nothing(devices);
    }
}

/// Guards the medium or backing file of a block device, by the disk sequence number.
pub struct MediumGuard {
    id: DeviceId,
    file: Arc<File>,
    sequence: Option<u64>,
}

impl MediumGuard {
    /// Guards the present medium of a device.
    pub fn new(device: &BlockDevice) -> Self {
        Self { id: device.id, file: device.file.clone(), sequence: block::disk_sequence(&device.file).ok().flatten() }
    }
}

impl Guard for MediumGuard {
    fn unchanged(&self) -> bool {
        block::disk_sequence(&self.file).is_ok_and(|sequence| sequence == self.sequence)
    }

    /// Linux 5.10 has no such number. There a disk whose medium can be changed proves nothing to another process.
    fn trace(&self, trace: &mut Trace) {
        trace.add(&self.sequence);
        if self.sequence.is_none() && sysfs::number(self.id, "removable") == Some(1) {
            trace.limit(Reach::Process);
        }
    }
}
