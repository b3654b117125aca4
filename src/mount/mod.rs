//! The mount: from mount(8)'s words to a daemon that serves, and back.
//!
//! [`argv`], [`options`] and [`mountinfo`] are pure parsers. [`helper`] is the program that mount(8) runs: it opens and
//! probes the device, then [`daemon`] forks, [`session`] mounts, and [`serve`] runs until the mount is gone.
//! [`umount`] is the other way: it unmounts and waits until the daemon, found by its [`record`], let go of the device
//! ([`release`]).

pub mod argv;
pub mod daemon;
pub mod filesystem;
mod fusermount;
pub mod helper;
pub mod logging;
pub mod mountinfo;
pub mod namespace;
pub mod options;
pub mod point;
pub mod record;
pub mod release;
mod resources;
pub mod serve;
pub mod session;
mod signals;
pub mod umount;
mod words;
