//! Devices that nobody writes to, by the word of the user (`-o static`), and the evidence that ends the promise.
//!
//! The extents of such a device are asked once. The user's word is what makes that right. Evidence that costs no query is
//! compared all the same: a device that has changed is asked at each question for the rest of the mount.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::LiveSource;
use crate::sys::sysfs::IoCounters;
use crate::units::Bytes;

/// The devices of a mount with `-o static`, or of one question, by their names.
pub struct StaticDevices {
    /// Whether the user has said that nobody writes to them.
    is_promised: bool,
    /// The memory that the extents of one device may take.
    limit: Bytes,
    devices: Mutex<HashMap<String, Arc<StaticDevice>>>,
    changes: Arc<AtomicU64>,
}

impl StaticDevices {
    /// For a mount whose extents may take `limit` bytes of memory.
    pub fn new(limit: Bytes) -> Self {
        Self { is_promised: true, limit, devices: Mutex::default(), changes: Arc::default() }
    }

    /// For one question, of which all parts may have any answer from after its begin. Somebody may write to the devices.
    pub fn for_one_question(limit: Bytes) -> Self {
        Self { is_promised: false, ..Self::new(limit) }
    }

    /// A number that changes when extents of any device were asked, so that their memory is counted again.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// The counter behind [`StaticDevices::changes`].
    pub(super) fn counter(&self) -> Arc<AtomicU64> {
        self.changes.clone()
    }

    /// The memory that the extents of one device may take.
    pub(super) fn limit(&self) -> Bytes {
        self.limit
    }

    /// The device with that name: the same one for each stack that has it.
    pub(super) fn device(&self, name: String) -> Arc<StaticDevice> {
        self.devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(name)
            .or_insert_with(|| Arc::new(StaticDevice { is_promised: self.is_promised, ..Default::default() }))
            .clone()
    }
}

/// What was observed of one device at the first question about it.
#[derive(Default)]
pub(super) struct StaticDevice {
    /// Whether the user has said that nobody writes to it.
    is_promised: bool,
    first: OnceLock<Observation>,
    ended: OnceLock<()>,
    /// An answer had a hole that is long enough for [`HoleMap::is_sparse`](crate::map::HoleMap::is_sparse). Each stat(2) of
    /// a device that is not open makes a stack of its own, which need not ask for that again.
    is_sparse: AtomicBool,
}

/// What does not change on a device that nobody writes to.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Observation {
    len: Bytes,
    medium: Option<u64>,
    counters: IoCounters,
}

impl StaticDevice {
    /// Whether nothing is known to contradict that nobody has written to the device since the first call. From the first
    /// change on the result is `false`. A write of this host that has completed is such a change.
    pub(super) fn holds(&self, source: &impl LiveSource) -> bool {
        if self.ended.get().is_some() {
            return false;
        }
        let Some(change) = self.change(source) else { return true };
        self.ended.get_or_init(|| {
            let name = source.name();
            match self.is_promised {
                true => log::warn!("{name}: {change}: option 'static' ends, and the device is asked at each question"),
                false => log::debug!("{name}: {change}: it is asked for each extent"),
            }
        });
        false
    }

    /// Notes that the device has such a hole.
    pub(super) fn set_sparse(&self) {
        self.is_sparse.store(true, Ordering::Relaxed);
    }

    /// Whether any stack has found such a hole.
    pub(super) fn is_sparse(&self) -> bool {
        self.is_sparse.load(Ordering::Relaxed)
    }

    /// What contradicts the promise.
    fn change(&self, source: &impl LiveSource) -> Option<String> {
        // The counters are read first: they are evidence if they were complete until after that.
        let counters = source.counters();
        if let Some(reason) = source.unobserved() {
            return Some(reason);
        }
        let Some(counters) = counters else { return Some("its I/O counters cannot be read".to_owned()) };
        let now = Observation { len: source.len(), medium: source.medium(), counters };
        let first = self.first.get_or_init(|| now);
        if first.len != now.len {
            return Some(format!("it had {} bytes and has {}", first.len, now.len));
        }
        if first.medium != now.medium {
            return Some("it has another medium".to_owned());
        }
        (first.counters != now.counters).then(|| "it was written".to_owned())
    }
}
