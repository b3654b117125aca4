//! Compositions whose cost follows the answer.

use super::{HoleMap, Kind, Run};
use crate::units::Bytes;

/// A range of one kind.
#[derive(Clone, Copy, Debug)]
pub struct Uniform {
    /// Its length.
    pub len: Bytes,
    /// What it holds.
    pub kind: Kind,
}

impl HoleMap for Uniform {
    fn len(&self) -> Bytes {
        self.len
    }

    fn run_at(&self, offset: Bytes) -> Run {
        Run { end: self.len.max(offset.saturating_add(Bytes::new(1))), kind: self.kind }
    }
}
