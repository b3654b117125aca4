//! SCSI commands to a disk with the `SG_IO` ioctl, version 3 (`include/scsi/sg.h`).
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::time::Duration;

/// `SG_DXFER_FROM_DEV`: the direction of the transfer is from the device to memory.
const FROM_DEVICE: i32 = -3;
/// `interface_id` of version 3.
const VERSION_3: i32 = b'S' as i32;
/// The size of the buffer for sense data in bytes: `SCSI_SENSE_BUFFERSIZE` of `include/scsi/scsi_cmnd.h`.
const SENSE_LEN: usize = 96;
/// `DRIVER_SENSE`: a bit of the driver status that is no error, and means only that there is sense data.
const DRIVER_SENSE: u16 = 0x08;
/// The longest command in bytes that `SG_IO` accepts from a block device: `MAX_COMMAND_SIZE` of `include/scsi/scsi_cmnd.h`.
const CDB_MAX: usize = 16;

/// `struct sg_io_hdr` of `include/scsi/sg.h`.
#[repr(C)]
struct SgIoHdr {
    interface_id: i32,
    dxfer_direction: i32,
    cmd_len: u8,
    mx_sb_len: u8,
    iovec_count: u16,
    dxfer_len: u32,
    dxferp: *mut c_void,
    cmdp: *const u8,
    sbp: *mut u8,
    timeout: u32,
    flags: u32,
    pack_id: i32,
    usr_ptr: *mut c_void,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sb_len_wr: u8,
    host_status: u16,
    driver_status: u16,
    resid: i32,
    duration: u32,
    info: u32,
}

const _: () = assert!(size_of::<SgIoHdr>() == if size_of::<usize>() == 8 { 88 } else { 64 });

mod raw {
    /// `SG_IO` of `include/scsi/sg.h`. The number does not encode the direction and the size of the argument.
    const SG_IO: u16 = 0x2285;
    nix::ioctl_readwrite_bad!(sg_io, SG_IO, super::SgIoHdr);
}

/// The result of a command that reached the device.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// The number of bytes that the device wrote to the start of the buffer.
    pub len: usize,
    /// The SCSI status: 0 is GOOD, 2 is CHECK CONDITION.
    pub status: u8,
    /// The sense data. It is empty if the device returned none.
    pub sense: Vec<u8>,
}

/// Sends the command `cdb` to a disk and reads its data into `data`.
///
/// On a descriptor that is open for reading, the kernel allows only commands that read. `timeout` is rounded up to whole
/// milliseconds. When it expires the kernel aborts the command and may reset the device or the bus, so it should not be
/// short.
///
/// # Errors
/// EINVAL for a command that is too long or a buffer that is too large; as ioctl(2), with ENOTTY for a device that takes no
/// SCSI commands; an error without an errno if the host adapter or its driver failed, or the timeout expired.
pub fn command(disk: BorrowedFd<'_>, cdb: &[u8], data: &mut [u8], timeout: Duration) -> io::Result<Transfer> {
    let unsendable = || io::Error::from_raw_os_error(libc::EINVAL);
    let dxfer_len = u32::try_from(data.len()).map_err(|_| unsendable())?;
    let cmd_len = u8::try_from(cdb.len()).ok().filter(|len| usize::from(*len) <= CDB_MAX).ok_or_else(unsendable)?;
    let timeout = u32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX);
    let mut sense = [0_u8; SENSE_LEN];
    let mut header = SgIoHdr {
        interface_id: VERSION_3,
        dxfer_direction: FROM_DEVICE,
        cmd_len,
        mx_sb_len: SENSE_LEN as u8,
        iovec_count: 0,
        dxfer_len,
        dxferp: data.as_mut_ptr().cast(),
        cmdp: cdb.as_ptr(),
        sbp: sense.as_mut_ptr(),
        timeout,
        flags: 0,
        pack_id: 0,
        usr_ptr: ptr::null_mut(),
        status: 0,
        masked_status: 0,
        msg_status: 0,
        sb_len_wr: 0,
        host_status: 0,
        driver_status: 0,
        resid: 0,
        duration: 0,
        info: 0,
    };
    // SAFETY: the header is a complete sg_io_hdr. Its three pointers are to buffers that live longer than the call, and whose
    // lengths are in the header: the kernel reads cmd_len bytes of the command, and writes at most dxfer_len bytes of data and
    // mx_sb_len bytes of sense data.
    unsafe { raw::sg_io(disk.as_raw_fd(), &raw mut header) }?;
    if header.host_status != 0 || header.driver_status & !DRIVER_SENSE != 0 {
        return Err(io::Error::other(format!(
            "the adapter failed (host status {:#x}, driver status {:#x})",
            header.host_status, header.driver_status
        )));
    }
    // A driver bug can make the residual negative or larger than the buffer. Then no byte counts as transferred.
    let missing = usize::try_from(header.resid).ok().filter(|missing| *missing <= data.len()).unwrap_or(data.len());
    let sense_len = usize::from(header.sb_len_wr).min(SENSE_LEN);
    Ok(Transfer { len: data.len() - missing, status: header.status, sense: sense[..sense_len].to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn what_is_not_a_disk_is_an_error() {
        let null = File::open("/dev/null").unwrap();
        let sent = command(null.as_fd(), &[0; 6], &mut [0; 4], Duration::from_secs(1));
        assert_eq!(sent.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn a_command_that_cannot_be_sent_is_refused() {
        let null = File::open("/dev/null").unwrap();
        let sent = command(null.as_fd(), &[0; 17], &mut [0; 4], Duration::from_secs(1));
        assert_eq!(sent.unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
