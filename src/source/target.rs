//! What device-mapper's table ([`super::dm`]) and the functions for its targets exchange: the question and the answer.

use std::sync::Arc;

use crate::map::HoleMap;
use crate::reason::DenseReason;
use crate::source::Layer;
use crate::source::device::BlockDevice;
use crate::sys::dm::{Control, Events, TableTarget};
use crate::units::Bytes;

/// One target of the live table of a device-mapper device.
pub struct TargetContext<'a> {
    /// The control device.
    pub control: Arc<Control>,
    /// The device.
    pub device: &'a BlockDevice,
    /// The state of device-mapper's event counter before the table was read.
    pub events: Events,
    /// The target.
    pub target: &'a TableTarget,
    /// The target's length.
    pub len: Bytes,
}

impl TargetContext<'_> {
    /// The target's arguments, read by `parse`.
    ///
    /// # Errors
    /// When `parse` does not understand them.
    pub fn params<T>(&self, parse: impl FnOnce(&str) -> Option<T>) -> Result<T, DenseReason> {
        parse(&self.target.params).ok_or_else(|| DenseReason::NotUnderstood {
            what: "its arguments are".into(),
            text: self.target.params.clone(),
        })
    }
}

/// The holes of one target, and the devices that it maps to.
pub struct TargetLayer {
    /// Where the holes come from, in a few words.
    pub holes_from: String,
    /// The holes.
    pub map: Arc<dyn HoleMap>,
    /// The layers of the devices that the target maps to, in the order of its arguments.
    pub below: Vec<Arc<Layer>>,
}

impl TargetLayer {
    /// A target with the holes of `map`.
    pub fn new(holes_from: &str, map: impl HoleMap + 'static, below: Vec<Arc<Layer>>) -> Self {
        Self { holes_from: holes_from.to_owned(), map: Arc::new(map), below }
    }
}
