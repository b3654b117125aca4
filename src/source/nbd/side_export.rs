//! The export that a device of the kernel's NBD client is connected to, as the user says.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::kernel_connection::KernelConnection;
use super::{Client, MAJOR, NbdExport, Uri};
use crate::error::{Error, Result};
use crate::source::{BlockDevice, Layer, Stack};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::device::{self, DeviceId};
use crate::sys::file::read_full;
use crate::sys::sysfs;
use crate::units::Bytes;

/// What is compared at each place.
const BLOCK: u64 = 4096;
/// Blocks at the start that are compared: partition tables and superblocks, which differ between disks most often.
const FIRST: u64 = 16;
/// Blocks that are compared beyond them, spread evenly up to the end.
const SPREAD: u64 = 48;
/// How often a block is read again that differs: it may be written at that moment.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(20);

/// An export, and the one device that it is of. Any other NBD device has other bytes, whatever its size.
#[derive(Debug)]
pub struct SideExport {
    device: DeviceId,
    export: NbdExport,
    link: std::result::Result<Arc<KernelConnection>, String>,
}

impl SideExport {
    /// Takes `uri` for the export of the connection that the NBD device has now which `stack` is or stands on.
    ///
    /// # Errors
    /// When it stands on none, or on several: it is not known which one is meant. When the bytes of the device are not
    /// those of the export.
    pub fn new(uri: Uri, stack: &Stack, name: &Path) -> Result<Self> {
        let mut devices = Vec::new();
        collect(&stack.top, &mut devices);
        let id = match devices.as_slice() {
            [id] => *id,
            [] => return Err(Self::unclear("does not stand on a device of the kernel's NBD client").on(name)),
            _ => return Err(Self::unclear("stands on several devices of the kernel's NBD client").on(name)),
        };
        let device =
            BlockDevice::open_id(id).map_err(|error| Error::failed("cannot open").on(id.to_string()).because(error))?;
        let link = KernelConnection::new(&device).map(Arc::new);
        let beside = Self { device: device.id, export: NbdExport::new(uri), link };
        beside.compare(&device)?;
        Ok(beside)
    }

    /// The error of an option that says nothing clear.
    pub fn unclear(why: &str) -> Error {
        Error::usage(format!("option 'nbd' names the export of one device: what is shown {why}"))
    }

    /// Follows what happens to the connection, in a thread of its own.
    pub fn watch(&self) {
        if let Ok(link) = &self.link {
            link.watch();
        }
    }

    /// The export, if it is that of `device`, and the connection for which the user said so.
    pub(super) fn of(
        &self,
        device: DeviceId,
    ) -> Option<(&NbdExport, std::result::Result<&Arc<KernelConnection>, &str>)> {
        let link = self.link.as_ref().map_err(String::as_str);
        (self.device == device).then_some((&self.export, link))
    }

    /// Finds an export that is obviously not the device's. Equal bytes prove nothing: zeros are equal to zeros.
    fn compare(&self, device: &BlockDevice) -> Result<()> {
        // What cannot be asked for holes cannot be wrong about them; why that is so is said at each look.
        let (Ok(link), Ok(client)) = (&self.link, self.export.client()) else { return Ok(()) };
        if client.size() != device.len || !client.is_visible_elsewhere() {
            return Ok(());
        }
        let differs = |at: &Bytes| differs(device, &client, *at);
        match places(device.len).into_iter().find(differs) {
            // Its bytes may be those of another export by now.
            Some(at) if link.lost().is_none() => Err(Error::failed(format!(
                "is not connected to the export {}: they differ at byte {at}",
                self.export.uri()
            ))
            .on(device.name())),
            _ => Ok(()),
        }
    }
}

/// Where a device of `len` bytes is compared.
fn places(len: Bytes) -> Vec<Bytes> {
    let blocks = len.get() / BLOCK;
    let spread = (0..=SPREAD).map(|part| {
        let place = u128::from(blocks.saturating_sub(1)) * u128::from(part) / u128::from(SPREAD);
        u64::try_from(place).unwrap_or(blocks)
    });
    let mut places: Vec<u64> = (0..FIRST).chain(spread).filter(|block| *block < blocks).collect();
    places.sort_unstable();
    places.dedup();
    places.into_iter().map(|block| Bytes::new(block.saturating_mul(BLOCK))).collect()
}

/// Whether a block of the device is for certain not that of the export. What cannot be read is not.
fn differs(device: &BlockDevice, client: &Client, at: Bytes) -> bool {
    let Ok(direct) = device::reopen_direct(&device.file) else { return false };
    let (mut ours, mut theirs) = (AlignedBuffer::new(), vec![0; BLOCK as usize]);
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            std::thread::sleep(PAUSE);
            // A write of the kernel may not be visible on our connection yet.
            if client.flush().is_err() {
                return false;
            }
        }
        let ours = ours.resize(BLOCK as usize);
        let read = read_full(&direct, ours, at).and_then(|_| client.read_at(&mut theirs, at));
        if read.is_err() || *ours == *theirs {
            return false;
        }
    }
    true
}

/// Adds the NBD devices of a stack, each once. A partition has the major number of its disk, which is a layer of its own.
fn collect(layer: &Layer, devices: &mut Vec<DeviceId>) {
    if let Some(id) = layer.device
        && id.major == MAJOR
        && sysfs::partition(id).is_ok_and(|partition| partition.is_none())
        && !devices.contains(&id)
    {
        devices.push(id);
    }
    layer.below.iter().for_each(|below| collect(below, devices));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_the_end_and_what_is_between_are_compared() {
        let blocks = |count: u64| -> Vec<u64> {
            places(Bytes::new(count * BLOCK + 512)).into_iter().map(|at| at.get() / BLOCK).collect()
        };
        assert_eq!(blocks(0), [0; 0]);
        assert_eq!(blocks(3), [0, 1, 2]);
        let many = blocks(1 << 40);
        assert_eq!(many[..17], (0..16).chain([((1 << 40) - 1) / 48]).collect::<Vec<_>>());
        assert_eq!(many.last(), Some(&((1 << 40) - 1)));
        assert!(many.len() <= 64);
        assert_eq!(places(Bytes::MAX).len(), many.len());
    }
}
