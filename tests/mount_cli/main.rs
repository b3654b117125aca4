//! `mount.blkholefs`, `umount.blkholefs` and their subcommands as mount(8), fstab, systemd and users call them.

#[path = "../common/mod.rs"]
mod common;

mod automount;
mod bench;
mod daemon;
mod files;
mod lines;
mod readme;
mod service;
mod start;
mod system;
mod umount;
mod users;
mod writable;
