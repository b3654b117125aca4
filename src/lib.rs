//! Shows block devices as regular files whose holes are real.
//!
//! Linux answers `lseek(SEEK_HOLE)` on a block device with EINVAL. This program is a FUSE daemon that answers it with the
//! holes that are known elsewhere: in the file below a loop device, in device-mapper tables and dm-thin metadata, to SCSI
//! disks and NBD servers.
//!
//! # The one rule
//!
//! **A hole is a promise that the range reads as zeros now; any doubt is data.** Ranges that are unknown, stale, unreadable,
//! corrupt or unsupported are data, and one line in the log has the reason. Reads do not depend on the extents: bytes come
//! from the device, and a read error is an error.
//!
//! # The flow of a request
//!
//! ```text
//! fuse -> fs -> handle -> export -> (source, map) -> sys
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`fuse`] | decodes FUSE requests, calls [`fs`], and replies |
//! | [`fs`] | names, inodes, attributes, the table of open files |
//! | [`handle`] | one open device: reads, reading ahead, and seeks under the freshness rule |
//! | [`export`] | what one file is: its length, bytes, extents, freshness and identity; and what a mount shows |
//! | [`source`] | finds the extents of each kind of device, in a folder or file of its own |
//! | [`map`] | extents of data and holes, their compositions, and the exact answers of lseek; knows no devices |
//! | [`qcow2`] | virtual qcow2 images: where each byte of an image comes from; knows no devices |
//! | [`filesystem`] | the free space of file systems, from their own metadata; knows no devices |
//! | [`sys`] | system calls, ioctls and sysfs as safe functions: the only unsafe code |
//! | [`spec`] | the SPEC of a command line, parsed once, and the options that belong to it |
//! | [`mount`] | the commands `mount` and `umount`, their options, and the daemon |
//! | [`verify`] | whether holes read as zeros, and whether a copy has the bytes of a device |
//! | [`cli`], [`report`] | the other commands, and their output |
//! | [`error`], [`units`] | one error with one errno and one exit code; bytes and sectors as types |
//! | [`reason`] | why a device is shown without holes |
//! | [`output`] | the standard output and the standard error of the commands |
//! | [`deadline`] | how long a request may wait for servers |
//! | [`range_locks`] | locks on ranges of a device, for writers that write more than they were given |
//!
//! A module uses none that is left of it in the flow. Only `fuse` and the mount's session name the FUSE library.
//! `docs/architecture.md` has the types, and six requests from begin to end.
//!
//! # The freshness rule
//!
//! A write that completed before an lseek is never inside a hole that the lseek reports. [`handle`] writes back the dirty
//! pages of every layer, asks the extents, and then calls each [`source::Guard`], which finds out whether anything has
//! changed since the extents were loaded: size, disk sequence, loop binding, device-mapper table, I/O counters. If
//! something has, the stack is resolved and loaded again. That takes a tenth of the time at most; in between, all is data.
#![deny(unsafe_code)]
#![allow(rustdoc::private_intra_doc_links, reason = "the documentation is for developers, and has the private items")]

mod cli;
mod deadline;
mod error;
mod export;
mod filesystem;
mod fs;
mod fuse;
mod handle;
mod map;
mod mount;
mod output;
mod program;
mod qcow2;
mod range_locks;
mod reason;
mod report;
mod source;
mod spec;
mod sys;
pub mod testing;
mod units;
mod verify;

pub use program::run;
