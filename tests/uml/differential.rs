//! Random stacks with device-mapper in them.

use crate::common::differential::{Base, Level, run_seed};
use crate::common::random::seeds;

const LEVELS: [Level; 4] = [Level::Loop, Level::Partition, Level::Linear, Level::Striped];

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn linear_and_striped() {
    seeds(400, 3).for_each(|seed| run_seed(seed, Base::Loop, &LEVELS[2..], 3, 12));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn everything_over_loop_devices() {
    seeds(500, 3).for_each(|seed| run_seed(seed, Base::Loop, &LEVELS, 4, 12));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn thin_and_snapshots() {
    seeds(600, 3).for_each(|seed| run_seed(seed, Base::Thin, &LEVELS, 0, 15));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn everything_over_thin() {
    seeds(700, 3).for_each(|seed| run_seed(seed, Base::Thin, &LEVELS, 3, 12));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn external_origins() {
    seeds(800, 3).for_each(|seed| run_seed(seed, Base::ThinWithOrigin, &LEVELS, 2, 12));
}
