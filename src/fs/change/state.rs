//! The state of a device: values that change when it is written.

use std::time::SystemTime;

use crate::handle::Handle;
use crate::source::{BlockDevice, Reach, Trace};
use crate::sys::clock;
use crate::sys::iostats::{self, CompleteAccounting};
use crate::sys::loopdev::LoopStatus;
use crate::sys::sysfs::{Activity, StatFile};
use crate::units::Bytes;

/// The state of a device at some time: its I/O counters, the lengths, media, tables and bindings of it and of the devices below
/// it, and the times of the files at the bottom. Equal states of one process prove that the device was not changed in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceState {
    number: u128,
    reach: Reach,
    file_changed: Option<SystemTime>,
}

impl DeviceState {
    #[cfg(test)]
    pub(super) fn new(number: u128, reach: Reach, file_changed: Option<SystemTime>) -> Self {
        Self { number, reach, file_changed }
    }

    /// The state of a device now. `None` when some of it is not known.
    pub(super) fn of(device: &BlockDevice, handle: &Handle) -> Option<Self> {
        let id = device.id;
        let counting = CompleteAccounting::of(id).ok()?;
        let stat = StatFile::open(id).ok().filter(|stat| iostats::counts(id, stat))?;
        // The inode: another device with the same number and as many writes has another one.
        let (inode, activity) = (stat.inode().ok()?, Activity::now(id, &stat).ok()?);
        let stack = handle.trace()?;
        let mut trace = Trace::new();
        // A disk may have been written by another system while this one slept.
        trace.add_or_nothing(clock::suspended());
        trace.add(&(id, inode, activity, stack.number));
        trace.limit(stack.reach);
        if stack.reach == Reach::Open {
            trace.add(handle.unique());
        }
        let all = trace.finish();
        let file_changed = stack.file_changed.filter(|_| is_all_of_a_file(device));
        Some(Self { number: all.number, reach: all.reach, file_changed }).filter(|_| counting.holds())
    }

    /// Whether it proves anything.
    pub(super) fn is_proof(&self) -> bool {
        self.reach > Reach::Nothing
    }

    /// A number that other processes of this boot can compare with theirs. `None` if that would prove nothing.
    pub(super) fn shared(&self) -> Option<u128> {
        (self.reach == Reach::Boot).then_some(self.number)
    }

    /// The last change of the file that the device is, for a loop device that is all of a file.
    pub(super) fn file_changed(&self) -> Option<SystemTime> {
        self.file_changed
    }
}

/// Whether a device is a loop device that shows all of a file.
fn is_all_of_a_file(device: &BlockDevice) -> bool {
    LoopStatus::of_loop(device.id, &device.file).is_some_and(|status| {
        let is_file = status.block_device.is_none() && !status.encrypted;
        is_file && status.offset == Bytes::ZERO && status.size_limit == Bytes::ZERO
    })
}
