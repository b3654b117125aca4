//! A walk over the extents of a device.

use std::collections::VecDeque;
use std::ops::Range;

use super::Handle;
use crate::error::Result;
use crate::map::Extent;
use crate::units::Bytes;

/// The extents of a device within a range, each with its start. They are asked some at a time, so the memory of a walk does not
/// depend on their number. An error ends it.
pub struct Walk<'a> {
    handle: &'a Handle,
    /// Where the next question begins.
    at: Bytes,
    end: Bytes,
    known: VecDeque<(Bytes, Extent)>,
}

impl Handle {
    /// A walk over the extents of `range`.
    pub fn walk(&self, range: Range<Bytes>) -> Walk<'_> {
        Walk { handle: self, at: range.start, end: range.end, known: VecDeque::new() }
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<(Bytes, Extent)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.known.is_empty() && self.at < self.end {
            match self.handle.extents(self.at..self.end) {
                Ok(extents) => self.known.extend(extents),
                Err(error) => {
                    self.at = self.end;
                    return Some(Err(error));
                }
            }
        }
        let (start, extent) = self.known.pop_front()?;
        self.at = extent.end;
        Some(Ok((start, extent)))
    }
}
