//! What several targets need of their [`TargetContext`]: windows on lower devices, and guards.

use std::sync::Arc;

use super::guard::{StatusGuard, TableReloadGuard};
use super::params::Place;
use crate::map::Clip;
use crate::reason::DenseReason;
use crate::source::target::{TargetContext, TargetLayer};
use crate::source::{Layer, Resolver};
use crate::units::Sectors;

/// Why a target has no holes whose arguments lead beyond 64 bits.
pub(super) const PLACE_OUT_OF_RANGE: &str = "a place on a device below is out of range";

impl TargetContext<'_> {
    /// Checks that the target is the first of its table. Some targets do not subtract their own start from the position
    /// of a request, so they work nowhere else.
    ///
    /// # Errors
    /// When it is not.
    pub(super) fn require_first(&self) -> Result<(), DenseReason> {
        match self.target.start == Sectors::new(0) {
            true => Ok(()),
            false => Err("it is not the first of its table".into()),
        }
    }

    /// The window of the target's length at `place`.
    ///
    /// # Errors
    /// When it is out of range.
    pub(super) fn window(&self, place: Place, resolver: &mut Resolver<'_>) -> Result<(Arc<Layer>, Clip), DenseReason> {
        resolver.window(place.device, place.start, self.len).ok_or_else(|| PLACE_OUT_OF_RANGE.into())
    }

    /// A target that reads all of its bytes from `place` on.
    ///
    /// # Errors
    /// When that is out of range.
    pub(super) fn mapped_to(
        &self,
        place: Place,
        holes_from: &str,
        resolver: &mut Resolver<'_>,
    ) -> Result<TargetLayer, DenseReason> {
        let (below, clip) = self.window(place, resolver)?;
        Ok(TargetLayer::new(holes_from, clip, vec![below]))
    }

    /// Guards against a reload of the device's table, also of one with the same text: for a target with metadata of its
    /// own.
    pub(super) fn guard_reload(&self, resolver: &mut Resolver<'_>) {
        resolver.guard(TableReloadGuard::new(self.control.clone(), self.events));
    }

    /// The target's status now. Guards the part of it that `relevant` returns.
    ///
    /// # Errors
    /// When the status cannot be read.
    pub(super) fn guarded_status(
        &self,
        relevant: fn(&str) -> Option<String>,
        resolver: &mut Resolver<'_>,
    ) -> Result<String, DenseReason> {
        let place = (self.device.id, self.target.start);
        let (guard, status) = StatusGuard::new(self.control.clone(), place, relevant)?;
        resolver.guard(guard);
        Ok(status)
    }
}

/// All of a status, for [`TargetContext::guarded_status`].
pub(super) fn whole_status(status: &str) -> Option<String> {
    Some(status.to_owned())
}
