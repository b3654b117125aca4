//! What the daemon asks of the kernel about itself: fork, descriptors, capabilities, another process's end.
#![allow(unsafe_code)]

use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use nix::unistd::{ForkResult, Pid};

/// Which side of a fork this is.
pub enum Fork {
    /// The caller, with the id of the new process.
    Parent(Pid),
    /// The new process.
    Child,
}

/// Splits this process in two.
///
/// # Errors
/// When the process has more than one thread (the others would not exist in the child, and what they had locked would
/// stay locked), or when the kernel refuses.
pub fn fork() -> io::Result<Fork> {
    // A thread that was joined may be listed for a moment longer.
    let mut looks = 100;
    while fs::read_dir("/proc/self/task")?.count() != 1 {
        looks -= 1;
        if looks == 0 {
            return Err(io::Error::other("more than one thread runs"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // SAFETY: there is one thread, so no lock of the allocator or of this program can be held by a thread that the
    // child lacks; the child may do all that the parent may.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Fork::Parent(child)),
        ForkResult::Child => Ok(Fork::Child),
    }
}

/// Closes every descriptor from 3 on, so that a daemon does not hold what its caller forgot to close (a lock of a
/// backup script, the pipe of a shell). For the first line of a program only: nothing may have been opened yet.
///
/// A kernel older than 5.9 lacks the call, and the descriptors stay.
pub fn close_inherited_descriptors() {
    // SAFETY: close_range(2) takes three integers. By the contract above, no descriptor from 3 on has an owner in
    // this process.
    unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32) };
}

/// Raises the number of descriptors that this process may have to the most that it is allowed.
///
/// # Errors
/// As getrlimit(2) and setrlimit(2).
pub fn raise_descriptor_limit() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(())
}

/// A descriptor that becomes readable when process `pid` has ended and everything it held is closed (Linux 5.3).
///
/// # Errors
/// ESRCH when there is no such process, ENOSYS on older kernels.
pub fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0_u32) };
    match i32::try_from(fd) {
        // SAFETY: the kernel made this descriptor just now, for this caller alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Receives the one descriptor that a peer sends (`SCM_RIGHTS`, unix(7)), as fusermount3 does.
///
/// # Errors
/// UnexpectedEof when the peer closed its side without sending one.
pub fn receive_descriptor(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0_u8; 1];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(i32);
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let [descriptor] = descriptors[..]
        {
            // SAFETY: the kernel installed this descriptor for this message, and nothing else knows of it.
            return Ok(unsafe { OwnedFd::from_raw_fd(descriptor) });
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// A capability's number (`include/uapi/linux/capability.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability(u32);

impl Capability {
    /// Connect to any Unix socket, whoever's it is: that takes the right to write to it (unix(7)).
    pub const DAC_OVERRIDE: Self = Self(1);
    /// Read any file, whatever its mode: a user's private image.
    pub const DAC_READ_SEARCH: Self = Self(2);
    /// Enter another mount namespace (together with [`Capability::SYS_ADMIN`]).
    pub const SYS_CHROOT: Self = Self(18);
    /// Unmount, and talk to device-mapper.
    pub const SYS_ADMIN: Self = Self(21);
}

/// `struct __user_cap_header_struct` of `include/uapi/linux/capability.h`.
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}
const _: () = assert!(size_of::<CapHeader>() == 8);

/// `struct __user_cap_data_struct` of `include/uapi/linux/capability.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}
const _: () = assert!(size_of::<CapData>() == 12);

/// `_LINUX_CAPABILITY_VERSION_3`: two [`CapData`], low word first.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Gives up every capability of the calling thread that `keep` does not name. Threads that it starts later inherit that.
///
/// # Errors
/// What capget(2) and capset(2) answer.
pub fn keep_capabilities(keep: &[Capability]) -> io::Result<()> {
    let mut header = CapHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: capget(2) fills two data structures for version 3; both pointers are to live, exclusive memory of the
    // sizes asserted above.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    for (word, data) in (0_u32..).zip(data.iter_mut()) {
        let mask = keep.iter().filter(|c| c.0 / 32 == word).fold(0, |mask, c| mask | 1 << (c.0 % 32));
        data.permitted &= mask;
        data.effective &= mask;
        data.inheritable = 0;
    }
    // SAFETY: capset(2) reads the header and two data structures; the pointers are to live memory of those sizes.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) })
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_second_thread_forbids_to_fork() {
        // The test harness runs each test in a thread of its own.
        let held = thread::spawn(thread::park);
        assert!(fork().is_err());
        held.thread().unpark();
        held.join().unwrap();
    }

    #[test]
    fn capabilities_only_shrink() {
        thread::spawn(|| {
            keep_capabilities(&[Capability::SYS_ADMIN]).unwrap();
            let status = fs::read_to_string("/proc/thread-self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("CapPrm:")).unwrap();
            let left = u64::from_str_radix(line["CapPrm:".len()..].trim(), 16).unwrap();
            assert_eq!(left & !(1 << 21), 0, "{line}");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_process_that_ended_has_no_descriptor() {
        assert_eq!(pidfd_open(Pid::from_raw(i32::MAX)).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        assert!(pidfd_open(Pid::this()).is_ok());
    }

    #[test]
    fn a_peer_that_sends_nothing_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(receive_descriptor(&ours).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
