//! NVMe namespaces: all data. They are not SCSI devices and have no GET LBA STATUS of SCSI.

use std::io;

use crate::source::{BlockDevice, Layer, Resolver, dense};
use crate::sys::device::DeviceId;
use crate::sys::sysfs;

/// Whether a device is an NVMe namespace or a partition of one.
///
/// # Errors
/// None: the name of the device decides.
pub fn is_namespace(id: DeviceId) -> io::Result<bool> {
    Ok(sysfs::kernel_name(id).is_some_and(|name| name.starts_with("nvme")))
}

/// The layer of an NVMe namespace.
pub fn layer(device: &BlockDevice, _resolver: &mut Resolver<'_>) -> Layer {
    let reason = "NVMe disks are not queried for holes: it takes Get LBA Status with action type 02h (tracked allocated \
                  LBAs), which few of them have, and a namespace that reports zeros for deallocated blocks (DLFEAT 001b)";
    dense::layer(device.name(), "NVMe disk", device.len, reason)
}
