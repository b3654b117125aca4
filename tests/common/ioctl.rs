//! Loop ioctls that losetup(8) has no options for (`include/uapi/linux/loop.h`), discards, which are so frequent that a
//! process for each takes much of the time of some tests, and access control lists.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::errno::Errno;

/// Bytes of `struct loop_info64`.
const INFO_SIZE: usize = 232;
/// Where `lo_offset` is in it.
const OFFSET: Range<usize> = 24..32;

nix::ioctl_write_int_bad!(change_fd, 0x4C06);
nix::ioctl_write_int_bad!(ctl_add, 0x4C80);
nix::ioctl_write_int_bad!(ctl_remove, 0x4C81);
nix::ioctl_read_bad!(get_status64, 0x4C05, [u8; INFO_SIZE]);
nix::ioctl_write_ptr_bad!(set_status64, 0x4C04, [u8; INFO_SIZE]);
// BLKDISCARD of `include/uapi/linux/fs.h`: the start and the length in bytes.
nix::ioctl_write_ptr_bad!(blkdiscard, 0x1277, [u64; 2]);

/// Puts another backing file of the same size under a read-only loop device.
pub fn loop_change_fd(device: &Path, backing: &Path) {
    let device = File::open(device).expect("the device opens");
    let backing = File::open(backing).expect("the image opens");
    // SAFETY: LOOP_CHANGE_FD takes a descriptor, and both are open until it returns.
    unsafe { change_fd(device.as_raw_fd(), backing.as_raw_fd()) }.expect("a read-only device and an equal size");
}

/// Moves the start of a loop device inside its backing file.
pub fn loop_set_offset(device: &Path, offset: u64) {
    let device = File::open(device).expect("the device opens");
    let mut info = [0; INFO_SIZE];
    // SAFETY: the kernel writes one loop_info64, which has INFO_SIZE bytes.
    unsafe { get_status64(device.as_raw_fd(), &raw mut info) }.expect("the device is bound");
    info[OFFSET].copy_from_slice(&offset.to_ne_bytes());
    // SAFETY: the kernel reads one loop_info64, which has INFO_SIZE bytes.
    unsafe { set_status64(device.as_raw_fd(), &raw const info) }.expect("an offset inside the file");
}

/// Makes the loop device of this number, unbound; false if there is one already.
pub fn loop_add(number: u32) -> bool {
    let control = File::open("/dev/loop-control").expect("the loop driver is there");
    // SAFETY: LOOP_CTL_ADD takes a number.
    match unsafe { ctl_add(control.as_raw_fd(), number.cast_signed()) } {
        Ok(_) => true,
        Err(Errno::EEXIST) => false,
        Err(error) => panic!("loop device {number}: {error}"),
    }
}

/// Removes an unbound loop device.
pub fn loop_remove(number: u32) {
    let control = File::open("/dev/loop-control").expect("the loop driver is there");
    // SAFETY: LOOP_CTL_REMOVE takes a number.
    unsafe { ctl_remove(control.as_raw_fd(), number.cast_signed()) }.expect("the device is not in use");
}

/// Discards a range of a device.
pub fn discard(device: &File, range: Range<u64>) {
    let start_and_length = [range.start, range.end - range.start];
    // SAFETY: the kernel reads two numbers of 64 bits.
    unsafe { blkdiscard(device.as_raw_fd(), &raw const start_and_length) }
        .unwrap_or_else(|error| panic!("discard of {range:?}: {error}"));
}

/// Gives a file or node an access control list, as the kernel encodes it.
pub fn set_acl(path: &Path, list: &[u8]) {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).expect("a path without NUL");
    // SAFETY: both names end with a NUL, the list has the length that is passed, and all of them outlive the call.
    let code = unsafe {
        libc::setxattr(path.as_ptr(), c"system.posix_acl_access".as_ptr(), list.as_ptr().cast(), list.len(), 0)
    };
    assert_eq!(code, 0, "setxattr: {}", std::io::Error::last_os_error());
}
