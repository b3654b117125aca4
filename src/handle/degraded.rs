//! Which answers of an open device are data because something failed or takes too long: the lines of the log about it, and
//! what `blkholefs status` prints.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::SystemTime;

use log::{Level, log};

use super::Handle;
use super::resolved::Resolved;
use crate::error::shown;
use crate::reason::Degraded;
use crate::source::{Layer, Loaded, Stack};
use crate::units::Bytes;

/// Why a question about extents had no valid answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// The device, or one below it, is suspended.
    Suspended,
    /// Dirty pages could not be written back.
    NotWrittenBack,
    /// The device changes faster than its extents can be loaded.
    Busy,
    /// The extents were dropped for lack of memory, and may not be loaded again so soon.
    Evicted,
}

impl NoAnswer {
    /// Why the dirty pages of a stack were not written back.
    pub(super) fn of_write_back(stack: &Stack) -> Self {
        if stack.suspended() { Self::Suspended } else { Self::NotWrittenBack }
    }

    /// A sentence without its final stop. Its subject, the device, is called "it".
    fn reason(self) -> &'static str {
        match self {
            Self::Suspended => "it, or a device below it, is suspended",
            Self::NotWrittenBack => "its dirty pages cannot be written back",
            Self::Busy => "it changes faster than its map can be read",
            Self::Evicted => "its map does not fit in map_cache beside the maps of the other open files",
        }
    }
}

/// A layer of an open device that is all data, or whose last answer was data in place of what could not be found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DenseLayer {
    /// The name of the layer.
    pub layer: String,
    /// Why, as a sentence without its final stop whose subject is the layer.
    pub reason: String,
    /// Since when; `None` if it is not known.
    pub since: Option<SystemTime>,
    /// Whether something failed, or the layer is in a state that may pass. All other layers are data by design.
    pub is_degraded: bool,
}

/// What the last questions about an open device found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandleState {
    /// The memory that the loaded extents take.
    pub map_memory: Bytes,
    /// The layers that are all data, and the device itself if its last question had no valid answer.
    pub dense: Vec<DenseLayer>,
}

/// The number of layers that are kept for one device. A table may have thousands of targets.
const MOST_LAYERS: usize = 64;

/// Adds the layers that are all data, or whose last answer was degraded. What is below such a layer does not matter.
fn add_dense(layer: &Layer, found: &mut Vec<DenseLayer>) {
    if found.len() == MOST_LAYERS {
        return;
    }
    let name = || layer.name.clone();
    match (layer.map.degraded(), layer.map.dense_because()) {
        (Some(Degraded { since, reason }), _) => {
            found.push(DenseLayer { layer: name(), reason, since: Some(since), is_degraded: true });
        }
        (None, Some(reason)) => {
            let (is_degraded, reason) = (reason.is_degradation(), reason.to_string());
            found.push(DenseLayer { layer: name(), reason, since: None, is_degraded });
        }
        (None, None) => layer.below.iter().for_each(|below| add_dense(below, found)),
    }
}

impl Handle {
    /// What the last questions found. Nothing is resolved, loaded or queried for that.
    ///
    /// The second value is the stack that was looked at, if another request has replaced it since. Dropping that closes devices
    /// and files, which may take long: a caller that holds a lock drops it later.
    pub fn state(&self) -> (HandleState, impl Sized + use<>) {
        let current = self.current();
        let map_memory = current.as_ref().map_or(Bytes::ZERO, |current| current.memory());
        let dense = self.dense_layers(current.as_deref());
        (HandleState { map_memory, dense }, current.and_then(Arc::into_inner))
    }

    fn dense_layers(&self, current: Option<&Resolved>) -> Vec<DenseLayer> {
        let mut found = Vec::new();
        if let Some(Degraded { since, reason }) = self.unanswered.now() {
            let layer = shown(self.export.name()).to_string();
            found.push(DenseLayer { layer, reason, since: Some(since), is_degraded: true });
        }
        let Some(current) = current else { return found };
        add_dense(&current.stack.top, &mut found);
        let noted = self.noted_layers();
        for dense in &mut found {
            dense.since = dense.since.or_else(|| since_in(&noted, dense));
        }
        found
    }

    /// Notes which layers of a stack are all data, after its extents were loaded.
    pub(super) fn note_dense_layers(&self, stack: &Stack) {
        if self.quiet {
            return;
        }
        let mut now = Vec::new();
        add_dense(&stack.top, &mut now);
        let mut noted = self.noted_layers();
        for dense in &mut now {
            dense.since = dense.since.or_else(|| since_in(&noted, dense)).or_else(|| Some(SystemTime::now()));
        }
        *noted = now;
    }

    fn noted_layers(&self) -> MutexGuard<'_, Vec<DenseLayer>> {
        self.dense_layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a question had no valid answer. A device that is gone has none either, and its requests fail.
    pub(super) fn note_no_answer(&self, why: NoAnswer) {
        if self.export.len().is_ok() {
            self.unanswered.set(why.reason());
        }
    }

    pub(super) fn log_loaded(&self, loaded: &Loaded) {
        let name = shown(self.export.name());
        let mut logged = self.logged_reason.lock().unwrap_or_else(PoisonError::into_inner);
        match &loaded.dense_because {
            Some(reason) if logged.as_ref() != Some(reason) => {
                self.log(Level::Warn, &format!("{name}: all data: {reason}"));
            }
            Some(_) => {}
            None => self.log(Level::Info, &format!("{name}: new map")),
        }
        logged.clone_from(&loaded.dense_because);
    }

    /// Logs, once for this device, that it changes faster than its extents can be loaded.
    pub(super) fn log_busy(&self) {
        // The guards of a device that is gone find a change too, which is no reason for this message.
        if self.export.len().is_ok() && !self.logged_busy.swap(true, Ordering::Relaxed) {
            let name = shown(self.export.name());
            let why = "changes faster than its map can be read: all data in between; back up a snapshot instead";
            self.log(Level::Warn, &format!("{name}: {why}"));
        }
    }

    /// Logs, once for this device, that its extents are needed again after they were dropped for the limit of the memory.
    pub(super) fn log_evicted(&self) {
        if !self.logged_evicted.swap(true, Ordering::Relaxed) {
            let name = shown(self.export.name());
            let why = "its map does not fit in map_cache beside the maps of the other open files, and is read again for \
                       at most a tenth of the time: mount with a larger -o map_cache";
            self.log(Level::Warn, &format!("{name}: {why}"));
        }
    }

    fn log(&self, level: Level, message: &str) {
        log!(if self.quiet { Level::Debug } else { level }, "{message}");
    }
}

/// Since when the same layer is all data for the same reason.
fn since_in(noted: &[DenseLayer], dense: &DenseLayer) -> Option<SystemTime> {
    noted.iter().find(|other| other.layer == dense.layer && other.reason == dense.reason)?.since
}
