//! How long the machine was suspended.

use std::io;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// The unit of [`suspended`]. The two clocks are not read at the same time, so a shorter one would not be the same each time.
const UNIT: Duration = Duration::from_millis(10);

/// For how long the machine was suspended or hibernated since the boot, in units of 10 ms: the difference of the clock that
/// includes this (`CLOCK_BOOTTIME`) and the one that does not.
///
/// # Errors
/// As clock_gettime(2), and `WouldBlock` when the clocks cannot be read within a short time of each other.
pub fn suspended() -> io::Result<u128> {
    for _ in 0..100 {
        let (before, with) = (clock_gettime(ClockId::CLOCK_MONOTONIC)?, clock_gettime(ClockId::CLOCK_BOOTTIME)?);
        let after = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
        let [before, with, after] = [before, with, after].map(Duration::from);
        if after.saturating_sub(before) <= Duration::from_micros(100) {
            return Ok(with.saturating_sub(before).as_nanos() / UNIT.as_nanos());
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_in_suspension_is_the_same_while_the_machine_runs() {
        let first = suspended().unwrap();
        assert!((0..1000).all(|_| suspended().unwrap() == first));
    }
}
