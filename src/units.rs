//! Types for positions and lengths, so that bytes and sectors cannot be confused.
//!
//! Positions and lengths are [`Bytes`]. [`Sectors`] are used only for values that the kernel counts in sectors of 512 bytes:
//! in device-mapper tables, in sysfs and in the status of thin pools. The types have no arithmetic operators, as every
//! caller must choose what happens on overflow: `checked_*` methods return `None`, `saturating_*` methods return the limit.

use std::fmt;

/// A position or a length in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(u64);

impl Bytes {
    /// The length zero, or the start of a device.
    pub const ZERO: Self = Self(0);
    /// The largest position or length.
    pub const MAX: Self = Self(u64::MAX);

    /// This number of bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The number of bytes as an integer.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The sum, or `None` on overflow.
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// The difference, or `None` if it is negative.
    pub const fn checked_sub(self, other: Self) -> Option<Self> {
        match self.0.checked_sub(other.0) {
            Some(difference) => Some(Self(difference)),
            None => None,
        }
    }

    /// The sum, or [`Bytes::MAX`] on overflow.
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The difference, or zero if it is negative.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// The index of the byte at this position in a buffer that begins with the byte at `start`. The largest index if it cannot be in one.
    pub fn index_from(self, start: Self) -> usize {
        usize::try_from(self.saturating_sub(start).0).unwrap_or(usize::MAX)
    }

    /// The largest multiple of `unit` at or below this position. If `unit` is zero, the position itself.
    pub const fn align_down(self, unit: Self) -> Self {
        match self.0.checked_rem(unit.0) {
            Some(remainder) => Self(self.0 - remainder),
            None => self,
        }
    }

    /// The smallest multiple of `unit` at or above this position, or `None` on overflow. If `unit` is zero, the position
    /// itself.
    pub const fn align_up(self, unit: Self) -> Option<Self> {
        let down = self.align_down(unit);
        if down.0 == self.0 { Some(self) } else { down.checked_add(unit) }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A position or a length in sectors of 512 bytes. The kernel uses this unit independently of a device's logical block size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sectors(u64);

impl Sectors {
    /// The size of a sector (`SECTOR_SIZE` of `include/linux/blk_types.h`).
    pub const SIZE: Bytes = Bytes::new(512);

    /// This number of sectors.
    pub const fn new(sectors: u64) -> Self {
        Self(sectors)
    }

    /// The number of sectors as an integer.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The same position or length in bytes, or `None` on overflow.
    pub const fn bytes(self) -> Option<Bytes> {
        match self.0.checked_mul(Self::SIZE.0) {
            Some(bytes) => Some(Bytes(bytes)),
            None => None,
        }
    }
}

impl fmt::Display for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_near_multiples_and_limits() {
        let unit = Bytes::new(4096);
        for (value, down, up) in [
            (0, 0, Some(0)),
            (1, 0, Some(4096)),
            (4095, 0, Some(4096)),
            (4096, 4096, Some(4096)),
            (4097, 4096, Some(8192)),
            (u64::MAX, u64::MAX - 4095, None),
        ] {
            assert_eq!(Bytes::new(value).align_down(unit).get(), down, "{value} down");
            assert_eq!(Bytes::new(value).align_up(unit).map(Bytes::get), up, "{value} up");
        }
        assert_eq!(Bytes::new(5).align_down(Bytes::ZERO), Bytes::new(5));
    }

    #[test]
    fn sectors_that_do_not_fit_in_bytes_are_none() {
        assert_eq!(Sectors::new(3).bytes(), Some(Bytes::new(1536)));
        assert_eq!(Sectors::new(u64::MAX / 512).bytes(), Some(Bytes::new(u64::MAX / 512 * 512)));
        assert_eq!(Sectors::new(u64::MAX / 512 + 1).bytes(), None);
    }
}
