//! SCSI disks: GET LBA STATUS reports which logical blocks have no storage.
//!
//! A hole needs two answers of the disk. READ CAPACITY(16), and VPD page B2h where the disk has one, report that blocks
//! without storage read as zeros; GET LBA STATUS reports that this block is deallocated or anchored. Both are queried
//! each time a hole is claimed. The second, because a disk in a storage network has other writers than this host, which
//! change no counter here. READ CAPACITY(16), because a disk reports a change of its parameters to the first command
//! that it receives, which may be that of another program.
//!
//! A disk that does not report zeros, or fails a command, is all data for as long as the map lives.

mod device;
pub mod pages;

use std::fs;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use self::device::{ScsiDevice, ScsiFailure};
use crate::error::{Error, Result};
use crate::map::{Extent, ExtentKind};
use crate::reason::DenseReason;
use crate::source::live::{LiveMap, LiveSource, QueryError, StaticDevices, WriteEvidence};
use crate::source::{BlockDevice, Context, Layer, Resolver, dense};
use crate::sys::block;
use crate::sys::device::DeviceId;
use crate::sys::sysfs::{self, IoCounters};
use crate::units::Bytes;

/// The kind of a SCSI disk's layer.
const KIND: &str = "SCSI disk";
/// How often GET LBA STATUS is sent again because the device reports UNIT ATTENTION instead.
const ATTEMPTS: u32 = 4;

/// Whether a device is a whole disk of the kernel's SCSI disk driver.
///
/// # Errors
/// When sysfs cannot be read.
pub fn is_disk(id: DeviceId) -> io::Result<bool> {
    let driver = fs::read_link(sysfs::directory(id).join("device/driver"));
    // Peripheral device type 0 is a direct-access device (SPC-4).
    Ok(driver.is_ok_and(|driver| driver.file_name() == Some("sd".as_ref()))
        && sysfs::number(id, "device/type") == Some(0)
        && sysfs::partition(id)?.is_none())
}

/// The layer of a SCSI disk.
pub fn disk_layer(device: &BlockDevice, resolver: &mut Resolver<'_>) -> Layer {
    match block::logical_block(&device.file) {
        Ok(block) => layer(device, block, resolver.context),
        Err(error) => {
            let reason = DenseReason::cannot("read its logical block size", &error);
            dense::layer(device.name(), KIND, device.len, reason)
        }
    }
}

/// The layer of an open SCSI disk (the whole disk, not a partition) in logical blocks of `block` bytes.
///
/// The layer is dense, with the reason, when the disk does not report zeros or fails the first query.
fn layer(device: &BlockDevice, block: Bytes, context: &Context) -> Layer {
    let (name, static_devices) = (device.name(), context.static_devices.as_ref());
    let evidence = match static_devices {
        Some(_) => WriteEvidence::complete(device),
        None => WriteEvidence::counters(device),
    };
    match map(&name, ScsiDevice::disk(device.file.clone()), evidence, device.len, block, static_devices) {
        Ok(map) => Layer {
            name,
            kind: KIND.to_owned(),
            holes_from: "GET LBA STATUS".to_owned(),
            map: Arc::new(map),
            device: None,
            below: Vec::new(),
        },
        Err(reason) => dense::layer(name, KIND, device.len, reason.to_string()),
    }
}

/// The map of a disk that reports zeros and has answered a first query.
fn map(
    name: &str,
    device: ScsiDevice,
    evidence: WriteEvidence,
    len: Bytes,
    block: Bytes,
    static_devices: Option<&StaticDevices>,
) -> Result<LiveMap<LbaStatusSource>> {
    device.check_zeros(len, block)?;
    let source = LbaStatusSource { name: name.to_owned(), device, len, block, evidence, failed: OnceLock::new() };
    let map = LiveMap::new(source, static_devices);
    map.probe()?;
    Ok(map)
}

/// The extents of a disk, from GET LBA STATUS.
struct LbaStatusSource {
    name: String,
    device: ScsiDevice,
    len: Bytes,
    block: Bytes,
    evidence: WriteEvidence,
    /// Why a command failed. No command is sent after that.
    failed: OnceLock<DenseReason>,
}

impl LbaStatusSource {
    /// The extents from `start` on, which the disk reports now, and its promise of zeros for the `used` ones of them.
    fn status(&self, start: Bytes, used: Used) -> Result<Vec<Extent>> {
        for _ in 0..ATTEMPTS {
            match self.device.lba_status(start, self.block, self.len) {
                Ok(status) => {
                    if let Some(fault) = status.fault {
                        log::debug!("{}: GET LBA STATUS at byte {start}: {fault}: data from there on", self.name);
                    }
                    let used = match used {
                        // It holds the offset of the question: it begins on the offset's block. Of the others, only data
                        // is used.
                        Used::First => &status.extents[..status.extents.len().min(1)],
                        Used::All => &status.extents,
                    };
                    if used.iter().any(|extent| extent.kind == ExtentKind::Hole) {
                        self.device.check_capacity(self.len, self.block)?;
                    }
                    return Ok(status.extents);
                }
                Err(ScsiFailure::Failed(error)) => return Err(error),
                Err(ScsiFailure::UnitAttention) => self.device.check_zeros(self.len, self.block)?,
            }
        }
        Err(Error::failed("the disk answers GET LBA STATUS with UNIT ATTENTION again and again"))
    }

    /// The extents from the start of the first range on.
    fn query(&self, ranges: &[Range<Bytes>], used: Used) -> std::result::Result<Vec<Extent>, QueryError> {
        // GET LBA STATUS has a start and no end: the disk decides how much it reports.
        let start = ranges.first().map_or(Bytes::ZERO, |range| range.start);
        self.status(start, used).map_err(|error| {
            self.failed.get_or_init(|| error.to_string().into());
            QueryError::Device(error)
        })
    }
}

/// The extents of an answer whose holes are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Used {
    First,
    All,
}

impl LiveSource for LbaStatusSource {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn len(&self) -> Bytes {
        self.len
    }

    fn block(&self) -> Bytes {
        self.block
    }

    fn longest_query(&self) -> Option<Bytes> {
        None
    }

    fn extents(&self, ranges: &[Range<Bytes>]) -> std::result::Result<Vec<Extent>, QueryError> {
        self.query(ranges, Used::First)
    }

    fn answers(&self, ranges: &[Range<Bytes>]) -> Vec<std::result::Result<Vec<Extent>, QueryError>> {
        vec![self.query(ranges, Used::All)]
    }

    fn unusable(&self) -> Option<DenseReason> {
        self.failed.get().cloned()
    }

    fn counters(&self) -> Option<IoCounters> {
        self.evidence.read()
    }

    fn medium(&self) -> Option<u64> {
        self.evidence.medium()
    }

    fn unobserved(&self) -> Option<String> {
        self.evidence.unobserved()
    }
}

#[cfg(test)]
mod tests;
