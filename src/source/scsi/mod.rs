//! SCSI disks: GET LBA STATUS tells which blocks have no storage behind them.
//!
//! A hole needs two promises. The disk promises in READ CAPACITY(16), and in VPD page B2h where it has one, that a
//! block without storage reads as zeros; and it says of this block, now, that it is deallocated or anchored. The second
//! is asked each time a hole is claimed, because a disk in a storage network has other writers than this host, which
//! move no counter here. READ CAPACITY(16) is asked each time too: a disk reports that its promises changed to the first
//! command that comes, which may be that of another program. Only data is remembered, for a short while: that is allowed
//! whatever they do.
//!
//! A disk that cannot keep a promise, or fails a command, is not asked again as long as the map lives.

pub mod pages;
mod target;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use self::target::{Failure, Target};
use crate::error::{Error, plain};
use crate::map::{Extent, ExtentKind, HoleMap};
use crate::reason::DenseReason;
use crate::source::known::{Counters, KnownData};
use crate::source::walks::Walks;
use crate::source::{BlockDevice, Layer, Resolver, dense};
use crate::sys::block;
use crate::sys::device::DeviceId;
use crate::sys::sysfs::{self, StatFile};
use crate::units::Bytes;

/// What a SCSI disk is called in a layer.
const KIND: &str = "SCSI disk";
/// How often a block is asked again because the device reports an event instead.
const ATTEMPTS: u32 = 4;

/// Whether a device is a whole disk of the kernel's SCSI disk driver.
pub fn is_disk(id: DeviceId) -> io::Result<bool> {
    let driver = fs::read_link(sysfs::directory(id).join("device/driver"));
    // Peripheral device type 0 is a direct-access device (SPC-4).
    Ok(driver.is_ok_and(|driver| driver.file_name() == Some("sd".as_ref()))
        && sysfs::number(id, "device/type") == Some(0)
        && sysfs::partition(id)?.is_none())
}

/// Whether a device is a whole NVMe disk.
pub fn is_nvme_disk(id: DeviceId) -> io::Result<bool> {
    Ok(sysfs::kernel_name(id).is_some_and(|name| name.starts_with("nvme")))
}

/// The layer of a SCSI disk.
pub fn disk_layer(device: &BlockDevice, _resolver: &mut Resolver<'_>) -> Layer {
    match block::logical_block(&device.file) {
        Ok(block) => layer(&device.name(), device.file.clone(), device.len, block),
        Err(error) => {
            dense::layer(device.name(), KIND, device.len, format!("no logical block size: {}", plain(&error)))
        }
    }
}

/// The holes of an open SCSI disk (the whole disk, not a partition) of `len` bytes in logical blocks of `block` bytes.
///
/// The layer is dense, with the reason, when the disk makes no promise or refuses the first question.
pub fn layer(name: &str, file: Arc<File>, len: Bytes, block: Bytes) -> Layer {
    let id = file.metadata().ok().map(|metadata| DeviceId::from_dev(metadata.rdev()));
    let stat = id.and_then(|id| StatFile::open(id).ok());
    let counters = Box::new(move || stat.as_ref()?.read().ok());
    match ScsiMap::new(Target::disk(file), counters, len, block) {
        Ok(map) => Layer {
            name: name.to_owned(),
            kind: KIND.to_owned(),
            holes_from: "GET LBA STATUS".to_owned(),
            map: Arc::new(map),
            below: Vec::new(),
        },
        Err(reason) => dense::layer(name, KIND, len, reason.to_string()),
    }
}

/// An NVMe disk: all data.
pub fn nvme_layer(device: &BlockDevice, _resolver: &mut Resolver<'_>) -> Layer {
    let reason = "NVMe disks are not asked: it needs Get LBA Status with action type 02h (tracked allocated LBAs), \
                  which few of them have, and a namespace that reports zeros for deallocated blocks (DLFEAT 001b)";
    dense::layer(device.name(), "NVMe disk", device.len, reason)
}

struct ScsiMap {
    target: Target,
    len: Bytes,
    block: Bytes,
    known: Mutex<KnownData>,
    walks: Mutex<Walks>,
    gave_up: OnceLock<String>,
}

impl ScsiMap {
    fn new(target: Target, counters: Counters, len: Bytes, block: Bytes) -> Result<Self, Error> {
        target.promise(len, block)?;
        let map = Self {
            target,
            len,
            block,
            known: Mutex::new(KnownData::new(counters)),
            walks: Mutex::default(),
            gave_up: OnceLock::new(),
        };
        if len > Bytes::ZERO {
            map.known().refresh();
            map.ask(Bytes::ZERO)?;
        }
        Ok(map)
    }

    /// The run at `offset`, as the disk says now. What is data is remembered.
    fn ask(&self, offset: Bytes) -> Result<Extent, Error> {
        let start = offset.align_down(self.block);
        for _ in 0..ATTEMPTS {
            match self.target.status(start, self.block, self.len) {
                Ok(status) => {
                    if let Some(fault) = status.fault {
                        log::debug!("GET LBA STATUS at byte {start}: {fault}: data from there on");
                    }
                    self.known().add(start, &status.runs);
                    if status.runs.first().is_some_and(|run| run.kind == ExtentKind::Hole) {
                        self.target.zeros(self.len, self.block)?;
                    }
                    return Ok(status.runs.first().copied().unwrap_or_else(|| self.data_to(self.len)));
                }
                Err(Failure::Failed(error)) => return Err(error),
                Err(Failure::Attention) => self.target.promise(self.len, self.block)?,
            }
        }
        Err(Error::failed("GET LBA STATUS keeps being answered with UNIT ATTENTION"))
    }

    fn known(&self) -> MutexGuard<'_, KnownData> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn walks(&self) -> MutexGuard<'_, Walks> {
        self.walks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_data(&self, offset: Bytes) -> Option<Bytes> {
        let mut known = self.known();
        known.refresh();
        known.end_of(offset)
    }

    fn data_to(&self, end: Bytes) -> Extent {
        Extent { end: end.min(self.len), kind: ExtentKind::Data }
    }

    /// Calls what follows data, and remembers it, so that the next question finds the same.
    fn give_respite(&self, offset: Bytes, respite: Bytes) -> Extent {
        log::warn!("SCSI disk takes too long to tell where a run ends: {respite} bytes of data at byte {offset}");
        let run = self.data_to(offset.saturating_add(respite));
        self.known().add(offset, &[run]);
        run
    }

    fn give_up(&self, error: &Error) -> Extent {
        if self.gave_up.set(error.to_string()).is_ok() {
            log::warn!("SCSI disk shown as all data: {error}");
        }
        self.data_to(self.len)
    }
}

impl HoleMap for ScsiMap {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        if offset >= self.len {
            return Extent::outside(offset);
        }
        if self.gave_up.get().is_some() {
            return self.data_to(self.len);
        }
        let walk = self.walks().take(offset);
        let begin = Instant::now();
        let run = match self.known_data(offset) {
            Some(end) => self.data_to(end),
            None => match walk.respite(self.len) {
                Some(respite) => return self.give_respite(offset, respite),
                None => self.ask(offset).unwrap_or_else(|error| self.give_up(&error)),
            },
        };
        self.walks().put(walk.on(run, begin.elapsed()));
        run
    }

    fn dense_because(&self) -> Option<DenseReason> {
        self.gave_up.get().cloned().map(Into::into)
    }

    fn memory(&self) -> Bytes {
        self.known().memory()
    }
}

#[cfg(test)]
mod tests;
