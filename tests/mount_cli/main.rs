//! `mount.blkholefs`, `umount.blkholefs` and their subcommands as mount(8), fstab, systemd and users call them.

#[path = "../common/mod.rs"]
mod common;

mod automount;
mod bench;
mod daemon;
mod files;
mod lines;
mod service;
mod start;
mod status;
mod system;
mod umount;
mod users;
mod writable;
