//! Shows block devices as regular files whose holes are real.
#![deny(unsafe_code)]

pub mod error;
pub mod fuse;
pub mod map;
pub mod mount;
pub mod source;
pub mod sys;
pub mod units;
