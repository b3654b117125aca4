//! Processes: fork, inherited and received descriptors, capabilities, and the end of another process.
#![allow(unsafe_code)]

use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use nix::unistd::{ForkResult, Pid, getppid};

/// The name by which a process that uses the library of mount(8) has it in its memory.
const LIBMOUNT: &[u8] = b"/libmount.so";

/// The result of [`fork`], which returns in both processes.
pub enum Fork {
    /// This is the calling process. The new process has this id.
    Parent(Pid),
    /// This is the new process.
    Child,
}

/// Forks this process.
///
/// # Errors
/// If the process has more than one thread, as a lock that another thread holds would stay locked in the child; or as
/// fork(2).
pub fn fork() -> io::Result<Fork> {
    // A thread can stay in the list for a short time after it was joined.
    let mut looks = 100;
    while fs::read_dir("/proc/self/task")?.count() != 1 {
        looks -= 1;
        if looks == 0 {
            return Err(io::Error::other("more than one thread runs"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // SAFETY: this process has one thread. So no lock of the C library or of this program is held by a thread that does not
    // exist in the child, and the child may call any function.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Fork::Parent(child)),
        ForkResult::Child => Ok(Fork::Child),
    }
}

/// Closes all descriptors from 3 on, so that a daemon does not keep files open that its caller happened to have open, such
/// as a lock file of a backup script or the pipe of a shell. Must be called at the start of a program, before it opens
/// anything.
///
/// Linux before 5.9 does not have the call. Then the descriptors stay open.
pub fn close_inherited_descriptors() {
    // SAFETY: close_range(2) takes three integers. The program has opened nothing yet, so that no value in it owns one of the
    // descriptors.
    unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32) };
}

/// What the parent of this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// mount(8), which puts `rw` before the options of each mount that is not `ro`.
    Mount,
    /// A program with the library of mount(8), such as systemd and udisksd, or one of which that cannot be found out: it runs with
    /// other rights than this process, such as sudo(8), or is in another namespace.
    MayBeMount,
    /// Neither of them, such as a shell.
    Other,
}

/// What the parent of this process is.
pub fn parent() -> Parent {
    let parent = PathBuf::from(format!("/proc/{}", getppid()));
    parent_of(fs::read(parent.join("comm")).ok().as_deref(), || fs::read(parent.join("maps")).ok())
}

/// Whether the parent of this process is a shell of mount.fuse3(8), which mount(8) has run.
pub fn is_in_shell_of_mount() -> bool {
    let name = |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let shell = getppid().as_raw();
    let status = fs::read_to_string(format!("/proc/{shell}/status")).unwrap_or_default();
    let above = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok());
    // mount.fuse3 itself becomes the shell.
    name(shell).trim_end() == "sh" && above.is_some_and(|above| name(above).trim_end() == "mount")
}

/// What a process is, by its name and the names of the files in its memory.
fn parent_of(name: Option<&[u8]>, maps: impl FnOnce() -> Option<Vec<u8>>) -> Parent {
    match name.map(<[u8]>::trim_ascii_end) {
        None => Parent::MayBeMount,
        // The maps of a setuid program cannot be read by the user who runs it. A static one has the library in itself.
        Some(b"mount" | b"mount.static") => Parent::Mount,
        Some(_) => match maps() {
            Some(maps) if !maps.windows(LIBMOUNT.len()).any(|part| part == LIBMOUNT) => Parent::Other,
            _ => Parent::MayBeMount,
        },
    }
}

/// Raises the soft limit on the number of descriptors of this process to its hard limit.
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

/// A descriptor that becomes readable when the process `pid` has ended and all of its descriptors are closed (Linux 5.3).
///
/// # Errors
/// ESRCH if there is no such process, ENOSYS on older kernels.
pub fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers and no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0_u32) };
    match i32::try_from(fd) {
        // SAFETY: the call above has opened this descriptor, and no other value owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Receives one descriptor from a peer (`SCM_RIGHTS`, unix(7)), such as fusermount3.
///
/// # Errors
/// As recvmsg(2), and UnexpectedEof if the peer closed the socket without sending a descriptor.
pub fn receive_descriptor(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0_u8; 1];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(i32);
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let [descriptor] = descriptors[..]
        {
            // SAFETY: the kernel has opened this descriptor for this message, and no other value owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(descriptor) });
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// The number of a capability (`include/uapi/linux/capability.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability(u32);

impl Capability {
    /// Write to the files of any user, and connect to their Unix sockets, which requires write permission on them (unix(7)).
    pub const DAC_OVERRIDE: Self = Self(1);
    /// Read any file, such as the private image of another user.
    pub const DAC_READ_SEARCH: Self = Self(2);
    /// Enter another mount namespace (together with [`Capability::SYS_ADMIN`]).
    pub const SYS_CHROOT: Self = Self(18);
    /// Unmount, and use the control device of device-mapper.
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

/// `_LINUX_CAPABILITY_VERSION_3`: the data is two [`CapData`], the first of which holds the capabilities below 32.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Drops all capabilities of the calling thread except those in `keep`. Threads that it starts later do not have the dropped
/// capabilities either.
///
/// # Errors
/// As capget(2) and capset(2).
pub fn keep_capabilities(keep: &[Capability]) -> io::Result<()> {
    let mut header = CapHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: for version 3 capget(2) writes the header and two data structures. Both pointers are to exclusively borrowed
    // memory of the sizes that are asserted above.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    for (word, data) in (0_u32..).zip(data.iter_mut()) {
        let mask = keep.iter().filter(|c| c.0 / 32 == word).fold(0, |mask, c| mask | 1 << (c.0 % 32));
        data.permitted &= mask;
        data.effective &= mask;
        data.inheritable = 0;
    }
    // SAFETY: for version 3 capset(2) reads two data structures, and reads and writes the header. Both pointers are to memory
    // of the sizes that are asserted above, and the header is exclusively borrowed.
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
    fn a_process_with_two_threads_is_not_forked() {
        // The test harness runs each test in a thread of its own.
        let held = thread::spawn(thread::park);
        assert!(fork().is_err());
        held.thread().unpark();
        held.join().unwrap();
    }

    #[test]
    fn capabilities_are_only_dropped() {
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
    fn a_parent_is_known_by_its_name_or_its_library() {
        let maps = |text: &str| Some(text.as_bytes().to_vec());
        assert_eq!(parent_of(Some(b"mount\n"), || None), Parent::Mount);
        assert_eq!(parent_of(Some(b"mount.static\n"), || maps("")), Parent::Mount);
        assert_eq!(parent_of(Some(b"bash\n"), || maps("7f00-7f01 r-xp 0 fd:0 1 /lib/libc.so.6\n")), Parent::Other);
        let library = "7f00-7f01 r-xp 0 fd:0 1 /lib/x86_64-linux-gnu/libmount.so.1.1.0\n";
        assert_eq!(parent_of(Some(b"systemd\n"), || maps(library)), Parent::MayBeMount);
        assert_eq!(parent_of(Some(b"sudo\n"), || None), Parent::MayBeMount);
        assert_eq!(parent_of(None, || maps("")), Parent::MayBeMount);
        // The one of this test is a test runner or a shell.
        assert_ne!(parent(), Parent::Mount);
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
