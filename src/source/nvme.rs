//! NVMe namespaces: all data. They are not SCSI devices and have no GET LBA STATUS of SCSI.

use crate::source::{BlockDevice, Layer, dense};
use crate::sys::device::DeviceId;
use crate::sys::sysfs;

/// Whether a device is a whole NVMe namespace or a partition of one.
pub fn is_nvme(id: DeviceId) -> bool {
    sysfs::kernel_name(id).is_some_and(|name| name.starts_with("nvme"))
}

/// The layer of an NVMe namespace.
pub fn layer(device: &BlockDevice) -> Layer {
    let reason = "NVMe disks are not queried for holes: it takes Get LBA Status with action type 02h (tracked allocated \
                  LBAs), which few of them have, and a namespace that reports zeros for deallocated blocks (DLFEAT 001b)";
    dense::layer(device.name(), "NVMe disk", device.len, reason)
}
