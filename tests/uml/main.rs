//! Tests on a real kernel with device-mapper: `tests/run` runs them inside user-mode-linux.
//!
//! Every test is ignored by a plain `cargo test`, because the kernel that it runs on may have no device-mapper.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

#[path = "../common/mod.rs"]
mod common;

#[path = "../support/rewritten.rs"]
mod rewritten;
#[path = "../support/thin_image.rs"]
#[allow(dead_code, reason = "only the makers of images are needed here")]
mod thin_image;

mod changes;
mod copies;
mod counters;
mod differential;
mod freshness;
mod lvm;
mod map_since;
mod md;
mod nbd;
mod own_writes;
mod passing;
mod power_cut;
mod readme;
mod restore;
mod scsi;
mod since_snapshot;
mod suspended;
mod systemd;
mod tables;
mod tail;
mod targets;
mod thin;
mod thin_changes;
mod thin_held;
mod thin_live;
mod thin_since;
mod thin_stress;
mod times;
mod uevents;
mod write_changes;
mod write_devices;
mod write_faults;
mod write_races;
mod write_thin;
