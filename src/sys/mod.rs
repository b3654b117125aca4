//! The only unsafe code: system calls behind safe functions.

pub mod process;
