//! The connection that a device of the kernel's NBD client had when it was mounted, and whether it may have another one.
//!
//! The user names the export that the device is connected to at that moment. Nothing else says which export a device
//! has. So as soon as the device may be connected to another one, nothing is known of its holes any more, for the rest of
//! the mount.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::plain;
use crate::source::{BlockDevice, Guard};
use crate::sys::device::DeviceId;
use crate::sys::kmsg::KernelLog;
use crate::sys::sysfs::ConnectionFile;

/// One connection of one device.
///
/// Two kinds of evidence end it, and neither can return to an earlier state: its `pid` attribute was removed, or the
/// kernel's log has a message about the device. The driver prints one when a socket fails, is shut down, or is replaced
/// (`nbd_read_reply`, `sock_shutdown`, `nbd_disconnect` and `nbd_genl_reconfigure` of `drivers/block/nbd.c`), and none in the
/// ordinary course of reads and writes.
#[derive(Debug)]
pub(super) struct KernelConnection {
    name: String,
    device: DeviceId,
    attribute: ConnectionFile,
    log: KernelLog,
    /// One reader of the log at a time: what one takes another does not see.
    reading: Mutex<()>,
    lost: OnceLock<String>,
}

impl KernelConnection {
    /// Takes note of the connection that an open device has now.
    ///
    /// # Errors
    /// Why its end could not be seen, or that there is none.
    pub(super) fn new(device: &BlockDevice) -> Result<Self, String> {
        // The log first: what happens from here on is in it.
        let log = KernelLog::from_now().map_err(|error| {
            format!("cannot follow the kernel's log, to see when it is connected anew: {}", plain(&error))
        })?;
        let attribute = ConnectionFile::open(device.id).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => "it was not connected when it was mounted: mount it again".to_owned(),
            _ => format!("cannot tell when it is connected anew: {}", plain(&error)),
        })?;
        let (reading, lost) = (Mutex::default(), OnceLock::new());
        Ok(Self { name: device.name(), device: device.id, attribute, log, reading, lost })
    }

    /// Why the device may have another connection by now; `None` while it has the same one for certain.
    pub(super) fn lost(&self) -> Option<&str> {
        if self.lost.get().is_none() {
            let _one_at_a_time = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(why) = self.look() {
                self.lost.get_or_init(|| {
                    let why = format!("{why}: it may have another export now; mount it again if it has not");
                    log::warn!("{}: no holes from now on: {why}", self.name);
                    why
                });
            }
        }
        self.lost.get().map(String::as_str)
    }

    fn look(&self) -> Option<String> {
        if !self.attribute.exists() {
            return Some("it was disconnected after it was mounted".to_owned());
        }
        match self.log.next_message_about(self.device) {
            Ok(None) => None,
            Ok(Some(message)) => Some(format!("the kernel said \"{message}\"")),
            Err(error) => Some(format!("cannot follow the kernel's log: {}", plain(&error))),
        }
    }

    /// Follows the log as it is written, so that no message is overwritten before it was seen.
    pub(super) fn watch(self: &Arc<Self>) {
        let link = self.clone();
        let watcher = thread::Builder::new()
            .name("nbd link".to_owned())
            .spawn(move || while link.lost().is_none() && link.wait() {});
        if let Err(error) = watcher {
            log::warn!("{}: cannot start a thread, the kernel's log is read at each question only: {error}", self.name);
        }
    }

    /// Waits for the next message; false when that is impossible.
    fn wait(&self) -> bool {
        let mut log = [PollFd::new(self.log.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut log, PollTimeout::NONE), Ok(_) | Err(Errno::EINTR))
    }
}

/// Holds a device to the connection that it had when it was mounted.
pub(super) struct KernelConnectionGuard(pub(super) Arc<KernelConnection>);

impl Guard for KernelConnectionGuard {
    fn unchanged(&self) -> bool {
        self.0.lost().is_none()
    }
}
