//! The backing file of a loop device: `LOOP_GET_STATUS64`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::device::DeviceId;
use crate::units::Bytes;

/// `LOOP_GET_STATUS64` of `include/uapi/linux/loop.h`.
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;

/// `LO_FLAGS_DIRECT_IO` of the same header. It is set while the driver reads the backing file or device with direct I/O, and
/// only then.
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// The loop driver's major number (`Documentation/admin-guide/devices.txt`).
pub const MAJOR: u32 = 7;

/// Bytes in `struct loop_info64`.
const LOOP_INFO64: usize = 232;

/// The configuration of a loop device, from `struct loop_info64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LoopStatus {
    /// The device number of the file system that holds the backing file.
    pub device: DeviceId,
    /// The inode number of the backing file.
    pub inode: u64,
    /// The block device that is used in place of a backing file, if any.
    pub block_device: Option<DeviceId>,
    /// The position in the backing file at which the loop device begins.
    pub offset: Bytes,
    /// The largest length of the loop device. 0 means no limit.
    pub size_limit: Bytes,
    /// Whether the loop device reads the backing file or device with direct I/O, without the page cache.
    pub direct_io: bool,
    /// Whether the loop device decrypts the backing file (obsolete, removed in Linux 5.16).
    pub encrypted: bool,
}

impl LoopStatus {
    /// The configuration of a loop device that is open for reading.
    ///
    /// # Errors
    /// As ioctl(2): `ENXIO` if the loop device has no backing file.
    pub fn of(device: &File) -> io::Result<Self> {
        let mut info = [0_u8; LOOP_INFO64];
        // SAFETY: the kernel writes one loop_info64, which has 232 bytes, through the pointer. The array has the same size.
        let code = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) };
        if code < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self::parse(&info))
    }

    /// The configuration of the open device `id`. `None` if it is no loop device, or has no backing file.
    pub fn of_loop(id: DeviceId, device: &File) -> Option<Self> {
        (id.major == MAJOR).then(|| Self::of(device).ok())?
    }

    fn parse(info: &[u8; LOOP_INFO64]) -> Self {
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&info[at..at + 8]);
            u64::from_ne_bytes(bytes)
        };
        let half = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&info[at..at + 4]);
            u32::from_ne_bytes(bytes)
        };
        let block_device = word(16);
        Self {
            device: DeviceId::from_huge(word(0)),
            inode: word(8),
            block_device: (block_device != 0).then(|| DeviceId::from_huge(block_device)),
            offset: Bytes::new(word(24)),
            size_limit: Bytes::new(word(32)),
            direct_io: half(52) & LO_FLAGS_DIRECT_IO != 0,
            encrypted: half(44) != 0,
        }
    }
}
