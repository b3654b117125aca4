//! Guards on live tables and their targets.
//!
//! The text of a table can be the same although the table was replaced and restored since. For a target that only
//! passes requests on to lower devices, this makes no difference: those devices are open, so that their numbers are not
//! used again, and each of them has guards of its own. [`TableGuard`] is enough for it. A target with metadata of its
//! own (thin, snapshot, clone) may be restored with other metadata: it needs a [`TableReloadGuard`] too.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::reason::DenseReason;
use crate::source::{Guard, Reach, Trace, below};
use crate::sys::device::DeviceId;
use crate::sys::dm::{Commit, Control, Events, Table};
use crate::sys::sysfs::{self, Activity};
use crate::units::Sectors;

/// Guards the text of the live table of a device, and whether the device is suspended.
pub struct TableGuard {
    control: Arc<Control>,
    id: DeviceId,
    seen: Table,
    /// The event counter before the table was last seen to be `seen`.
    events: Mutex<Events>,
    /// Whether it is a device of LVM, or below one.
    is_below_lvm: bool,
}

impl TableGuard {
    /// Guards the table `seen`, which was read after `events`.
    pub fn new(control: Arc<Control>, id: DeviceId, (events, seen): (Events, Table), is_below_lvm: bool) -> Self {
        Self { control, id, seen, events: Mutex::new(events), is_below_lvm }
    }

    /// The write counters of the devices that it maps to.
    fn writes_below(&self) -> io::Result<Vec<(DeviceId, Activity)>> {
        sysfs::slaves(self.id)?.into_iter().map(|id| Ok((id, below::activity(id)?))).collect()
    }
}

impl Guard for TableGuard {
    fn unchanged(&self) -> bool {
        let Ok(now) = self.control.events() else { return false };
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        // A resume raises no event. (No guard has to notice a suspension: each use of a map checks for one before.)
        if now == *events && !self.seen.suspended {
            return true;
        }
        // The event counter is read before the table here too.
        let same = self.control.table(self.id).is_ok_and(|table| table == self.seen);
        if same {
            *events = now;
        }
        same
    }

    /// A table whose text does not say what the device reads proves something together with the events within this process.
    /// Another process cannot know of a table that was replaced and restored, except for a device of LVM: that is given
    /// another table only with another text, or as a new device.
    ///
    /// Writes to the devices below that did not go through this one are counted there. Those below devices of LVM are not
    /// looked at: they are written for other volumes too.
    fn trace(&self, trace: &mut Trace) {
        trace.add(&self.seen);
        if self.seen.targets.iter().all(|target| PLACED.contains(&target.kind.as_str())) {
            if !self.is_below_lvm {
                trace.add_or_nothing(self.writes_below());
            }
            return;
        }
        if below::is_of_lvm(self.id) {
            trace.add_or_nothing(tables_below(&self.control, self.id));
        } else {
            match self.control.events() {
                Ok(events) => trace.add_of_process(&events),
                Err(_) => trace.limit(Reach::Nothing),
            }
        }
    }
}

/// The targets of which each byte is at a place that their arguments name, or the result of one that is. All others have
/// metadata of their own, which they find when their table is loaded.
const PLACED: [&str; 14] = [
    "linear",
    "striped",
    "unstriped",
    "zero",
    "error",
    "delay",
    "flakey",
    "snapshot-origin",
    "era",
    "multipath",
    "mirror",
    "raid",
    "crypt",
    "verity",
];

/// The targets of all device-mapper devices below a device: the kind and the arguments of each. Their lengths are left out,
/// because a pool may grow.
fn tables_below(control: &Control, id: DeviceId) -> io::Result<Vec<(DeviceId, String, String)>> {
    let mut targets = Vec::new();
    for below in sysfs::incarnations(id)?.into_keys().filter(|below| *below != id) {
        if sysfs::bytes(below, "dm/name")?.is_some() {
            let table = control.table(below)?;
            targets.extend(table.targets.into_iter().map(|target| (below, target.kind, target.params)));
        }
    }
    Ok(targets)
}

/// Guards against any reload of a table, even to the same text.
pub struct TableReloadGuard {
    control: Arc<Control>,
    events: Events,
}

impl TableReloadGuard {
    /// Guards the tables that all devices had when the event counter was `events`.
    pub fn new(control: Arc<Control>, events: Events) -> Self {
        Self { control, events }
    }
}

impl Guard for TableReloadGuard {
    fn unchanged(&self) -> bool {
        self.control.events().is_ok_and(|now| now == self.events)
    }
}

/// Guards a device whose table cannot be read, because the control device cannot be opened or the ioctl fails: the map
/// is made again as soon as the table can be read.
pub struct NoTable {
    /// The control device, if it could be opened.
    pub control: Option<Arc<Control>>,
    /// The device.
    pub id: DeviceId,
}

impl Guard for NoTable {
    fn unchanged(&self) -> bool {
        match &self.control {
            None => Control::open().is_err(),
            Some(control) => control.events().and_then(|_| control.table(self.id)).is_err(),
        }
    }

    fn trace(&self, trace: &mut Trace) {
        trace.limit(Reach::Process);
    }
}

/// Guards the part of a target's status that its map depends on.
pub struct StatusGuard {
    control: Arc<Control>,
    /// The device, and the start of the target in its table.
    place: (DeviceId, Sectors),
    /// Returns the part of a status that must not change.
    relevant: fn(&str) -> Option<String>,
    seen: Option<String>,
}

impl StatusGuard {
    /// Guards the status that a target has now. Returns that status too.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn new(
        control: Arc<Control>,
        place: (DeviceId, Sectors),
        relevant: fn(&str) -> Option<String>,
    ) -> Result<(Self, String), DenseReason> {
        let status = status(&control, place).map_err(|error| DenseReason::cannot("read its status", &error))?;
        let status = status.ok_or("it has no status")?;
        let seen = relevant(&status);
        Ok((Self { control, place, relevant, seen }, status))
    }
}

impl Guard for StatusGuard {
    fn unchanged(&self) -> bool {
        let status = status(&self.control, self.place).ok().flatten();
        status.is_some_and(|status| (self.relevant)(&status) == self.seen)
    }
}

/// The status of the target that starts at `place`; `None` when no target does.
fn status(control: &Control, (device, start): (DeviceId, Sectors)) -> io::Result<Option<String>> {
    let table = control.status(device, Commit::No)?;
    Ok(table.targets.into_iter().find(|target| target.start == start).map(|target| target.params))
}
