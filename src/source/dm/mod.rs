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
mod guard;
pub mod params;
mod passing;
pub(super) mod segment;
mod snapshot;
mod targets;

use std::sync::{Arc, Mutex, PoisonError};

use log::debug;

use self::guard::{NoTable, TableGuard};
use crate::error::{plain, shown};
use crate::map::Concat;
use crate::source::device::BlockDevice;
use crate::source::{Layer, Resolver, dense, thin};
use crate::sys::dm::{Control, Events, TableTarget};
use crate::sys::sysfs;
use crate::units::Sectors;

/// What all device-mapper sources share: the control device, opened at the first need.
#[derive(Default)]
pub struct Shared {
    control: Mutex<Option<Arc<Control>>>,
}

impl Shared {
    /// The control device, or `None` where it cannot be opened now: the next call tries again.
    pub fn control(&self) -> Option<Arc<Control>> {
        let mut shared = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.is_none() {
            let control = Control::open().inspect_err(|error| debug!("/dev/mapper/control: {}", plain(error))).ok()?;
            // The first chance to release what an earlier process left held.
            thin::held::recover();
            *shared = Some(Arc::new(control));
        }
        shared.clone()
    }
}

/// The layer of a device-mapper device.
pub fn layer(device: &BlockDevice, resolver: &mut Resolver<'_>) -> Layer {
    let name = sysfs::mapper_name(device.id).map_or_else(|| device.name(), |name| shown(&name).to_string());
    let dense = |reason: String| dense::layer(&name, "device-mapper", device.len, reason);
    let Some(control) = resolver.context.dm.control() else {
        resolver.guard(NoTable { control: None, id: device.id });
        return dense("reading its table needs root and /dev/mapper/control".to_owned());
    };
    // The events before the table: a table that replaces it from here on is seen.
    let (events, table) = match control.events().and_then(|events| Ok((events, control.table(device.id)?))) {
        Ok(both) => both,
        Err(error) => {
            resolver.guard(NoTable { control: Some(control), id: device.id });
            return dense(format!("cannot read its table: {}", plain(&error)));
        }
    };
    resolver.guard(TableGuard::new(control, device.id, events, table.clone()));
    if table.suspended {
        return dense("it is suspended".to_owned());
    }
    if !covers(&table.targets, device) {
        return dense("its table does not cover it without gaps".to_owned());
    }
    segments(&name, device, events, &table.targets, resolver)
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
fn segments(
    name: &str,
    device: &BlockDevice,
    events: Events,
    targets: &[TableTarget],
    resolver: &mut Resolver<'_>,
) -> Layer {
    let layer = |target, resolver: &mut Resolver<'_>| targets::layer(name, device, events, target, resolver);
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
            device: None,
            below,
        },
        None => dense::layer(name, "device-mapper", device.len, "its table is longer than a device can be"),
    }
}
