//! The times of a file. Backup tools compare them, and skip files whose times are the same.
//!
//! A block device has no time of its last write. A device whose state is seen for the first time gets the time of that moment,
//! and keeps it as long as its state is the same (see [`DeviceState`]). The states and times of this boot are kept in a file
//! that all mounts share (see [`TimesStore`]), so that an unchanged device has the same times in the next mount. A state that
//! proves nothing to another process is kept by this process only, and one that proves nothing at all gets new times at each
//! call.
//!
//! The times of a device increase with each new state, also when the clock is set back. A loop device that is all of a file has
//! the times of the file where that is an increase, so they are the same after a reboot. An image has times of its own.
//!
//! The times are kept by device and not by name: two names of one device have the same times.

pub mod records;
mod state;
mod store;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use self::records::Record;
use self::state::DeviceState;
use self::store::TimesStore;
use crate::handle::Handle;
use crate::sys::device::DeviceId;
use crate::sys::stamp::increasing_now;

/// How often the times of one device are written to the store, at most. A state that is not written costs new times in the next
/// mount, and nothing else.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// The times of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileTimes {
    /// The last change of its contents.
    pub mtime: SystemTime,
    /// The last change of its contents or attributes.
    pub ctime: SystemTime,
}

impl FileTimes {
    /// Both times are the same.
    pub fn at(time: SystemTime) -> Self {
        Self { mtime: time, ctime: time }
    }

    fn latest(&self) -> SystemTime {
        self.mtime.max(self.ctime)
    }
}

/// The state of each device at the last call, and the times since which it is the same.
#[derive(Default)]
pub struct Changes(Mutex<Known>);

#[derive(Default)]
struct Known {
    devices: HashMap<DeviceId, LastChange>,
    store: Option<TimesStore>,
}

struct LastChange {
    /// `None` when some of it was not known.
    state: Option<DeviceState>,
    times: FileTimes,
    /// Whether the store does not have it.
    is_unsaved: bool,
    /// When the device was written to the store last, or that was tried.
    saved: Option<Instant>,
}

impl LastChange {
    fn record(&self) -> Record {
        Record { state: self.state.and_then(|state| state.shared()), times: self.times }
    }

    /// Whether it is to be written to the store now. What proves nothing to other processes has time until the end.
    fn is_due(&self) -> bool {
        let is_time = || self.saved.is_none_or(|saved| saved.elapsed() >= SAVE_INTERVAL);
        self.is_unsaved && self.record().state.is_some() && is_time()
    }
}

impl Changes {
    /// Shares the times with other mounts through a file in this directory.
    pub fn share_in(&self, directory: &Path) {
        self.lock().store = TimesStore::new(directory);
    }

    /// The times of an open device. It must have been asked for holes right before: that writes back its dirty pages and
    /// resolves its stack.
    pub fn observe(&self, handle: &Handle) -> FileTimes {
        let export = handle.export();
        let Some(device) = export.device() else {
            let unknown = |_| FileTimes::at(increasing_now());
            return export.node().map_or_else(unknown, |node| FileTimes { mtime: node.mtime, ctime: node.ctime });
        };
        let mut state = DeviceState::of(device, handle);
        if state.is_some_and(|state| state.is_proof()) && !self.lock().is_known(device.id, state) {
            // Before the state gets times: a write that is under way moves no time when it ends.
            handle.finish_file_writes();
            state = DeviceState::of(device, handle);
        }
        self.lock().times(device.id, state)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn is_known(&self, device: DeviceId, state: Option<DeviceState>) -> bool {
        self.devices.get(&device).is_some_and(|last| last.state == state)
    }

    /// The times of a device in this state.
    fn times(&mut self, device: DeviceId, state: Option<DeviceState>) -> FileTimes {
        if state.is_none() || !self.is_known(device, state) {
            self.change(device, state);
        }
        if self.devices.get(&device).is_some_and(LastChange::is_due) {
            self.save();
        }
        self.devices.get(&device).map_or_else(|| FileTimes::at(increasing_now()), |last| last.times)
    }

    /// Gives a device the times of its new state: those that another process has given it, or new ones.
    fn change(&mut self, device: DeviceId, state: Option<DeviceState>) {
        let shared = state.and_then(|state| state.shared());
        let recorded = self.store.as_mut().and_then(|store| store.get(device));
        let last = self.devices.get(&device);
        let saved = last.and_then(|last| last.saved);
        let last = last.map(|last| last.times);
        if let Some(record) = recorded
            && record.state.is_some()
            && record.state == shared
            && last.is_none_or(|last| last.ctime <= record.times.ctime)
        {
            let known = LastChange { state, times: record.times, is_unsaved: false, saved };
            self.devices.insert(device, known);
            return;
        }
        let earlier = last.into_iter().chain(recorded.map(|record| record.times));
        let (before, mtime_before) = earlier.fold((None, None), |(latest, mtime), times| {
            (latest.max(Some(times.latest())), mtime.max(Some(times.mtime)))
        });
        let now = later_than(before);
        let new = LastChange { state, times: FileTimes::at(now), is_unsaved: true, saved };
        self.devices.insert(device, new);
        // The time of a file need not be later than the present one of the device. So it is used only if other processes know it.
        let of_file =
            state.and_then(|state| state.file_changed()).filter(|time| mtime_before.is_none_or(|mtime| *time > mtime));
        if let Some(mtime) = of_file.filter(|_| shared.is_some()) {
            self.set_time_of_file(device, FileTimes { mtime, ctime: now.max(mtime) }, FileTimes::at(now));
        }
    }

    /// Gives a device the time of its file if that can be saved at once, or else other times.
    fn set_time_of_file(&mut self, device: DeviceId, times: FileTimes, otherwise: FileTimes) {
        let Some(last) = self.devices.get_mut(&device) else { return };
        last.times = times;
        if last.is_due() {
            self.save();
        }
        if let Some(last) = self.devices.get_mut(&device)
            && last.is_unsaved
        {
            last.times = otherwise;
        }
    }

    /// Writes all that the store does not have. A failure is no error: other mounts then give new times, as without a store.
    fn save(&mut self) {
        let Some(store) = &mut self.store else { return };
        let unsaved: Vec<_> = self.devices.iter_mut().filter(|(_, last)| last.is_unsaved).collect();
        let records: Vec<_> = unsaved.iter().map(|(device, last)| (**device, last.record())).collect();
        let result = store.put(&records);
        if let Err(error) = &result {
            log::debug!("cannot save times: {error}");
        }
        for (_, last) in unsaved {
            last.saved = Some(Instant::now());
            last.is_unsaved = result.is_err();
        }
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        if self.devices.values().any(|last| last.is_unsaved) {
            self.save();
        }
    }
}

/// The current time, or one that is later than `before`.
fn later_than(before: Option<SystemTime>) -> SystemTime {
    let now = increasing_now();
    before.and_then(|before| before.checked_add(Duration::from_nanos(1))).map_or(now, |least| now.max(least))
}
