//! The connection that a device of the kernel's NBD client had at the mount, and whether the device may have another
//! one.
//!
//! The user names the export that the device is connected to at the mount. The kernel does not report the export of a
//! device. So as soon as the device may be connected to another export, its holes are unknown for the rest of the
//! mount.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::plain;
use crate::reason::DenseReason;
use crate::source::{BlockDevice, Guard};
use crate::sys::device::DeviceId;
use crate::sys::kmsg::KernelLog;
use crate::sys::sysfs::ConnectionFile;

/// One connection of one device.
///
/// It has ended when the device's `pid` attribute was removed, or when the kernel's log has a message about the device.
/// Both are permanent evidence: neither returns to an earlier state. The driver logs when a socket fails, is shut down
/// or is replaced (`nbd_read_reply`, `sock_shutdown`, `nbd_disconnect` and `nbd_genl_reconfigure` of
/// `drivers/block/nbd.c`), and logs nothing for ordinary reads and writes.
#[derive(Debug)]
pub(super) struct KernelConnection {
    name: String,
    device: DeviceId,
    attribute: ConnectionFile,
    log: KernelLog,
    /// Held by the one thread that reads the log: a message is read only once.
    reading: Mutex<()>,
    lost: OnceLock<String>,
}

impl KernelConnection {
    /// The connection that an open device has now.
    ///
    /// # Errors
    /// The reason why its end could not be noticed, or that the device is not connected.
    pub(super) fn new(device: &BlockDevice) -> Result<Self, DenseReason> {
        // The log is opened first, so that it has every message from here on.
        let log = KernelLog::from_now().map_err(|error| {
            DenseReason::cannot("follow the kernel's log, to notice another connection of the device", &error)
        })?;
        let attribute = ConnectionFile::open(device.id).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                DenseReason::State("the device was not connected at the mount: mount it again".into())
            }
            _ => DenseReason::cannot("notice another connection of the device", &error),
        })?;
        let (reading, lost) = (Mutex::default(), OnceLock::new());
        Ok(Self { name: device.name(), device: device.id, attribute, log, reading, lost })
    }

    /// Why the device may have another connection now; `None` while it certainly has the same one.
    pub(super) fn lost(&self) -> Option<&str> {
        if self.lost.get().is_none() {
            let _reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(evidence) = self.evidence() {
                self.lost.get_or_init(|| {
                    let reason = format!("{evidence}: it may have another export now; mount it again if it has not");
                    log::warn!("{}: no holes from now on: {reason}", self.name);
                    reason
                });
            }
        }
        self.lost.get().map(String::as_str)
    }

    /// Evidence that the connection may have ended.
    fn evidence(&self) -> Option<String> {
        if !self.attribute.exists() {
            return Some("it was disconnected after it was mounted".to_owned());
        }
        match self.log.next_message_about(self.device) {
            Ok(None) => None,
            Ok(Some(message)) => Some(format!("the kernel logged \"{message}\"")),
            Err(error) => Some(format!("cannot follow the kernel's log: {}", plain(&error))),
        }
    }

    /// Starts a thread that reads the log as it is written, so that no message is overwritten before it is read.
    pub(super) fn watch(self: &Arc<Self>) {
        let connection = self.clone();
        let watcher = thread::Builder::new()
            .name("nbd kernel log".to_owned())
            .spawn(move || while connection.lost().is_none() && connection.wait() {});
        if let Err(error) = watcher {
            log::warn!("{}: cannot start a thread, the kernel's log is read at each question only: {error}", self.name);
        }
    }

    /// Waits for the next message. Returns false when waiting is impossible.
    fn wait(&self) -> bool {
        let mut log = [PollFd::new(self.log.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut log, PollTimeout::NONE), Ok(_) | Err(Errno::EINTR))
    }
}

/// A stack is unchanged while its NBD device has the connection that it had at the mount.
pub(super) struct KernelConnectionGuard(pub(super) Arc<KernelConnection>);

impl Guard for KernelConnectionGuard {
    fn unchanged(&self) -> bool {
        self.0.lost().is_none()
    }
}
