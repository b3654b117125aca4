//! Making ranges of files and block devices zero.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use crate::units::Bytes;

mod raw {
    // From include/uapi/linux/fs.h. They take the start and the length of a range, in bytes.
    nix::ioctl_write_ptr_bad!(blkzeroout, nix::request_code_none!(0x12, 127), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
}

/// Makes a range of a file read as zeros by unmapping its blocks, with fallocate(2).
///
/// Of a block device this succeeds only if the device makes zeros itself: `blkdev_fallocate` of `block/fops.c` (`fs/block_dev.c` in
/// Linux 5.10) calls `blkdev_issue_zeroout` with `BLKDEV_ZERO_NOFALLBACK`. The range must begin and end on logical blocks of it.
///
/// # Errors
/// As fallocate(2): `EOPNOTSUPP` where that is not possible.
pub fn punch_hole(file: &File, range: &Range<Bytes>) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let too_big = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let start = i64::try_from(range.start.get()).map_err(too_big)?;
    let len = i64::try_from(range.end.saturating_sub(range.start).get()).map_err(too_big)?;
    loop {
        // SAFETY: the call takes no pointers, and the descriptor stays open during it.
        let code = unsafe { libc::fallocate(file.as_raw_fd(), mode, start, len) };
        if code == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Makes a range of a block device read as zeros: by the device, or else by writing them (`blkdev_issue_zeroout` of
/// `block/blk-lib.c`; in Linux 6.12 and newer only if the device does not have the command, and after no other error). The range
/// must begin and end on logical blocks.
///
/// # Errors
/// As ioctl(2).
pub fn zero_out(device: &File, range: &Range<Bytes>) -> io::Result<()> {
    let range = [range.start.get(), range.end.saturating_sub(range.start).get()];
    // SAFETY: the descriptor stays open during the call, and the kernel reads two u64 through the pointer.
    unsafe { raw::blkzeroout(device.as_raw_fd(), &raw const range) }.map(drop).map_err(io::Error::from)
}

/// Discards a range of a block device. What the range reads as after that depends on the device, which may also ignore the call
/// in part. The range must begin and end on logical blocks.
///
/// # Errors
/// As ioctl(2): `EOPNOTSUPP` if the device takes no discards.
pub fn discard(device: &File, range: &Range<Bytes>) -> io::Result<()> {
    let range = [range.start.get(), range.end.saturating_sub(range.start).get()];
    // SAFETY: the descriptor stays open during the call, and the kernel reads two u64 through the pointer.
    unsafe { raw::blkdiscard(device.as_raw_fd(), &raw const range) }.map(drop).map_err(io::Error::from)
}
