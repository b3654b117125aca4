//! The fixtures themselves, on devices whose contents are known.

use crate::common::dm::{Dm, Pool, sectors};
use crate::common::image::{Image, write};
use crate::common::loop_device::Loop;
use crate::common::{KIB, MIB};

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn linear_has_the_size_of_its_device() {
    let image = Image::new(3 * MIB);
    let below = Loop::new(image.path());
    let linear = Dm::linear(below.path());
    assert_eq!(sectors(linear.path()), 6144);
    linear.reload("0 2048 zero");
    assert_eq!(sectors(linear.path()), 2048);
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn thin_volumes_provision_what_is_written() {
    let pool = Pool::new(64 * MIB, 64 * KIB);
    let thin = pool.thin(0, 1024 * MIB);
    write(thin.path(), 128 * MIB..128 * MIB + 4096);
    assert_eq!(thin.status().split(' ').nth(3), Some("128"), "{}", thin.status());
    let snapshot = pool.snapshot(1, &thin, 0);
    write(snapshot.path(), 0..4096);
    assert_eq!(snapshot.status().split(' ').nth(3), Some("256"), "{}", snapshot.status());
}
