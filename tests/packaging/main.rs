//! `mount-helpers/install` and `uninstall`, the Debian package and the RPM package: what they put where, and that it
//! works from there.

#[path = "../common/mod.rs"]
mod common;

#[allow(dead_code, reason = "the bench has parts that only the tests of mount(8) use")]
#[path = "../mount_cli/bench.rs"]
mod bench;

mod build;
mod deb;
mod install;
mod rpm;
mod tree;
mod unit;
