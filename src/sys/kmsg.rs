//! The log of the kernel (`Documentation/ABI/testing/dev-kmsg`).

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::device::DeviceId;

/// The largest size of a record in bytes: `PRINTK_MESSAGE_MAX` of `kernel/printk/internal.h`, `CONSOLE_EXT_LOG_MAX` before Linux 6.4.
const LONGEST: usize = 8192;

/// A nonblocking reader of `/dev/kmsg`.
///
/// The kernel stores a message before the function that prints it returns. So if a driver prints a message and then does
/// something, the message can be read as soon as the effect can be observed.
#[derive(Debug)]
pub struct KernelLog(File);

impl KernelLog {
    /// A reader of the messages that are logged from now on.
    ///
    /// # Errors
    /// As open(2): EPERM without the permission to read the log (`kernel.dmesg_restrict`).
    pub fn from_now() -> io::Result<Self> {
        let mut file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// Reads up to the next message about `device`, and returns it. `None` if there is none so far.
    ///
    /// # Errors
    /// As read(2): EPIPE if messages were overwritten before they were read.
    pub fn next_message_about(&self, device: DeviceId) -> io::Result<Option<String>> {
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

/// The message of a record, if the kernel printed it about the block device `device`.
///
/// A record is `PRIORITY,SEQUENCE,TIME,FLAGS;MESSAGE`, followed by lines of ` KEY=VALUE`. `dev_printk` adds the key `DEVICE`
/// (`set_dev_info` of `drivers/base/core.c`). The bits of the priority from bit 3 on are the facility, which is zero only for
/// messages of the kernel.
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
    fn only_messages_of_the_kernel_about_the_device_count() {
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
