//! Guards on live tables.
//!
//! The text of a table can come back while what it shows is another thing: a table may have been replaced and restored in
//! between. For a target that only passes requests on to devices below, that is no matter. Those devices are open, so that
//! their numbers stay theirs, and each has guards of its own: [`TableGuard`] is enough. A target with metadata of its own
//! (thin, snapshot, clone) may come back with other metadata: it needs a [`ReplacedGuard`] too.

use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use crate::source::Guard;
use crate::sys::device::DeviceId;
use crate::sys::dm::{Control, Events, Table};

/// The text of the live table of a device, and whether the device is suspended.
pub struct TableGuard {
    control: Arc<Control>,
    id: DeviceId,
    seen: Table,
    /// The events up to the last time that the table was seen to be this one.
    events: Mutex<Events>,
}

impl TableGuard {
    /// Holds a device to the table `seen`, which was read after `events`.
    pub fn new(control: Arc<Control>, id: DeviceId, events: Events, seen: Table) -> Self {
        Self { control, id, seen, events: Mutex::new(events) }
    }
}

impl Guard for TableGuard {
    fn unchanged(&self) -> bool {
        let Ok(now) = self.control.events() else { return false };
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        // No event tells of a resume. (No guard has to see a suspension: it is looked for before each use of a map.)
        if now == *events && !self.seen.suspended {
            return true;
        }
        // The events before the table, as at first.
        let same = self.control.table(self.id).is_ok_and(|table| table == self.seen);
        if same {
            *events = now;
        }
        same
    }

    fn trace(&self, mut trace: &mut dyn Hasher) {
        self.seen.hash(&mut trace);
    }
}

/// A live table that must not have been replaced, not even by one with the same text.
pub struct ReplacedGuard {
    control: Arc<Control>,
    events: Events,
}

impl ReplacedGuard {
    /// Holds all devices to the tables that they had at `events`.
    pub fn new(control: Arc<Control>, events: Events) -> Self {
        Self { control, events }
    }
}

impl Guard for ReplacedGuard {
    fn unchanged(&self) -> bool {
        self.control.events().is_ok_and(|now| now == self.events)
    }

    /// Which device an event was for is not known, so each one may be a change of this device.
    fn trace(&self, mut trace: &mut dyn Hasher) {
        self.events.hash(&mut trace);
    }
}

/// A device whose table cannot be read: the control device cannot be opened, or refuses.
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
}
