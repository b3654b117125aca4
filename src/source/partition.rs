//! A partition: a window on its disk.
//!
//! Its start cannot change while it is open (the kernel only resizes a partition in use), and its length has the guard
//! that every block device has.

use std::sync::Arc;

use crate::map::Clip;
use crate::source::device::BlockDevice;
use crate::source::{Layer, Resolver, dense};
use crate::sys::device::DeviceId;
use crate::units::Sectors;

/// The layer of a partition of `disk` that begins at `start`.
pub fn layer(device: &BlockDevice, disk: DeviceId, start: Sectors, resolver: &mut Resolver<'_>) -> Layer {
    let Some((start, end)) = start.bytes().and_then(|start| Some((start, start.checked_add(device.len)?))) else {
        return dense::layer(device.name(), "partition", device.len, "its start is out of range");
    };
    let below = resolver.device(disk, end);
    Layer {
        name: device.name(),
        kind: "partition".to_owned(),
        holes_from: "its disk".to_owned(),
        map: Arc::new(Clip { inner: below.map.clone(), start, len: device.len }),
        device: None,
        below: vec![below],
    }
}
