//! What changed in a device since an older snapshot, for each kind of source that can prove it.
//!
//! "Unchanged" is a promise as strong as "hole": a range is unchanged only if it is proven to read as the same bytes
//! from the newer and from the older device. Any doubt about a range makes it data; any doubt about the pair of devices
//! is an error.

pub mod nbd;
pub mod snapshot;

use std::fmt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::error::{Error, Result};
use crate::map::ChangeMap;
use crate::source::{BlockDevice, Context, thin};
use crate::sys::device::DeviceId;

/// The answer of a source: the changes, and between which states of which devices they lie.
pub struct Changes {
    /// Which devices were compared, in which state.
    pub identity: Identity,
    /// The changes.
    pub map: ChangeMap,
    /// Finds out whether the devices are as they were.
    is_current: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Changes {
    /// The answer of a source. `is_current` finds out whether both devices are proven to be as they were.
    pub fn new(identity: Identity, map: ChangeMap, is_current: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self { identity, map, is_current: Box::new(is_current) }
    }

    /// Whether it is proven that nothing was written to either device since, and neither was built anew: the same
    /// question now would have the same answer. In any doubt the result is `false`.
    pub fn is_current(&self) -> bool {
        (self.is_current)()
    }
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Changes").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// Opens one of the devices that are to be compared.
///
/// # Errors
/// As [`BlockDevice::open`]. LVM does not activate snapshots of thin volumes by itself, so the error of a device that
/// does not exist has a hint.
pub fn open(path: &Path) -> Result<BlockDevice> {
    BlockDevice::open(path).map_err(|error| match error.errno() {
        libc::ENOENT => error.hint(ACTIVATE),
        _ => error,
    })
}

/// What to do about a volume that is not active.
pub const ACTIVATE: &str = "a volume must be active to be compared: lvchange -ay -K VG/VOLUME";

/// What changed from `older` to `newer`, two block devices.
///
/// The dirty pages of both are written back first. The answer has each write that completed before the call. It is
/// valid for as long as [`Changes::is_current`].
///
/// # Errors
/// When the two devices are not known to have a common past, cannot be read, or are written too often.
pub fn between(older: &BlockDevice, newer: &BlockDevice, context: &Context) -> Result<Changes> {
    if older.id == newer.id {
        return Err(Error::usage("cannot be compared with itself").on(&newer.path));
    }
    match snapshot::between(older, newer, context)? {
        Some(changes) => Ok(changes),
        None => thin::changes::between(older, newer, context),
    }
}

/// Whether two block devices look like volumes of one pool, for lists: [`between`] may refuse them nevertheless. Nothing is read of
/// their metadata.
pub fn look_comparable(older: &Path, newer: &Path, context: &Context) -> bool {
    let id = |path: &Path| {
        let metadata = path.metadata().ok()?;
        metadata.file_type().is_block_device().then(|| DeviceId::from_dev(metadata.rdev()))
    };
    match (id(older), id(newer)) {
        (Some(older), Some(newer)) if older != newer => thin::changes::are_of_one_pool(older, newer, context),
        _ => false,
    }
}

/// Which devices were compared, so that a script can refuse to apply an increment to another base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The kind of source: `thin`, `dm-snapshot` or `nbd`.
    pub kind: &'static str,
    /// Names and values, in the order in which they are printed. The names are lower-case words joined by hyphens.
    pub fields: Vec<(&'static str, IdentityValue)>,
}

/// One value of an [`Identity`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityValue {
    /// A text, such as a UUID.
    Text(String),
    /// A number, such as the id of a volume, or a size in bytes.
    Number(u64),
    /// The source has no such value.
    None,
}
