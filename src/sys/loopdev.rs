//! What a loop device stands on: `LOOP_GET_STATUS64`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::device::DeviceId;
use crate::units::Bytes;

/// `LOOP_GET_STATUS64` of `include/uapi/linux/loop.h`.
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;

/// `LO_FLAGS_DIRECT_IO` of the same header: set exactly while the driver reads its backing file or device with direct I/O.
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Bytes in `struct loop_info64`.
const LOOP_INFO64: usize = 232;

/// A loop device's binding, from `struct loop_info64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LoopStatus {
    /// The file system that holds the backing file.
    pub device: DeviceId,
    /// The backing file's inode there.
    pub inode: u64,
    /// The block device that is the backing "file", if it is one.
    pub block_device: Option<DeviceId>,
    /// Where the loop device begins in the backing file.
    pub offset: Bytes,
    /// Its length limit, 0 for none.
    pub size_limit: Bytes,
    /// Whether it reads its backing file or device with direct I/O, past the page cache of that.
    pub direct_io: bool,
    /// Whether the obsolete in-kernel encryption (kernels before 5.16) stands between.
    pub encrypted: bool,
}

impl LoopStatus {
    /// Asks a loop device for its binding. Needs no more than a descriptor open for reading.
    ///
    /// # Errors
    /// As ioctl(2); `ENXIO` when nothing is bound.
    pub fn of(device: &File) -> io::Result<Self> {
        let mut info = [0_u8; LOOP_INFO64];
        // SAFETY: the kernel writes one loop_info64, 232 bytes, through the pointer, which has room for them.
        let code = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) };
        if code < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self::parse(&info))
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
