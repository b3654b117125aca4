//! The control device of device-mapper: live tables, status lines and target messages, without libdevmapper.
//!
//! The format of requests and replies is that of `include/uapi/linux/dm-ioctl.h`: a `struct dm_ioctl`, then for each target
//! of a table a `struct dm_target_spec` and its text. Replies are parsed as bytes, so that an offset in a reply cannot lead
//! outside of it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::device::{self, DeviceId};
use crate::units::Sectors;

/// Bytes in `struct dm_ioctl`.
const HEADER: usize = 312;
/// Bytes in `struct dm_target_spec`.
const TARGET_SPEC: usize = 40;
/// Offsets of fields in `struct dm_ioctl`.
mod field {
    pub const VERSION: usize = 0;
    pub const DATA_SIZE: usize = 12;
    pub const DATA_START: usize = 16;
    pub const TARGET_COUNT: usize = 20;
    pub const FLAGS: usize = 28;
    pub const DEV: usize = 40;
    pub const NAME: usize = 48;
    pub const NAME_END: usize = 176;
}
/// The interface version in each request. The kernel refuses another major version and a higher minor version than its own.
/// `DM_NOFLUSH_FLAG` for status exists since version 4.22 (Linux 3.1), `DM_DEV_ARM_POLL` since 4.37 (Linux 4.14). They need
/// no higher version in the request.
const VERSION: [u32; 3] = [4, 0, 0];
const DM_READONLY_FLAG: u32 = 1 << 0;
const DM_SUSPEND_FLAG: u32 = 1 << 1;
const DM_STATUS_TABLE_FLAG: u32 = 1 << 4;
const DM_ACTIVE_PRESENT_FLAG: u32 = 1 << 5;
const DM_BUFFER_FULL_FLAG: u32 = 1 << 8;
const DM_NOFLUSH_FLAG: u32 = 1 << 11;
/// The largest buffer for a reply, in bytes: far above the size of any table in use.
const MAX_BUFFER: usize = 64 << 20;

mod raw {
    const DM_IOCTL: u8 = 0xfd;
    pub const TABLE_STATUS: libc::c_ulong = nix::request_code_readwrite!(DM_IOCTL, 12, super::HEADER);
    pub const TARGET_MSG: libc::c_ulong = nix::request_code_readwrite!(DM_IOCTL, 14, super::HEADER);
    pub const DEV_ARM_POLL: libc::c_ulong = nix::request_code_readwrite!(DM_IOCTL, 16, super::HEADER);
}

/// One target of a table, or its status line.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TableTarget {
    /// The start of the target on the device.
    pub start: Sectors,
    /// The length of the target.
    pub len: Sectors,
    /// The target type, such as `linear` or `thin`.
    pub kind: String,
    /// The arguments of the target, or its status.
    pub params: String,
}

/// The live table of a device, or its status.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Table {
    /// The name that the device was created with.
    pub name: String,
    /// Whether the device is suspended, so that reads and writes block.
    pub suspended: bool,
    /// Whether the table was loaded read-only.
    pub read_only: bool,
    /// The targets, in the order of the kernel's reply.
    pub targets: Vec<TableTarget>,
}

impl Table {
    /// Parses the reply to a `DM_TABLE_STATUS` request. `None` if a field or a target lies outside of the reply.
    pub fn parse(reply: &[u8]) -> Option<Self> {
        let flags = u32_at(reply, field::FLAGS)?;
        let count = u32_at(reply, field::TARGET_COUNT)?;
        let data = reply.get(usize::try_from(u32_at(reply, field::DATA_START)?).ok()?..)?;
        let mut targets = Vec::new();
        let mut at = 0;
        if flags & DM_ACTIVE_PRESENT_FLAG != 0 {
            for _ in 0..count {
                // Offsets are relative to the first target. The slice below is refused unless they ascend, so that the
                // loop ends for any reply, and limits the text of a target to the bytes before the next one.
                let next = usize::try_from(u32_at(data.get(at..)?, 20)?).ok()?;
                let spec = data.get(at..next.min(data.len()))?;
                targets.push(TableTarget {
                    start: Sectors::new(u64_at(spec, 0)?),
                    len: Sectors::new(u64_at(spec, 8)?),
                    kind: text(spec.get(24..TARGET_SPEC)?),
                    params: text(spec.get(TARGET_SPEC..)?),
                });
                at = next;
            }
        }
        Some(Self {
            name: text(reply.get(field::NAME..field::NAME_END)?),
            suspended: flags & DM_SUSPEND_FLAG != 0,
            read_only: flags & DM_READONLY_FLAG != 0,
            targets,
        })
    }
}

/// Whether a status request makes a thin pool commit its metadata first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// The pool commits, so that the status and the metadata on disk include every completed write.
    Yes,
    /// The pool does not commit.
    No,
}

/// A count of device-mapper's global events. It never decreases.
///
/// The kernel raises an event whenever the live table of a device is replaced, while the device is still suspended
/// (`drivers/md/dm.c: dm_swap_table`). Other events are the creation, renaming and removal of a device-mapper device, and
/// events of targets. So while the count is the same, no live table has been replaced. Uevents are not counted: the one of
/// a resume comes after the resume, and most uevents of a host are of no device-mapper device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Events(u64);

/// The open `/dev/mapper/control`. Every request on it requires CAP_SYS_ADMIN.
#[derive(Debug)]
pub struct Control {
    file: File,
    events: Mutex<u64>,
}

impl Control {
    /// Opens the control device.
    ///
    /// # Errors
    /// As open(2).
    pub fn open() -> io::Result<Self> {
        let file = device::open(Path::new("/dev/mapper/control"), false)?;
        Ok(Self { file, events: Mutex::new(0) })
    }

    /// The current count of events.
    ///
    /// # Errors
    /// As poll(2) and ioctl(2).
    pub fn events(&self) -> io::Result<Events> {
        // Locked during both calls. Otherwise, after one thread has armed the file and before it counts the event, a second
        // thread could find no event and return the old count.
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let mut polled = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        // The file is readable if an event has happened since it was opened or armed (`dm_poll`).
        if poll(&mut polled, PollTimeout::ZERO)? > 0 {
            self.call(raw::DEV_ARM_POLL, &mut header(0, HEADER))?;
            // All events up to here increase the count by one.
            *events += 1;
        }
        Ok(Events(*events))
    }

    /// The live table of a device. Does not block if the device is suspended, and does not make a thin pool commit.
    ///
    /// # Errors
    /// As ioctl(2): `ENXIO` if there is no such device-mapper device. `InvalidData` if the reply is malformed.
    pub fn table(&self, id: DeviceId) -> io::Result<Table> {
        self.read(id, DM_STATUS_TABLE_FLAG | DM_NOFLUSH_FLAG)
    }

    /// The status lines of a device's targets. With [`Commit::Yes`] a thin pool commits first.
    ///
    /// # Errors
    /// As [`Control::table`].
    pub fn status(&self, id: DeviceId, commit: Commit) -> io::Result<Table> {
        self.read(id, if commit == Commit::Yes { 0 } else { DM_NOFLUSH_FLAG })
    }

    /// Sends a message to the first target of a device.
    ///
    /// # Errors
    /// As ioctl(2): the error of the target, such as `EBUSY` or `EOPNOTSUPP`.
    pub fn message(&self, id: DeviceId, text: &str) -> io::Result<()> {
        // A `struct dm_target_msg` is the sector, then the text with its NUL. The rest is space for a reply.
        let mut buffer = request(id, 0, HEADER + 8 + text.len() + 1 + 256);
        buffer[HEADER + 8..HEADER + 8 + text.len()].copy_from_slice(text.as_bytes());
        self.call(raw::TARGET_MSG, &mut buffer)
    }

    fn read(&self, id: DeviceId, flags: u32) -> io::Result<Table> {
        // This is enough for the tables of most devices. The kernel allocates a buffer of the same size for each request.
        let mut size = 2 << 10;
        loop {
            let mut buffer = request(id, flags, size);
            self.call(raw::TABLE_STATUS, &mut buffer)?;
            if u32_at(&buffer, field::FLAGS).unwrap_or(0) & DM_BUFFER_FULL_FLAG == 0 {
                return Table::parse(&buffer).ok_or_else(|| io::ErrorKind::InvalidData.into());
            }
            if size >= MAX_BUFFER {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            size *= 4;
        }
    }

    fn call(&self, code: libc::c_ulong, buffer: &mut [u8]) -> io::Result<()> {
        // SAFETY: every buffer is made by `header`, with a length of at least `HEADER`, and has its own length in its field
        // data_size. The kernel reads and writes no more bytes than that.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), code, buffer.as_mut_ptr()) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// A request of `size` bytes for the device `id`.
fn request(id: DeviceId, flags: u32, size: usize) -> Vec<u8> {
    let mut buffer = header(flags, size);
    buffer[field::DEV..field::DEV + 8].copy_from_slice(&id.to_huge().to_ne_bytes());
    buffer
}

/// A request of `size` bytes that names no device.
fn header(flags: u32, size: usize) -> Vec<u8> {
    let mut buffer = vec![0; size];
    let mut put = |at: usize, bytes: &[u8]| buffer[at..at + bytes.len()].copy_from_slice(bytes);
    for (index, number) in VERSION.iter().enumerate() {
        put(field::VERSION + 4 * index, &number.to_ne_bytes());
    }
    put(field::DATA_SIZE, &u32::try_from(size).unwrap_or(u32::MAX).to_ne_bytes());
    put(field::DATA_START, &u32::try_from(HEADER).unwrap_or(u32::MAX).to_ne_bytes());
    put(field::FLAGS, &flags.to_ne_bytes());
    buffer
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes))
}

/// The text up to the first NUL.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(targets: &[(u64, u64, &str, &str)]) -> Vec<u8> {
        let id = DeviceId { major: 254, minor: 3 };
        let mut reply = request(id, DM_ACTIVE_PRESENT_FLAG | DM_SUSPEND_FLAG, HEADER);
        reply[field::NAME..field::NAME + 4].copy_from_slice(b"test");
        reply[field::TARGET_COUNT..field::TARGET_COUNT + 4].copy_from_slice(&(targets.len() as u32).to_ne_bytes());
        for (start, len, kind, params) in targets {
            let mut spec = vec![0; TARGET_SPEC + params.len() + 1];
            spec.resize(spec.len().next_multiple_of(8), 0);
            spec[..8].copy_from_slice(&start.to_ne_bytes());
            spec[8..16].copy_from_slice(&len.to_ne_bytes());
            spec[24..24 + kind.len()].copy_from_slice(kind.as_bytes());
            spec[TARGET_SPEC..TARGET_SPEC + params.len()].copy_from_slice(params.as_bytes());
            let next = (reply.len() - HEADER + spec.len()) as u32;
            spec[20..24].copy_from_slice(&next.to_ne_bytes());
            reply.extend(spec);
        }
        reply
    }

    #[test]
    fn a_table_is_read_target_by_target() {
        let table = Table::parse(&reply(&[(0, 8, "linear", "7:0 16"), (8, 4, "zero", "")])).unwrap();
        assert_eq!(table.name, "test");
        assert!(table.suspended && !table.read_only);
        assert_eq!(table.targets.len(), 2);
        assert_eq!(table.targets[1].start, Sectors::new(8));
        assert_eq!((table.targets[0].kind.as_str(), table.targets[0].params.as_str()), ("linear", "7:0 16"));
        assert_eq!((table.targets[1].kind.as_str(), table.targets[1].params.as_str()), ("zero", ""));
    }

    #[test]
    fn a_reply_out_of_bounds_is_refused() {
        let good = reply(&[(0, 8, "linear", "7:0 16"), (8, 4, "zero", "")]);
        for cut in 0..good.len() {
            // The reply may be valid without some of the padding of its last target. No length may cause a panic.
            let _ = Table::parse(&good[..cut]);
        }
        let mut looping = good.clone();
        looping[HEADER + 20..HEADER + 24].copy_from_slice(&0_u32.to_ne_bytes());
        assert_eq!(Table::parse(&looping), None);
        let mut outside = good.clone();
        outside[field::DATA_START..field::DATA_START + 4].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(Table::parse(&outside), None);
        let mut endless = good;
        endless[field::TARGET_COUNT..field::TARGET_COUNT + 4].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(Table::parse(&endless), None);
    }
}
