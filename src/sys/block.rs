//! What every block device answers: size, logical block, disk sequence number; and writing back its dirty pages.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::units::Bytes;

mod raw {
    // include/uapi/linux/fs.h; BLKGETSIZE64 is declared with size_t, and is a u64 on every 64-bit kernel.
    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    nix::ioctl_read_bad!(blksszget, libc::BLKSSZGET, libc::c_int);
    nix::ioctl_read!(blkgetdiskseq, 0x12, 128, u64);
}

/// The length of a block device now.
///
/// # Errors
/// As ioctl(2); `ENOTTY` when it is none.
pub fn len(device: &File) -> io::Result<Bytes> {
    let mut bytes = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one u64 through the pointer.
    unsafe { raw::blkgetsize64(device.as_raw_fd(), &raw mut bytes)? };
    Ok(Bytes::new(bytes))
}

/// The logical block size of a block device: the unit of `O_DIRECT` reads.
///
/// # Errors
/// As ioctl(2); `InvalidData` when the kernel names a size that is not positive.
pub fn logical_block(device: &File) -> io::Result<Bytes> {
    let mut size: libc::c_int = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one int through the pointer.
    unsafe { raw::blksszget(device.as_raw_fd(), &raw mut size)? };
    match u64::try_from(size) {
        Ok(size @ 1..) => Ok(Bytes::new(size)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The disk sequence number: a count that never repeats and that a new medium or backing file raises. `None` where the
/// kernel (before 5.15) has none.
///
/// # Errors
/// As ioctl(2), for a device that is gone.
pub fn disk_sequence(device: &File) -> io::Result<Option<u64>> {
    let mut sequence = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one u64 through the pointer.
    match unsafe { raw::blkgetdiskseq(device.as_raw_fd(), &raw mut sequence) } {
        Ok(_) => Ok(Some(sequence)),
        Err(nix::errno::Errno::ENOTTY | nix::errno::Errno::EINVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Writes back the dirty pages of a block device's page cache and waits for them. No flush is sent to the device.
///
/// # Errors
/// As sync_file_range(2): a write that failed is reported here, and then no hole may be claimed.
pub fn write_back(device: &File) -> io::Result<()> {
    let how = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the call takes no pointers; the descriptor is open for its duration. A length of 0 means "to the end".
    match unsafe { libc::sync_file_range(device.as_raw_fd(), 0, 0, how) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
