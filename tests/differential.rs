//! Random stacks that every Linux has: files, loop devices, partitions.

mod common;

use common::differential::{Base, Level, run_seed};
use common::random::seeds;
use common::requires_root;

#[test]
fn image_files() {
    if requires_root() {
        seeds(100, 6).for_each(|seed| run_seed(seed, Base::File, &[Level::Loop], 0, 20));
    }
}

#[test]
fn loop_devices() {
    if requires_root() {
        seeds(200, 6).for_each(|seed| run_seed(seed, Base::Loop, &[Level::Loop], 2, 20));
    }
}

#[test]
fn loop_devices_and_partitions() {
    if requires_root() {
        seeds(300, 6).for_each(|seed| run_seed(seed, Base::Loop, &[Level::Loop, Level::Partition], 3, 20));
    }
}
