//! Mounting and unmounting: the commands `mount` and `umount`, and the daemon.
//!
//! [`argv`] and [`options`] are parsers. [`helper`] is the program that mount(8) runs, and `start` has the
//! steps of a mount in their order: it opens the device, [`daemon`] forks, [`session`] mounts, and [`serve`] runs until the
//! unmount. [`status`] is the socket at which a daemon answers how it does. [`umount`] unmounts, finds the daemon by its [`record`], and waits until the daemon has closed the device
//! ([`release`]).

pub mod argv;
pub mod daemon;
mod fusermount;
pub mod helper;
pub mod logging;
pub mod namespace;
pub mod options;
pub mod point;
pub mod record;
pub mod release;
mod resources;
pub mod serve;
pub mod session;
mod signals;
mod start;
pub mod status;
pub mod umount;
pub mod words;
