//! Device-mapper devices: the targets of the live table, one after the other.
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
//! | thin | unmapped blocks, see [`super::thin`] |
//! | snapshot (store N) | none: its exceptions are in the kernel's memory only |
//! | crypt, integrity, verity | none: zeros of the lower device are not read as zeros |
//! | cache, writecache, vdo | none: the bytes of the lower device are not always the bytes that are read |
//! | raid (other levels), error, and every other target | none |
//!
//! A suspended device is dense. Nothing is read from it or from its lower devices, because that could wait for its
//! resume.

mod copies;
pub mod exceptions;
mod guard;
mod lower;
pub mod params;
mod passing;
pub(super) mod snapshot;
mod targets;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use log::debug;

use self::guard::{NoTable, TableGuard};
use crate::error::{plain, shown};
use crate::map::Concat;
use crate::reason::DenseReason;
use crate::source::device::BlockDevice;
use crate::source::target::TargetContext;
use crate::source::{Layer, Resolver, dense};
use crate::sys::device::DeviceId;
use crate::sys::dm::{Control, Events, TableTarget};
use crate::sys::sysfs;
use crate::units::Sectors;

/// The kind of a device whose table has more than one target, or cannot be used.
const KIND: &str = "device-mapper";

/// The control device that all device-mapper layers share. It is opened when it is first needed.
#[derive(Default)]
pub struct SharedControl {
    control: Mutex<Option<Arc<Control>>>,
}

impl SharedControl {
    /// The control device, or `None` when it cannot be opened now. The next call tries again.
    pub fn control(&self) -> Option<Arc<Control>> {
        let mut shared = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.is_none() {
            let control = Control::open().inspect_err(|error| debug!("/dev/mapper/control: {}", plain(error))).ok()?;
            *shared = Some(Arc::new(control));
        }
        shared.clone()
    }
}

/// Whether a device is a device-mapper device.
///
/// # Errors
/// When sysfs cannot be read.
pub fn is_mapped(id: DeviceId) -> io::Result<bool> {
    Ok(sysfs::bytes(id, "dm/name")?.is_some())
}

/// The layer of a device-mapper device.
pub fn layer(device: &BlockDevice, resolver: &mut Resolver<'_>) -> Layer {
    let name = sysfs::mapper_name(device.id).map_or_else(|| device.name(), |name| shown(&name).to_string());
    let dense = |reason: DenseReason| dense::layer(&name, KIND, device.len, reason);
    let Some(control) = resolver.context.dm.control() else {
        resolver.guard(NoTable { control: None, id: device.id });
        return dense("reading its table needs root and /dev/mapper/control".into());
    };
    // The event counter is read before the table, so that a later replacement of the table is noticed.
    let (events, table) = match control.events().and_then(|events| Ok((events, control.table(device.id)?))) {
        Ok(both) => both,
        Err(error) => {
            resolver.guard(NoTable { control: Some(control), id: device.id });
            return dense(DenseReason::cannot("read its table", &error));
        }
    };
    let is_lvm = resolver.is_below_lvm();
    resolver.guard(TableGuard::new(control.clone(), device.id, (events, table.clone()), is_lvm));
    if table.suspended {
        return dense(DenseReason::State("it is suspended".into()));
    }
    if !covers(&table.targets, device) {
        return dense("its table does not cover it without gaps".into());
    }
    table_layer(&name, device, (control, events), &table.targets, resolver)
}

/// Whether the targets follow each other from the start of the device to its end.
fn covers(targets: &[TableTarget], device: &BlockDevice) -> bool {
    let end = targets.iter().try_fold(Sectors::new(0), |at, target| {
        let end = at.get().checked_add(target.len.get())?;
        (target.start == at && target.len.get() > 0).then_some(Sectors::new(end))
    });
    end.and_then(Sectors::bytes) == Some(device.len)
}

/// The layer of a table: of its only target, or of several targets one after the other.
fn table_layer(
    name: &str,
    device: &BlockDevice,
    (control, events): (Arc<Control>, Events),
    targets: &[TableTarget],
    resolver: &mut Resolver<'_>,
) -> Layer {
    let mut layers = Vec::new();
    for target in targets {
        let Some(len) = target.len.bytes() else {
            return dense::layer(name, format!("dm-{}", target.kind), device.len, "its length is out of range");
        };
        let context = TargetContext { control: control.clone(), device, events, target, len };
        layers.push(targets::layer(name, &context, resolver));
    }
    if let [_] = layers[..] {
        return layers.remove(0);
    }
    let below: Vec<_> = layers.into_iter().map(Arc::new).collect();
    match Concat::new(below.iter().map(|layer| layer.map.clone()).collect()) {
        Some(map) => Layer {
            name: name.to_owned(),
            kind: KIND.to_owned(),
            holes_from: "the targets of its table".to_owned(),
            map: Arc::new(map),
            device: None,
            below,
        },
        None => dense::layer(name, KIND, device.len, "its table is longer than a device can be"),
    }
}
