//! The export that a device of the kernel's NBD client is connected to, as named by the user.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::kernel_connection::KernelConnection;
use super::{Client, MAJOR, NbdExport, Uri};
use crate::error::{Error, Result};
use crate::reason::DenseReason;
use crate::source::{BlockDevice, Layer, Stack};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::device::{self, DeviceId};
use crate::sys::file::read_full;
use crate::sys::sysfs;
use crate::units::Bytes;

/// The number of bytes compared at each place.
const BLOCK: u64 = 4096;
/// The number of blocks compared at the start: partition tables and superblocks, which differ between most disks.
const FIRST: u64 = 16;
/// The number of blocks compared in the rest of the device, spread evenly up to the end.
const SPREAD: u64 = 48;
/// How often a block that differs is read: it may be written at that moment.
const ATTEMPTS: u32 = 4;
/// The time between two reads of a block that differs.
const PAUSE: Duration = Duration::from_millis(20);

/// An export, and the one device that is connected to it. Any other NBD device has other bytes, even with the same
/// size.
#[derive(Debug)]
pub struct SideExport {
    device: DeviceId,
    export: NbdExport,
    /// The device's connection, or why its end could not be noticed.
    connection: std::result::Result<Arc<KernelConnection>, DenseReason>,
}

impl SideExport {
    /// Takes `uri` as the export that an NBD device is connected to now: the one NBD device in `stack`. `name` is the name of
    /// the file in messages.
    ///
    /// # Errors
    /// When the stack has no NBD device or several, or when the bytes of the device are not those of the export.
    pub fn new(uri: Uri, stack: &Stack, name: &Path) -> Result<Self> {
        let mut devices = Vec::new();
        collect(&stack.top, &mut devices);
        let id = match devices.as_slice() {
            [id] => *id,
            [] => return Err(Self::unclear("has no device of the kernel's NBD client in its stack").on(name)),
            _ => return Err(Self::unclear("has several devices of the kernel's NBD client in its stack").on(name)),
        };
        let device =
            BlockDevice::open_id(id).map_err(|error| Error::failed("cannot open").on(id.to_string()).because(error))?;
        let connection = KernelConnection::new(&device).map(Arc::new);
        let side = Self { device: device.id, export: NbdExport::new(uri), connection };
        side.compare(&device)?;
        Ok(side)
    }

    /// The error for an option that does not name the export of exactly one device.
    pub fn unclear(why: &str) -> Error {
        Error::usage(format!("option 'nbd' names the export of one device, but the mounted source {why}"))
    }

    /// Starts a thread that notices the end of the connection.
    pub fn watch(&self) {
        if let Ok(connection) = &self.connection {
            connection.watch();
        }
    }

    /// The export, if it is that of `device`, and the connection that the device had at the mount.
    pub(super) fn of(
        &self,
        device: DeviceId,
    ) -> Option<(&NbdExport, std::result::Result<&Arc<KernelConnection>, &DenseReason>)> {
        let connection = self.connection.as_ref();
        (self.device == device).then_some((&self.export, connection))
    }

    /// Compares parts of the device with the export. A difference proves that the device is connected to another
    /// export; equal bytes prove nothing, since zeros equal zeros.
    fn compare(&self, device: &BlockDevice) -> Result<()> {
        // An export that cannot be queried has no holes; each resolve of the device reports the reason.
        let (Ok(connection), Ok(client)) = (&self.connection, self.export.client()) else { return Ok(()) };
        if client.size() != device.len || !client.is_visible_elsewhere() {
            return Ok(());
        }
        let differs = |at: &Bytes| differs(device, &client, *at);
        match places(device.len).into_iter().find(differs) {
            // After the end of the connection, the bytes may be those of another export.
            Some(at) if connection.lost().is_none() => Err(Error::failed(format!(
                "is not connected to the export {}: they differ at byte {at}",
                self.export.uri()
            ))
            .on(device.name())),
            _ => Ok(()),
        }
    }
}

/// The offsets at which a device of `len` bytes is compared.
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

/// Whether a block of the device certainly differs from that of the export. A block that cannot be read does not.
fn differs(device: &BlockDevice, client: &Client, at: Bytes) -> bool {
    let Ok(direct) = device::reopen_direct(&device.file) else { return false };
    let (mut device_bytes, mut export_bytes) = (AlignedBuffer::new(), vec![0; BLOCK as usize]);
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            std::thread::sleep(PAUSE);
            // A write of the kernel may not be visible on this connection yet.
            if client.flush().is_err() {
                return false;
            }
        }
        let device_bytes = device_bytes.resize(BLOCK as usize);
        let read = read_full(&direct, device_bytes, at).and_then(|_| client.read_at(&mut export_bytes, at));
        if read.is_err() || *device_bytes == *export_bytes {
            return false;
        }
    }
    true
}

/// Adds the NBD devices of a stack, each once. A partition has the major number of its disk, which is a layer of its
/// own.
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
    fn the_start_the_end_and_blocks_between_are_compared() {
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
