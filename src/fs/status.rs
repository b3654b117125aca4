//! What a mount does now: its open files, its memory, and which answers are data because something failed.

use std::ffi::OsString;

use log::info;

use super::FileSystem;
use crate::error::shown;
use crate::handle::{DenseLayer, HandleState};
use crate::units::Bytes;

/// The state of a mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The number of open files.
    pub open_files: u64,
    /// The memory of all loaded extents.
    pub map_memory: Bytes,
    /// The limit of that memory.
    pub map_limit: Bytes,
    /// The memory of what is fetched ahead of readers.
    pub read_ahead: Bytes,
    /// The number of names that the kernel knows.
    pub names: u64,
    /// The files that are open, in the order of their names.
    pub files: Vec<FileStatus>,
}

/// The state of one file that is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStatus {
    /// Its path below the mountpoint; on a mountpoint that is a file, the name of the device or image.
    pub name: OsString,
    /// How often it is open.
    pub opens: u64,
    /// The memory of its loaded extents.
    pub map_memory: Bytes,
    /// Its layers that are all data, or whose last answer was data because something failed.
    pub dense: Vec<DenseLayer>,
}

impl FileSystem {
    /// The state of the mount now. It waits for no device and for no server.
    pub fn status(&self) -> Status {
        let open_files = self.open.len() as u64;
        // All of it under the lock: a handle that is kept beyond it would keep a device open after its last close. A stack that
        // was replaced in between is dropped after the lock: a device that hangs must not block the opens of others.
        let mut replaced = Vec::new();
        let devices = self.lock_devices();
        let mut files: Vec<_> = devices
            .by_ino
            .iter()
            .map(|(ino, device)| {
                let (HandleState { map_memory, dense }, old) = device.handle.state();
                replaced.push(old);
                let name = self.nodes.path(*ino).map_or_else(|_| OsString::new(), OsString::from);
                FileStatus { name, opens: device.opens as u64, map_memory, dense }
            })
            .collect();
        drop(devices);
        drop(replaced);
        files.sort_by(|one, other| one.name.cmp(&other.name));
        Status {
            open_files,
            map_memory: self.maps.used(),
            map_limit: self.maps.limit(),
            read_ahead: Bytes::new(self.ahead.memory() as u64),
            names: self.nodes.len() as u64,
            files,
        }
    }

    /// Logs the state of the mount.
    pub fn log_counters(&self) {
        let Status { open_files, map_memory, read_ahead, names, files, .. } = self.status();
        info!(
            "{open_files} open files on {} devices, maps of {map_memory} bytes, {read_ahead} bytes of read-ahead, {names} names",
            files.len()
        );
        for file in &files {
            info!("{}: {} opens", shown(&file.name), file.opens);
            for dense in &file.dense {
                info!("{}: {}: {}", shown(&file.name), dense.layer, dense.reason);
            }
        }
    }
}

#[cfg(test)]
mod tests;
