//! Random stacks with device-mapper in them.

use crate::common::differential::{Base, Level, run_seed};
use crate::common::random::seeds;

const LEVELS: [Level; 4] = [Level::Loop, Level::Partition, Level::Linear, Level::Striped];

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn random_stacks_of_linear_and_striped_devices() {
    seeds(400, 3).for_each(|seed| run_seed(seed, Base::Loop, &LEVELS[2..], 3, 12));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn random_stacks_of_all_levels_over_loop_devices() {
    seeds(500, 3).for_each(|seed| run_seed(seed, Base::Loop, &LEVELS, 4, 12));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn random_changes_of_thin_volumes_and_snapshots() {
    seeds(600, 3).for_each(|seed| run_seed(seed, Base::Thin, &LEVELS, 0, 15));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn random_stacks_of_all_levels_over_thin_volumes() {
    seeds(700, 3).for_each(|seed| run_seed(seed, Base::Thin, &LEVELS, 3, 12));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn random_stacks_over_thin_volumes_with_external_origins() {
    seeds(800, 3).for_each(|seed| run_seed(seed, Base::ThinWithOrigin, &LEVELS, 2, 12));
}
