//! Random stacks of files, loop devices and partitions, which every Linux kernel supports.

mod common;

use common::differential::{Base, Level, run_seed};
use common::needs;
use common::random::seeds;

#[test]
fn random_changes_of_image_files() {
    needs!(root, programs["qemu-img"]);
    seeds(100, 6).for_each(|seed| run_seed(seed, Base::File, &[Level::Loop], 0, 20));
}

#[test]
fn random_stacks_of_loop_devices() {
    needs!(root, programs["qemu-img"]);
    seeds(200, 6).for_each(|seed| run_seed(seed, Base::Loop, &[Level::Loop], 2, 20));
}

#[test]
fn random_stacks_of_loop_devices_and_partitions() {
    needs!(root, programs["qemu-img"]);
    seeds(300, 6).for_each(|seed| run_seed(seed, Base::Loop, &[Level::Loop, Level::Partition], 3, 20));
}
