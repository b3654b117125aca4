//! Device-mapper: a device is the targets of its live table, one after the other.
//!
//! | target | holes |
//! |---|---|
//! | linear, striped, unstriped | those of the devices it maps to |
//! | delay | those of the device that it reads from |
//! | flakey | those of its device, if it is up all the time and has no features |
//! | snapshot-origin, era | those of the origin |
//! | multipath | those of one path that works |
//! | mirror, raid (raid1) | where all legs have one, if all are alive, in sync and idle |
//! | clone | those of the destination when all is copied; before, where source and destination both have one |
//! | snapshot (store P or PO) | those of the origin, where the store has no exception |
//! | zero | all of it: it reads as zeros, and drops what is written |
//! | thin | unmapped blocks, see [`thin`] |
//! | snapshot (store N) | none: its exceptions are in the kernel's memory only |
//! | crypt, integrity, verity | none: zeros below are not zeros above |
//! | cache, writecache, vdo | none: what is below is not what is read |
//! | raid (other levels), error, and every other target | none |
//!
//! A suspended device is dense: nothing that could wait for its resume is asked.

mod copies;
pub mod exceptions;
pub mod params;
mod passing;
pub(super) mod segment;
mod snapshot;
mod targets;

use std::hash::{Hash, Hasher};
use std::sync::{Arc, OnceLock};

use log::debug;

use crate::error::plain;
use crate::map::Concat;
use crate::source::device::BlockDevice;
use crate::source::{Guard, Layer, Resolver, dense, thin};
use crate::sys::device::DeviceId;
use crate::sys::dm::{Control, Table, TableTarget};
use crate::sys::sysfs;
use crate::units::Sectors;

/// What all device-mapper sources share: the control device, opened at the first need.
#[derive(Default)]
pub struct Shared {
    control: OnceLock<Option<Arc<Control>>>,
}

impl Shared {
    /// The control device, or `None` where it cannot be opened.
    pub fn control(&self) -> Option<Arc<Control>> {
        let open = || Control::open().inspect_err(|error| debug!("/dev/mapper/control: {}", plain(error))).ok();
        // The first chance to release what an earlier process left held.
        let open = || open().inspect(|_| thin::held::recover()).map(Arc::new);
        self.control.get_or_init(open).clone()
    }
}

/// The live table of a device, and whether it is suspended: a change of either makes another stack.
struct TableGuard {
    control: Arc<Control>,
    id: DeviceId,
    seen: Table,
}

impl Guard for TableGuard {
    fn unchanged(&self) -> bool {
        self.control.table(self.id).is_ok_and(|table| table == self.seen)
    }

    fn trace(&self, mut trace: &mut dyn Hasher) {
        self.seen.hash(&mut trace);
    }
}

/// The layer of a device-mapper device.
pub fn layer(device: &BlockDevice, resolver: &mut Resolver<'_>) -> Layer {
    let name = sysfs::dm_name(device.id).unwrap_or_else(|| device.name());
    let dense = |reason: String| dense::layer(&name, "device-mapper", device.len, reason);
    let Some(control) = resolver.context.dm.control() else {
        return dense("reading its table needs root and /dev/mapper/control".to_owned());
    };
    let table = match control.table(device.id) {
        Ok(table) => table,
        Err(error) => return dense(format!("cannot read its table: {}", plain(&error))),
    };
    resolver.guard(TableGuard { control, id: device.id, seen: table.clone() });
    if table.suspended {
        return dense("it is suspended".to_owned());
    }
    if !covers(&table.targets, device) {
        return dense("its table does not cover it without gaps".to_owned());
    }
    segments(&name, device, &table.targets, resolver)
}

/// Whether the targets follow each other from the start of the device to its end.
fn covers(targets: &[TableTarget], device: &BlockDevice) -> bool {
    let end = targets.iter().try_fold(Sectors::new(0), |at, target| {
        let end = at.get().checked_add(target.len.get())?;
        (target.start == at && target.len.get() > 0).then_some(Sectors::new(end))
    });
    end.and_then(Sectors::bytes) == Some(device.len)
}

/// The layer of a table: of its one target, or of several in a row.
fn segments(name: &str, device: &BlockDevice, targets: &[TableTarget], resolver: &mut Resolver<'_>) -> Layer {
    let layer = |target, resolver: &mut Resolver<'_>| targets::layer(name, device, target, resolver);
    if let [target] = targets {
        return layer(target, resolver);
    }
    let below: Vec<_> = targets.iter().map(|target| Arc::new(layer(target, resolver))).collect();
    match Concat::new(below.iter().map(|layer| layer.map.clone()).collect()) {
        Some(map) => Layer {
            name: name.to_owned(),
            kind: "device-mapper".to_owned(),
            holes_from: "the targets of its table".to_owned(),
            map: Arc::new(map),
            below,
        },
        None => dense::layer(name, "device-mapper", device.len, "its table is longer than a device can be"),
    }
}
