//! The kernel's log, followed from some moment on (`Documentation/ABI/testing/dev-kmsg`).

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::device::DeviceId;

/// The longest record: `PRINTK_MESSAGE_MAX` of `kernel/printk/internal.h`, `CONSOLE_EXT_LOG_MAX` before Linux 6.4.
const LONGEST: usize = 8192;

/// A reader of `/dev/kmsg` that waits for nothing.
///
/// The kernel stores a message before the function that prints it returns. So what a driver said of an event is here as
/// soon as what it did afterwards can be seen.
#[derive(Debug)]
pub struct KernelLog(File);

impl KernelLog {
    /// Follows the log from the next message on.
    ///
    /// # Errors
    /// As open(2): EPERM without the right to read the log (`kernel.dmesg_restrict`).
    pub fn from_now() -> io::Result<Self> {
        let mut file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// Takes in what was logged since the last call. The first message about `device` is returned, and what follows it
    /// stays for the next call.
    ///
    /// # Errors
    /// EPIPE when messages were overwritten before they were read; as read(2).
    pub fn news_of(&self, device: DeviceId) -> io::Result<Option<String>> {
        let mut record = [0; LONGEST];
        loop {
            match (&self.0).read(&mut record) {
                Ok(count) => {
                    let text = String::from_utf8_lossy(&record[..count]);
                    if let Some(message) = message_about(&text, device) {
                        return Ok(Some(message.to_owned()));
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for KernelLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The message of a record, if a driver of the kernel printed it for the block device `device`.
///
/// A record is `PRIORITY,SEQUENCE,TIME,FLAGS;MESSAGE`, then lines ` KEY=VALUE`. `dev_printk` adds the key `DEVICE`
/// (`set_dev_info` of `drivers/base/core.c`). Bits from 3 on of the priority are zero for the kernel's own messages.
fn message_about(record: &str, device: DeviceId) -> Option<&str> {
    let (head, body) = record.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    let mut lines = body.lines();
    let message = lines.next()?;
    let is_about = lines.any(|line| line.strip_prefix(" DEVICE=b").is_some_and(|id| id == device.to_string()));
    (priority >> 3 == 0 && is_about).then_some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_kernel_says_of_the_device_counts() {
        let device = DeviceId { major: 43, minor: 0 };
        let record = "6,339,5140900,-;block nbd0: NBD_DISCONNECT\n SUBSYSTEM=block\n DEVICE=b43:0\n";
        assert_eq!(message_about(record, device), Some("block nbd0: NBD_DISCONNECT"));
        for other in [
            "6,339,5140900,-;block nbd0: NBD_DISCONNECT\n SUBSYSTEM=block\n DEVICE=b43:32\n",
            "6,339,5140900,-;block nbd0: NBD_DISCONNECT\n SUBSYSTEM=block\n DEVICE=c43:0\n",
            "6,340,5140900,-;nbd0: detected capacity change from 0 to 8\n",
            "14,341,5140900,-;a program says DEVICE=b43:0\n DEVICE=b43:0\n",
            "6,342,5140900,- DEVICE=b43:0",
            "x,343,0,-;y\n DEVICE=b43:0\n",
            "",
        ] {
            assert_eq!(message_about(other, device), None, "{other}");
        }
    }
}
