//! A layer that is all data, with the reason.

use std::sync::Arc;

use crate::map::{Extent, ExtentKind, HoleMap};
use crate::reason::DenseReason;
use crate::source::Layer;
use crate::units::Bytes;

/// All data, with the reason.
#[derive(Debug)]
pub struct Dense {
    len: Bytes,
    reason: DenseReason,
}

impl Dense {
    /// A map of `len` bytes of data.
    pub fn new(len: Bytes, reason: impl Into<DenseReason>) -> Self {
        Self { len, reason: reason.into() }
    }
}

impl HoleMap for Dense {
    fn len(&self) -> Bytes {
        self.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        Extent { end: self.len.max(offset.saturating_add(Bytes::new(1))), kind: ExtentKind::Data }
    }

    fn allocated(&self) -> Option<Bytes> {
        Some(self.len)
    }

    fn is_guarded(&self) -> bool {
        true
    }

    fn dense_because(&self) -> Option<DenseReason> {
        Some(self.reason.clone())
    }
}

/// A layer of `len` bytes of data.
pub fn layer(name: impl Into<String>, kind: impl Into<String>, len: Bytes, reason: impl Into<DenseReason>) -> Layer {
    Layer {
        name: name.into(),
        kind: kind.into(),
        holes_from: "none".to_owned(),
        map: Arc::new(Dense::new(len, reason)),
        device: None,
        below: Vec::new(),
    }
}
