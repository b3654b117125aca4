//! Units as types: a bare `u64` never crosses a module.
//!
//! All positions and lengths in this program are [`Bytes`]; [`Sectors`] exist only where the kernel speaks in
//! 512-byte sectors (device-mapper tables, sysfs, thin-pool status). There are no arithmetic operators on purpose:
//! a caller says whether an overflow is an error (`checked_*`) or a limit (`saturating_*`).

use std::fmt;

/// A position or a length in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(u64);

impl Bytes {
    /// Nothing, or the start.
    pub const ZERO: Self = Self(0);
    /// The largest value.
    pub const MAX: Self = Self(u64::MAX);

    /// Wraps a number of bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The number of bytes.
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

    /// The difference, or `None` when it would be negative.
    pub const fn checked_sub(self, other: Self) -> Option<Self> {
        match self.0.checked_sub(other.0) {
            Some(difference) => Some(Self(difference)),
            None => None,
        }
    }

    /// The sum, at most [`Bytes::MAX`].
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The difference, at least zero.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// The largest multiple of `unit` that is not above this position. A `unit` of zero changes nothing.
    pub const fn align_down(self, unit: Self) -> Self {
        match self.0.checked_rem(unit.0) {
            Some(remainder) => Self(self.0 - remainder),
            None => self,
        }
    }

    /// The smallest multiple of `unit` that is not below this position, or `None` on overflow.
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

/// A position or a length in sectors of 512 bytes, the kernel's unit whatever a device's logical block size is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sectors(u64);

impl Sectors {
    /// Bytes in a sector (`SECTOR_SIZE` of `include/linux/blk_types.h`).
    pub const SIZE: Bytes = Bytes::new(512);

    /// Wraps a number of sectors.
    pub const fn new(sectors: u64) -> Self {
        Self(sectors)
    }

    /// The number of sectors.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The same length in bytes, or `None` when it does not fit.
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
    fn alignment_at_its_edges() {
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
    fn sectors_that_do_not_fit_are_refused() {
        assert_eq!(Sectors::new(3).bytes(), Some(Bytes::new(1536)));
        assert_eq!(Sectors::new(u64::MAX / 512).bytes(), Some(Bytes::new(u64::MAX / 512 * 512)));
        assert_eq!(Sectors::new(u64::MAX / 512 + 1).bytes(), None);
    }
}
