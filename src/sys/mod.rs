//! The kernel's side: ioctls, sysfs and file calls as safe functions. The only unsafe code of the program is here.

pub mod acl;
pub mod block;
pub mod buffer;
pub mod device;
pub mod dm;
pub mod file;
pub mod iostats;
pub mod kmsg;
pub mod loopdev;
pub mod memory;
pub mod process;
pub mod sg;
pub mod stamp;
pub mod statx;
pub mod sysfs;
