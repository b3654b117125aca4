//! What differs between a dm-snapshot and its origin, or between two snapshots of one origin.
//!
//! A chunk of a snapshot is read from its store if it has an exception there, and else from the origin. So a chunk in which
//! neither of two devices has an exception is the same bytes of the same device. A device without a store is the origin
//! itself: the device that the snapshot names, or a device `snapshot-origin` over it.
//!
//! The answer is that of the moment in which the first status was read. The exceptions of that moment are data, and perhaps
//! some later ones.

use std::io;
use std::ops::Range;
use std::thread;
use std::time::Duration;

use super::{Changes, Identity, IdentityValue};
use crate::error::{Error, Result};
use crate::map::{Block, ChangeMap, FillBuilder, FillMap};
use crate::reason::DenseReason;
use crate::source::dm;
use crate::source::dm::params::{self, SnapshotParams};
use crate::source::dm::snapshot::{Allocated, SnapshotStore};
use crate::source::{BlockDevice, Context, Stack};
use crate::sys::device::DeviceId;
use crate::sys::dm::{Commit, Control, Table};
use crate::sys::sysfs;
use crate::units::{Bytes, Sectors};

/// How often the devices are compared, when a table was replaced during each comparison.
const ATTEMPTS: usize = 20;
/// How often a store is read, when its list lacks an exception that was allocated: one that is being copied is listed soon.
const READS: usize = 200;
/// The time between two such reads.
const PAUSE: Duration = Duration::from_millis(20);

/// What changed in `newer` since `older`, if one of them is a dm-snapshot and the other one its origin or another snapshot of
/// that. `None` if neither is a dm-snapshot.
///
/// # Errors
/// When one of them is a dm-snapshot and the answer is not certain.
pub fn between(older: &BlockDevice, newer: &BlockDevice, context: &Context) -> Result<Option<Changes>> {
    let devices = [older, newer];
    let mapped = |device: &BlockDevice| {
        dm::is_mapped(device.id).map_err(|error| failed(device, "cannot find out what it is").because(error))
    };
    if !(mapped(older)? || mapped(newer)?) {
        return Ok(None);
    }
    let Some(control) = context.dm.control() else {
        return Err(failed(newer, "reading its table needs root and /dev/mapper/control"));
    };
    let mut last = None;
    for _ in 0..ATTEMPTS {
        let compared = Comparison { devices, control: &control, context }.run();
        match compared {
            Ok(changes) => return Ok(changes),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Retry(error)) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| failed(newer, "was not compared")))
}

/// The error of a device.
fn failed(device: &BlockDevice, why: impl Into<String>) -> Error {
    Error::failed(why).on(device.name())
}

/// Why there is no answer.
enum Failure {
    /// It may be certain at the next attempt.
    Retry(Error),
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// What one of the two devices is.
enum Side {
    /// A snapshot.
    Snapshot(SnapshotParams),
    /// The device `snapshot-origin` of that origin.
    Origin(DeviceId),
    /// Another device: it can only be the origin of the other one.
    Other(DeviceId),
}

impl Side {
    /// The device that is read where there is no exception.
    fn origin(&self) -> DeviceId {
        match self {
            Self::Snapshot(snapshot) => snapshot.origin,
            Self::Origin(id) | Self::Other(id) => *id,
        }
    }

    fn snapshot(&self) -> Option<&SnapshotParams> {
        match self {
            Self::Snapshot(snapshot) => Some(snapshot),
            _ => None,
        }
    }
}

/// A snapshot with its open store, and what was allocated there.
struct OpenSnapshot<'a> {
    device: &'a BlockDevice,
    store: SnapshotStore,
    allocated: Allocated,
}

/// One attempt to compare two devices: the older one and the newer one.
struct Comparison<'a> {
    devices: [&'a BlockDevice; 2],
    control: &'a Control,
    context: &'a Context,
}

impl<'a> Comparison<'a> {
    fn run(&self) -> std::result::Result<Option<Changes>, Failure> {
        let [older, newer] = self.devices;
        // Before the tables, so that the replacement of one of them is noticed.
        let events = self.control.events().map_err(|error| cannot(newer, "read the events of device-mapper", error))?;
        let tables = self.tables()?;
        let sides = [side(older, tables[0].as_ref())?, side(newer, tables[1].as_ref())?];
        if sides.iter().all(|side| side.snapshot().is_none()) {
            return Ok(None);
        }
        self.refuse_suspended(&tables)?;
        let origin = self.common_origin(&sides)?;
        self.refuse_merge(origin)?;
        self.write_back()?;
        let snapshots = self.open(&sides)?;
        let limit = self.same_until(origin)?;
        let block = snapshots.iter().map(|snapshot| snapshot.store.chunk_len()).min();
        let block = block.ok_or_else(|| failed(newer, "it is no snapshot"))?;
        let map = self.map(&snapshots, block, limit)?;
        for snapshot in &snapshots {
            snapshot
                .store
                .allocated(self.status(snapshot.device)?)
                .map_err(|reason| refused(snapshot.device, &reason))?;
        }
        let now = self.control.events().map_err(|error| cannot(newer, "read the events of device-mapper", error))?;
        if now != events || self.tables()? != tables {
            return Err(Failure::Retry(failed(newer, "tables of device-mapper are replaced all the time")));
        }
        // The origin has no guard against writes: the next one may add an exception.
        Ok(Some(Changes::new(self.identity(&snapshots, block), map, || false)))
    }

    /// The live tables of both devices; none for a device that is not one of device-mapper.
    fn tables(&self) -> Result<[Option<Table>; 2]> {
        let table = |device: &BlockDevice| match dm::is_mapped(device.id) {
            Ok(false) => Ok(None),
            Ok(true) => {
                self.control.table(device.id).map(Some).map_err(|error| cannot(device, "read its table", error))
            }
            Err(error) => Err(cannot(device, "find out what it is", error)),
        };
        Ok([table(self.devices[0])?, table(self.devices[1])?])
    }

    fn refuse_suspended(&self, tables: &[Option<Table>; 2]) -> Result<()> {
        let is_suspended = |table: &Option<Table>| table.as_ref().is_some_and(|table| table.suspended);
        match self.devices.into_iter().zip(tables).find(|(_, table)| is_suspended(table)) {
            Some((device, _)) => Err(failed(device, "it is suspended")),
            None => Ok(()),
        }
    }

    /// The origin of both devices.
    fn common_origin(&self, sides: &[Side; 2]) -> Result<DeviceId> {
        let [older, newer] = self.devices;
        if older.id == newer.id {
            return Err(failed(newer, "it is the same device as the older one"));
        }
        let [origin, other] = sides.each_ref().map(Side::origin);
        if origin != other {
            let why = format!(
                "it is not a snapshot of {0}, nor its origin, nor another snapshot of its origin",
                older.name()
            );
            return Err(failed(newer, why));
        }
        Ok(origin)
    }

    /// Refuses an origin into which a snapshot is merged: the merge writes it and takes exceptions away.
    fn refuse_merge(&self, origin: DeviceId) -> Result<()> {
        let newer = self.devices[1];
        let holders =
            sysfs::holders(origin).map_err(|error| cannot(newer, "find the devices over its origin", error))?;
        for holder in holders {
            let mapped =
                dm::is_mapped(holder).map_err(|error| cannot(newer, "find out what is over its origin", error))?;
            if !mapped {
                continue;
            }
            let table =
                self.control.table(holder).map_err(|error| cannot(newer, "read a table over its origin", error))?;
            if table.targets.iter().any(|target| target.kind == "snapshot-merge") {
                return Err(failed(newer, "a snapshot is being merged into the origin"));
            }
        }
        Ok(())
    }

    /// Writes back the dirty pages of both devices, so that the exceptions of these writes exist.
    fn write_back(&self) -> Result<()> {
        for device in self.devices {
            let stack = Stack::of_device(device, self.context);
            if stack.suspended() {
                return Err(failed(device, "it, its store or a device below is suspended"));
            }
            if !stack.write_back() {
                return Err(failed(device, "cannot write back its dirty pages"));
            }
        }
        Ok(())
    }

    /// Opens the stores of those devices that are snapshots, and reads their statuses.
    fn open(&self, sides: &[Side; 2]) -> Result<Vec<OpenSnapshot<'a>>> {
        let snapshots =
            self.devices.into_iter().zip(sides).filter_map(|(device, side)| Some((device, side.snapshot()?)));
        let open = |(device, snapshot): (&'a BlockDevice, &SnapshotParams)| {
            let store = SnapshotStore::open(snapshot).map_err(|reason| refused(device, &reason))?;
            let allocated = store.allocated(self.status(device)?).map_err(|reason| refused(device, &reason))?;
            Ok(OpenSnapshot { device, store, allocated })
        };
        snapshots.map(open).collect()
    }

    fn status(&self, device: &BlockDevice) -> Result<String> {
        let status =
            self.control.status(device.id, Commit::No).map_err(|error| cannot(device, "read its status", error))?;
        let first = status.targets.into_iter().next();
        first.map(|target| target.params).ok_or_else(|| failed(device, "it has no status"))
    }

    /// The end of what all devices have: beyond it, nothing is unchanged.
    fn same_until(&self, origin: DeviceId) -> Result<Bytes> {
        let [older, newer] = self.devices;
        let len = sysfs::len(origin).ok_or_else(|| failed(newer, "the size of its origin is not known"))?;
        Ok(older.len.min(newer.len).min(len))
    }

    /// The chunks with an exception, and what lies beyond `limit`, as data in blocks of `block`.
    fn map(&self, snapshots: &[OpenSnapshot<'_>], block: Bytes, limit: Bytes) -> Result<ChangeMap> {
        let newer = self.devices[1];
        let builder = FillBuilder::new(newer.len, block);
        let mut filler = builder.filler();
        if limit < newer.len {
            filler.set_range(Block::new(limit.get() / block.get())..Block::new(u64::MAX));
        }
        for snapshot in snapshots {
            // Both are powers of two.
            let blocks = snapshot.store.chunk_len().get() / block.get();
            list(snapshot, |chunk| filler.set_range(scaled(chunk, blocks)))?;
        }
        drop(filler);
        let too_many = || failed(newer, "it has more exceptions than fit into memory");
        let changed = builder.finish().ok_or_else(too_many)?;
        let cleared: FillMap = FillBuilder::new(newer.len, block).finish().ok_or_else(too_many)?;
        let map = ChangeMap::new(changed, cleared);
        map.ok_or_else(|| failed(newer, "the maps of the changes have different lengths"))
    }

    fn identity(&self, snapshots: &[OpenSnapshot<'_>], block: Bytes) -> Identity {
        let [older, newer] = self.devices;
        let uuid = |device: &BlockDevice| match sysfs::attribute(device.id, "dm/uuid") {
            Some(uuid) if !uuid.is_empty() => IdentityValue::Text(uuid),
            _ => IdentityValue::None,
        };
        let exceptions = snapshots.iter().map(|snapshot| snapshot.allocated.count).fold(0, u64::saturating_add);
        let fields = vec![
            ("older-uuid", uuid(older)),
            ("newer-uuid", uuid(newer)),
            ("exceptions", IdentityValue::Number(exceptions)),
            ("older-size", IdentityValue::Number(older.len.get())),
            ("newer-size", IdentityValue::Number(newer.len.get())),
            ("chunk-size", IdentityValue::Number(block.get())),
        ];
        Identity { kind: "dm-snapshot", fields }
    }
}

/// Calls `each` for the chunks with an exception, until all that were allocated are in the list.
fn list(snapshot: &OpenSnapshot<'_>, mut each: impl FnMut(Block)) -> Result<()> {
    let mut listed = snapshot.store.exceptions(snapshot.allocated, &mut each);
    for _ in 1..READS {
        if listed.is_ok() {
            break;
        }
        thread::sleep(PAUSE);
        listed = snapshot.store.exceptions(snapshot.allocated, &mut each);
    }
    listed.map_err(|reason| failed(snapshot.device, reason))
}

/// The blocks of a chunk that has as many as `blocks`.
fn scaled(chunk: Block, blocks: u64) -> Range<Block> {
    let at = |chunk: u64| Block::new(chunk.saturating_mul(blocks));
    at(chunk.get())..at(chunk.get().saturating_add(1))
}

/// What a device with that table is.
fn side(device: &BlockDevice, table: Option<&Table>) -> Result<Side> {
    let Some([target]) = table.map(|table| table.targets.as_slice()) else { return Ok(Side::Other(device.id)) };
    let not_understood = || failed(device, format!("its arguments are not understood: {}", target.params));
    let side = match target.kind.as_str() {
        "snapshot" => Side::Snapshot(params::snapshot(&target.params).ok_or_else(not_understood)?),
        "snapshot-origin" => Side::Origin(params::snapshot_origin(&target.params).ok_or_else(not_understood)?),
        "snapshot-merge" => return Err(failed(device, "a snapshot is being merged into it")),
        _ => return Ok(Side::Other(device.id)),
    };
    let is_whole = target.start == Sectors::new(0) && target.len.bytes() == Some(device.len);
    if is_whole { Ok(side) } else { Err(failed(device, "its table does not cover it")) }
}

fn cannot(device: &BlockDevice, what: &str, error: io::Error) -> Error {
    failed(device, format!("cannot {what}")).because(error)
}

fn refused(device: &BlockDevice, reason: &DenseReason) -> Error {
    failed(device, reason.to_string())
}
