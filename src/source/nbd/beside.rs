//! The export that a device of the kernel's NBD client is connected to, as the user says.

use std::path::Path;

use super::{DEVICE_KIND, Export, Uri};
use crate::error::{Error, Result};
use crate::source::{Backing, BlockDevice, Context, Layer};
use crate::sys::device::DeviceId;

/// An export, and the one device that it is of. Any other NBD device has other bytes, whatever its size.
#[derive(Debug)]
pub struct Beside {
    device: DeviceId,
    export: Export,
}

impl Beside {
    /// Takes `uri` for the export of the NBD device that `shown` is or stands on.
    ///
    /// # Errors
    /// When it stands on none, or on several: nobody could tell which one is meant.
    pub fn new(uri: Uri, shown: &Backing) -> Result<Self> {
        let stack = shown.resolve(&Context::default());
        let mut nodes = Vec::new();
        collect(&stack.top, &mut nodes);
        match nodes.as_slice() {
            [node] => Ok(Self::of(BlockDevice::open(Path::new(node))?.id, uri)),
            [] => Err(Self::unclear("does not stand on a device of the kernel's NBD client").on(shown.name())),
            _ => Err(Self::unclear("stands on several devices of the kernel's NBD client").on(shown.name())),
        }
    }

    /// Takes `uri` for the export of `device`.
    pub fn of(device: DeviceId, uri: Uri) -> Self {
        Self { device, export: Export::new(uri) }
    }

    /// The error of an option that says nothing clear.
    pub fn unclear(why: &str) -> Error {
        Error::usage(format!("option 'nbd' names the export of one device: what is shown {why}"))
    }

    /// The export, if it is that of `device`.
    pub(super) fn export_of(&self, device: DeviceId) -> Option<&Export> {
        (self.device == device).then_some(&self.export)
    }
}

/// The nodes of all NBD devices in a stack, each once.
fn collect(layer: &Layer, nodes: &mut Vec<String>) {
    if layer.kind == DEVICE_KIND && !nodes.contains(&layer.name) {
        nodes.push(layer.name.clone());
    }
    layer.below.iter().for_each(|below| collect(below, nodes));
}
