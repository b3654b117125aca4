//! Shows block devices as regular files whose holes are real.
#![deny(unsafe_code)]

pub mod cli;
pub mod error;
pub mod fs;
pub mod fuse;
pub mod handle;
pub mod map;
pub mod mount;
pub mod report;
pub mod source;
pub mod sys;
pub mod units;
