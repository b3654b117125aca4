//! `mount.blkholefs`, `umount.blkholefs` and their subcommands as mount(8), fstab, systemd and users call them.

#[path = "../common/mod.rs"]
mod common;

mod automount;
mod bench;
mod daemon;
mod files;
mod lines;
mod names;
mod other_programs;
mod output;
mod readme;
mod service;
mod start;
mod status;
mod system;
mod tags;
mod umount;
mod users;
mod writable;
