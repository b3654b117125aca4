//! The kinds of block devices that have a source of extents. A new kind is one file, and one line here.

use std::io;

use crate::source::device::BlockDevice;
use crate::source::{Layer, Resolver, dm, loop_device, md, nbd, nvme, partition, scsi};
use crate::sys::device::DeviceId;

/// The source of one kind of block device.
pub(super) struct Source {
    /// Whether a device is of this kind, as sysfs shows it. An attribute that cannot be read is an error, and not `false`: a
    /// device that is taken for one of another kind gets the holes of other bytes.
    pub recognizes: fn(DeviceId) -> io::Result<bool>,
    /// The layer of such a device.
    pub layer: fn(&BlockDevice, &mut Resolver<'_>) -> Layer,
    /// Who guards which medium or backing file is in the device.
    pub medium: Medium,
}

/// Who guards which medium or backing file is in a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    /// The resolver does, by the disk sequence number.
    Resolver,
    /// The source does, by something better.
    Source,
}

/// All kinds. The first one that recognizes a device is its source: a partition has the major number of its disk.
pub(super) const SOURCES: [Source; 7] = [
    Source { recognizes: partition::is_partition, layer: partition::layer, medium: Medium::Resolver },
    Source { recognizes: loop_device::is_loop, layer: loop_device::layer, medium: Medium::Source },
    Source { recognizes: nbd::is_device, layer: nbd::device_layer, medium: Medium::Resolver },
    Source { recognizes: dm::is_mapped, layer: dm::layer, medium: Medium::Resolver },
    Source { recognizes: md::is_array, layer: md::layer, medium: Medium::Resolver },
    Source { recognizes: scsi::is_disk, layer: scsi::disk_layer, medium: Medium::Resolver },
    Source { recognizes: nvme::is_namespace, layer: nvme::layer, medium: Medium::Resolver },
];
