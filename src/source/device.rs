//! An open block device, and the guards that every one of them has.

use std::fs::File;
use std::hash::{Hash, Hasher};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result, shown};
use crate::source::Guard;
use crate::sys::block;
use crate::sys::device::{self, DeviceId};
use crate::units::Bytes;

/// A block device, open for reading.
#[derive(Clone, Debug)]
pub struct BlockDevice {
    /// Its number.
    pub id: DeviceId,
    /// The node that it was opened by.
    pub path: PathBuf,
    /// The descriptor. It is the proof of identity: nothing is opened by path again.
    pub file: Arc<File>,
    /// Its length when it was opened.
    pub len: Bytes,
}

impl BlockDevice {
    /// Opens the block device at `path`.
    ///
    /// # Errors
    /// When it cannot be opened, or is no block device, or does not tell its size.
    pub fn open(path: &Path) -> Result<Self> {
        let file = device::open(path, false).map_err(|error| Error::failed("cannot open").on(path).because(error))?;
        Self::from_file(file, path)
    }

    /// Takes an open block device.
    ///
    /// # Errors
    /// When it is no block device, or does not tell its size.
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

    /// The device's node, for people.
    pub fn name(&self) -> String {
        shown(&self.path).to_string()
    }
}

/// The size of a block device, and where its whole logical blocks end.
pub struct SizeGuard {
    file: Arc<File>,
    len: Bytes,
    whole: Option<Bytes>,
}

impl SizeGuard {
    /// Holds a device to the length that it was opened with.
    pub fn new(device: &BlockDevice) -> Self {
        Self { file: device.file.clone(), len: device.len, whole: block::whole_blocks(&device.file, device.len).ok() }
    }

    /// What can be read surely: the whole logical blocks. `None` where their size is not known.
    pub fn whole(&self) -> Option<Bytes> {
        self.whole
    }
}

impl Guard for SizeGuard {
    fn unchanged(&self) -> bool {
        block::len(&self.file).is_ok_and(|len| len == self.len)
            && block::whole_blocks(&self.file, self.len).ok() == self.whole
    }

    fn trace(&self, mut trace: &mut dyn Hasher) {
        self.len.hash(&mut trace);
    }
}

/// The medium or backing file of a block device, which the disk sequence counts.
pub struct MediumGuard {
    file: Arc<File>,
    sequence: Option<u64>,
}

impl MediumGuard {
    /// Remembers what is in a device now.
    pub fn new(device: &BlockDevice) -> Self {
        Self { file: device.file.clone(), sequence: block::disk_sequence(&device.file).ok().flatten() }
    }
}

impl Guard for MediumGuard {
    fn unchanged(&self) -> bool {
        block::disk_sequence(&self.file).is_ok_and(|sequence| sequence == self.sequence)
    }

    fn trace(&self, mut trace: &mut dyn Hasher) {
        self.sequence.hash(&mut trace);
    }
}
