//! System calls, ioctls, sysfs and /proc as safe functions. All unsafe code of the program is in this module.

pub mod acl;
pub mod aio;
pub mod block;
pub mod boot;
pub mod buffer;
pub mod clock;
pub mod device;
pub mod dm;
pub mod file;
pub mod iostats;
pub mod kmsg;
pub mod loopdev;
pub mod memory;
pub mod mountinfo;
pub mod process;
pub mod sg;
pub mod stamp;
pub mod statx;
pub mod stdio;
pub mod sysfs;
pub mod terminal;
pub mod zero;
