//! A partition: a window on its disk.
//!
//! Its start cannot change while it is open (the kernel only resizes a partition in use), and its length has the guard
//! that every block device has.

use std::io;
use std::sync::Arc;

use crate::reason::DenseReason;
use crate::source::below::PastPartitions;
use crate::source::device::BlockDevice;
use crate::source::{Layer, Resolver, dense};
use crate::sys::device::DeviceId;
use crate::sys::sysfs;
use crate::units::Sectors;

/// Whether a device is a partition.
///
/// # Errors
/// When sysfs cannot be read.
pub fn is_partition(id: DeviceId) -> io::Result<bool> {
    sysfs::partition(id).map(|partition| partition.is_some())
}

/// The layer of a partition.
pub fn layer(device: &BlockDevice, resolver: &mut Resolver<'_>) -> Layer {
    match sysfs::partition(device.id) {
        Ok(Some((disk, start))) => window(device, disk, start, resolver),
        Ok(None) => dense::layer(device.name(), "partition", device.len, "sysfs does not show its disk"),
        Err(error) => {
            let reason = DenseReason::cannot("read its start from sysfs", &error);
            dense::layer(device.name(), "partition", device.len, reason)
        }
    }
}

/// The layer of a partition of `disk` that begins at `start`.
fn window(device: &BlockDevice, disk: DeviceId, start: Sectors, resolver: &mut Resolver<'_>) -> Layer {
    let Some((below, clip)) = resolver.window(disk, start, device.len) else {
        return dense::layer(device.name(), "partition", device.len, "its start is out of range");
    };
    if !resolver.is_below_lvm() {
        resolver.guard(PastPartitions { disk });
    }
    Layer {
        name: device.name(),
        kind: "partition".to_owned(),
        holes_from: "its disk".to_owned(),
        map: Arc::new(clip),
        device: None,
        below: vec![below],
    }
}
