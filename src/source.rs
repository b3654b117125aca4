//! Sources: each finds the extents of one kind of device.
//!
//! [`Stack::of_device`] resolves a device. It finds the source for the kind of device in `table.rs`, and the source gives
//! a [`Layer`]. A source calls [`Resolver::device`] for the layers of the devices below. The result is a [`Stack`]: the
//! layers, the [`Guard`]s that detect changes, and the devices whose dirty pages must be written back. Resolving reads
//! tables, attributes and status lines. [`Stack::load`] then reads the extents that are stored in metadata.
//!
//! A source never fails: a device whose holes cannot be known is a [`dense`] layer with the reason.
//!
//! | device | source | holes come from |
//! |---|---|---|
//! | regular file | [`file`](mod@file) | SEEK_DATA and SEEK_HOLE on a private descriptor |
//! | loop device | [`loop_device`] | its backing file or device |
//! | partition | [`partition`] | its disk |
//! | device-mapper | [`dm`] | its table's targets |
//! | md array | [`md`] | its legs, where the level and the state allow |
//! | SCSI disk | [`scsi`] | GET LBA STATUS, where the disk promises zeros |
//! | export of an NBD server | [`nbd`] | block status (base:allocation) |
//! | anything else | [`dense`] | none |

mod below;
pub mod changes;
pub mod dense;
pub mod device;
pub mod dm;
pub mod file;
mod live;
pub mod loop_device;
pub mod md;
pub mod nbd;
mod nvme;
pub mod own_writes;
pub mod partition;
mod provisioning;
mod resolve;
pub mod scsi;
mod stack;
mod stored;
mod table;
mod target;
pub mod thin;
mod trace;

pub use device::BlockDevice;
pub use live::StaticDevices;
pub use own_writes::CountedFile;
pub use provisioning::Provisioning;
pub use resolve::{Context, Resolver};
pub use stack::{Loaded, Stack};
pub use stored::LoadExtents;
pub use thin::guard::WriteGuard;
pub use trace::{Reach, StackTrace, Trace, Unique};

use std::fs::File;
use std::sync::Arc;

use crate::map::HoleMap;
use crate::sys::device::DeviceId;
use crate::units::Bytes;

/// One device or file of a stack.
pub struct Layer {
    /// The name for people: `/dev/loop0`, `vg-thin`, `/srv/disk.img`.
    pub name: String,
    /// The kind of device: `loop`, `partition`, `dm-linear`, `file`.
    pub kind: String,
    /// Where its holes come from, in a few words: `SEEK_HOLE on the backing file`.
    pub holes_from: String,
    /// Its extents, or all data until they are loaded.
    pub map: Arc<dyn HoleMap>,
    /// The number of the block device, which the resolver sets. `None` for a file, an export, and one target of several.
    pub device: Option<DeviceId>,
    /// The layers of the devices and files that it maps to, in the order of its table.
    pub below: Vec<Arc<Layer>>,
}

impl Layer {
    /// The length of the device.
    pub fn len(&self) -> Bytes {
        self.map.len()
    }

    /// Whether the device has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }
}

/// Detects changes of what extents depend on.
///
/// A guard is made before the extents are read, and stores the state that it finds. As long as it finds the same state, no
/// write has completed and no layer has changed since, so the extents are as true as when they were read.
pub trait Guard: Send + Sync {
    /// Whether nothing has changed since the guard was made. In any doubt, such as a device that no longer answers, the
    /// result is `false`.
    fn unchanged(&self) -> bool;

    /// As [`Guard::unchanged`], but for writes of this process whose ranges the extents of the stack have as data
    /// ([`own_writes`]). What is not among these extents may be void when this is `true`.
    fn unchanged_but_followed(&self) -> bool {
        self.unchanged()
    }

    /// Whether it guards the stored data, as I/O counters do, and not how the stack is built.
    fn is_of_content(&self) -> bool {
        false
    }

    /// Whether it guards the length of a device and nothing else.
    fn is_of_length(&self) -> bool {
        false
    }

    /// The file below the devices whose times it watches, if so: they change when the file is written past the devices.
    fn file(&self) -> Option<&File> {
        None
    }

    /// Adds the guarded state to a trace, from which the times of a file are derived. What is added must have the same value in
    /// another process if and only if nothing changed, or limit the reach of the trace.
    fn trace(&self, _trace: &mut Trace) {}
}
