//! Shows block devices as regular files whose holes are real.
//!
//! Linux answers `lseek(SEEK_HOLE)` on a block device with EINVAL. This program is a FUSE daemon that answers it with the
//! holes that are known elsewhere: in the file below a loop device, in device-mapper tables and dm-thin metadata, to SCSI
//! disks and NBD servers.
//!
//! # The one rule
//!
//! **A hole is a promise that the range reads as zeros now; any doubt is data.** What is unknown, stale, unreadable,
//! corrupt or unsupported is data, with one line in the log that says why. Reads do not depend on the map: bytes come
//! from the device, and a read error is an error.
//!
//! # The flow of a request
//!
//! ```text
//! fuse -> fs -> handle -> map <- source -> sys
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`fuse`] | FUSE requests to calls of [`fs`] and back, nothing else |
//! | [`fs`] | names, inodes, attributes, the table of open files |
//! | [`handle`] | one open device: reads, and seeks under the freshness rule |
//! | [`map`] | runs of data and holes, their compositions, and the exact answers of lseek; knows no devices |
//! | [`source`] | each kind of device to a map, in a folder or file of its own; [`source::Resolver`] goes down a stack |
//! | [`sys`] | system calls, ioctls and sysfs as safe functions: the only unsafe code |
//! | [`spec`] | the SPEC of a command line, parsed once, and the options that belong to it |
//! | [`mount`] | the commands `mount` and `umount`, their options, and the daemon |
//! | [`cli`], [`report`] | the other commands, and their output |
//! | [`error`], [`units`] | one error with one errno and one exit code; bytes and sectors as types |
//! | [`reason`] | why a device is shown without holes |
//! | [`deadline`] | how long a request may wait for servers |
//!
//! Arrows point one way: nothing in `map` knows of devices, nothing in `source` of FUSE, and only `fuse` and the mount's
//! session name the FUSE library.
//!
//! # The freshness rule
//!
//! A write that completed before an lseek is never inside a hole that it reports. [`handle`] writes back the dirty pages
//! of every layer, asks the map, and then asks each [`source::Guard`] whether anything happened since the map was made:
//! size, disk sequence, loop binding, device-mapper table, I/O counters. Otherwise the stack is resolved again, for a
//! tenth of the time at most; in between, all is data.
#![deny(unsafe_code)]

pub mod cli;
pub mod deadline;
pub mod error;
pub mod export;
pub mod fs;
pub mod fuse;
pub mod handle;
pub mod map;
pub mod mount;
pub mod reason;
pub mod report;
pub mod source;
pub mod spec;
pub mod sys;
pub mod units;
