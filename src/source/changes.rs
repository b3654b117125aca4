//! What changed in a device since an older snapshot, for each kind of source that can prove it.
//!
//! "Unchanged" is a promise as strong as "hole": a range is unchanged only if it is proven to read as the same bytes from the
//! newer and from the older device. Any doubt about a range makes it data; any doubt about the pair of devices is an error.

pub mod nbd;
pub mod snapshot;

use crate::map::ChangeMap;

/// The answer of a source: the changes, and between which states of which devices they lie.
pub struct Changes {
    /// Which devices were compared, in which state.
    pub identity: Identity,
    /// The changes.
    pub map: ChangeMap,
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
