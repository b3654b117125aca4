//! Sources: each turns one kind of device into a [`HoleMap`].
//!
//! [`Resolver::device`] is the one factory. It looks at what the device is, asks that source for a [`Layer`], and the
//! source asks the resolver for the layers below it. The result is a [`Stack`]: the map of the whole device, the tree of
//! layers that explains it, the [`Guard`]s that tell how long it may be believed, and the devices whose dirty pages
//! must be written back before it is believed.
//!
//! A source never fails: what it cannot know becomes a [`dense`] layer with the reason.
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
//! | anything else | [`dense`] | nowhere |

pub mod backing;
pub mod dense;
pub mod device;
pub mod dm;
pub mod file;
mod live;
pub mod loop_device;
pub mod md;
pub mod nbd;
pub mod nvme;
pub mod partition;
mod resolve;
pub mod scsi;
pub mod thin;

pub use backing::Backing;
pub use device::BlockDevice;
pub use resolve::{Context, Resolver, Stack};

use std::hash::Hasher;
use std::sync::Arc;

use crate::map::HoleMap;
use crate::sys::device::DeviceId;
use crate::units::Bytes;

/// One device of a stack, and what it stands on.
pub struct Layer {
    /// The device's name for people: `/dev/loop0`, `vg-thin`, `/srv/disk.img`.
    pub name: String,
    /// What it is: `loop`, `partition`, `dm-linear`, `file`.
    pub kind: String,
    /// Where its holes come from, in a few words: `SEEK_HOLE on the backing file`.
    pub holes_from: String,
    /// Its holes.
    pub map: Arc<dyn HoleMap>,
    /// The block device that the layer is, as the resolver sets it for each device. `None` for a file or an export, and for
    /// one of several targets of a table.
    pub device: Option<DeviceId>,
    /// The layers that it stands on, in table order.
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

/// Tells whether a map may still be believed.
///
/// A guard is made before the map is read, and remembers what it saw. As long as it is unchanged, no write that
/// completed and no change of the stack happened since, so the map is as true as when it was made.
pub trait Guard: Send + Sync {
    /// Whether nothing happened since the guard was made. Any doubt, such as a device that no longer answers, is `false`.
    fn unchanged(&self) -> bool;

    /// Whether it guards what is stored, as I/O counters do, and not how the stack is built.
    fn is_of_content(&self) -> bool {
        false
    }

    /// Adds what tells this state of what it guards from any other, for the times of the file that shows it.
    fn trace(&self, _trace: &mut dyn Hasher) {}
}
