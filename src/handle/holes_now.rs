//! The holes of a range now, with the state of the stack that they are from.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::sequence::SequenceNumber;
use super::{EXTENTS_AT_ONCE, Handle};
use crate::error::Result;
use crate::map::{HoleMap, view};
use crate::reason::DenseReason;
use crate::source::StackTrace;
use crate::units::Bytes;

/// The holes of a range, as a question found them that was asked after the call began.
pub struct HolesNow {
    /// The holes in ascending order, of all kinds.
    pub holes: Vec<Range<Bytes>>,
    /// The state that they are from; `None` where there was no answer, and so no hole.
    pub state: Option<StackState>,
}

/// A state of a stack. If two answers have equal states, the second one is proof that since the first one no guard of the stack
/// found a change, and no file at the bottom was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackState {
    stack: SequenceNumber,
    trace: StackTrace,
    /// Whether the guards find each change of the extents (`Stack::is_guarded`).
    pub is_guarded: bool,
}

impl Handle {
    /// The holes within `range`, which has at most [`EXTENTS_AT_ONCE`] units of the device: further ones count as data.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn holes_now(&self, range: &Range<Bytes>) -> Result<HolesNow> {
        let align = self.export.align();
        let holes = |map: &dyn HoleMap| {
            let runs = view::runs(map, align, range.clone()).take(EXTENTS_AT_ONCE);
            runs.filter(|(_, run)| run.kind.is_hole()).map(|(start, run)| start..run.end).collect()
        };
        match self.fresh_answer_of(None, holes, |_| false) {
            Some((holes, resolved)) => {
                // After the answer: a file that was written since it was asked gives another trace.
                let (trace, is_guarded) = (resolved.stack.trace(), resolved.stack.is_guarded());
                Ok(HolesNow { holes, state: Some(StackState { stack: resolved.born, trace, is_guarded }) })
            }
            None => self.export.len().map(|_| HolesNow { holes: Vec::new(), state: None }),
        }
    }

    /// Why the extents that were asked last are all data, where that is known.
    pub fn dense_because(&self) -> Option<DenseReason> {
        let of_map = self.current().and_then(|current| current.loaded()?.map().dense_because());
        let is_busy = || self.logged_busy.load(Ordering::Relaxed);
        of_map.or_else(|| is_busy().then(|| DenseReason::NotNow("it changes faster than its map can be read".into())))
    }
}
