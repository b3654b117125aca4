//! Compares two active thin devices.
//!
//! Both devices are guarded as they are for their holes: the counters of writes and discards, the tables, and whether
//! another device is the same volume. The guards are made before the pool is asked and find the same afterwards. So the
//! transaction that was read has all writes to both devices, and no write came after it.

use std::io;
use std::sync::Arc;

use super::super::params::{self, ThinTable};
use super::super::pool::{LivePool, WantedChanges};
use super::super::record::PoolIdentity;
use super::super::shared_reads::Wanted;
use super::super::volume::mapped;
use super::DeviceChanges;
use crate::error::{Error, Result};
use crate::reason::DenseReason;
use crate::source::changes::{ACTIVATE, Changes};
use crate::source::{BlockDevice, Context, Stack};
use crate::sys::device::DeviceId;
use crate::sys::dm::Control;
use crate::units::Sectors;

/// How often both devices are looked at again, because one of them was written, before that is an error.
const TRIES: usize = 5;

/// What changed from `older` to `newer`.
///
/// # Errors
/// When one of them is not an active thin device, both are not volumes of one pool, or are one volume. When the pool
/// cannot be read: see [`LivePool::map`]. When one of them is written all the time.
pub fn between(older: &BlockDevice, newer: &BlockDevice, context: &Context) -> Result<Changes> {
    let control = context.dm.control().ok_or_else(|| {
        Error::failed("cannot be compared: reading its table needs root and /dev/mapper/control").on(&newer.path)
    })?;
    for _ in 0..TRIES {
        let (older, newer) = (Side::new(older, &control, context)?, Side::new(newer, &control, context)?);
        check_pair(&older, &newer)?;
        if !(older.write_back()? & newer.write_back()?) {
            continue;
        }
        let over_origin = older.table.origin.is_some() || newer.table.origin.is_some();
        let wanted = WantedChanges { older: older.wanted, newer: newer.wanted, over_origin };
        let pool = LivePool::new(control.clone(), newer.table.pool, context);
        let changes = pool.changes(&wanted);
        if older.stack.unchanged() && newer.stack.unchanged() {
            let changes = changes.map_err(|reason| newer.refused(reason))?;
            return finished(changes, older, newer);
        }
    }
    let hint = "compare snapshots that nobody writes to";
    Err(Error::failed("cannot be compared: it changes faster than its pool can be read").on(&newer.path).hint(hint))
}

/// Whether both are active thin devices of one pool.
pub fn are_of_one_pool(older: DeviceId, newer: DeviceId, context: &Context) -> bool {
    let pool = |id| {
        let table = context.dm.control()?.table(id).ok()?;
        match &table.targets[..] {
            [target] if target.kind == "thin" => params::thin_table(&target.params).map(|table| table.pool),
            _ => None,
        }
    };
    pool(older).is_some_and(|older| pool(newer) == Some(older))
}

fn finished(changes: DeviceChanges, older: Side<'_>, newer: Side<'_>) -> Result<Changes> {
    let pool = PoolIdentity::of(newer.table.pool);
    let pool = pool.map_err(|error| newer.refused(DenseReason::cannot("read its pool's uuid", &error)))?;
    let identity = changes.identity(Some(pool.uuid).filter(|uuid| !uuid.is_empty()));
    let (older, newer) = (older.stack, newer.stack);
    Ok(Changes::new(identity, changes.map, move || older.unchanged() && newer.unchanged()))
}

/// Checks that both are different volumes of one pool.
fn check_pair(older: &Side<'_>, newer: &Side<'_>) -> Result<()> {
    let refused = |what: &str| Err(newer.error().because(format!("{what} {}", older.device.name())));
    if older.table.pool != newer.table.pool {
        return refused("it is a volume of another pool than");
    }
    if older.table.id == newer.table.id {
        return refused("it is the same volume as");
    }
    Ok(())
}

/// One of the two devices, with its guards.
struct Side<'a> {
    device: &'a BlockDevice,
    stack: Stack,
    table: ThinTable,
    wanted: Wanted,
}

impl<'a> Side<'a> {
    fn new(device: &'a BlockDevice, control: &Arc<Control>, context: &Context) -> Result<Self> {
        // The guards are made before anything is read of the device.
        let stack = Stack::of_device(device, context);
        let refused = |reason: DenseReason| refused(device, reason);
        let failed = |error: &io::Error| refused(DenseReason::cannot("read its table", error));
        let live = control.table(device.id).map_err(|error| match error.raw_os_error() {
            Some(libc::ENXIO) => refused("it is not a thin volume".into()),
            _ => failed(&error),
        })?;
        if live.suspended {
            return Err(refused(DenseReason::State("it is suspended".into())));
        }
        let target = match &live.targets[..] {
            [target] if target.kind == "thin" => target,
            [] => return Err(refused("it has no live table".into()).hint(ACTIVATE)),
            _ => return Err(refused("it is not a thin volume".into())),
        };
        let table = params::thin_table(&target.params).ok_or_else(|| {
            refused(DenseReason::NotUnderstood { what: "its arguments are".into(), text: target.params.clone() })
        })?;
        // The stack has no mapping tree if the guards of the volume cannot be used, or it is active as another device
        // too.
        if stack.stored.is_empty() {
            let reason = stack.top.map.dense_because();
            return Err(refused(reason.unwrap_or_else(|| "its mapping tree is not used".into())));
        }
        let mapped = mapped(control, device.id, Sectors::new(0)).map_err(refused)?;
        let wanted = Wanted { id: table.id, len: stack.len(), mapped: mapped.sectors };
        Ok(Self { device, stack, table, wanted })
    }

    /// Writes back dirty pages. Returns whether the guards still hold.
    fn write_back(&self) -> Result<bool> {
        if self.stack.suspended() {
            return Err(self.refused(DenseReason::State("it, or a device below it, is suspended".into())));
        }
        if !self.stack.write_back() {
            return Err(self.refused("its dirty pages cannot be written back".into()));
        }
        Ok(self.stack.unchanged())
    }

    fn error(&self) -> Error {
        Error::failed("cannot be compared").on(&self.device.path)
    }

    fn refused(&self, reason: DenseReason) -> Error {
        refused(self.device, reason)
    }
}

fn refused(device: &BlockDevice, reason: DenseReason) -> Error {
    Error::failed("cannot be compared").on(&device.path).because(reason.to_string())
}
