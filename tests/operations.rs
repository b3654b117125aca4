//! Every operation on a file of a mount has the same result as on a read-only ext4.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "a table of system calls: paths are C strings that live through the call, and nothing is written to memory \
              but where a comment says so"
)]

mod common;

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};

use common::image::Image;
use common::loop_device::Loop;
use common::mount::Mount;
use common::{MIB, needs, run, try_run, wait_until};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

/// The result of a system call.
type Answer = Result<i64, Errno>;

/// A file in a directory, on either file system.
struct Place {
    directory: PathBuf,
    file: PathBuf,
}

impl Place {
    fn new(directory: &Path, file: &Path) -> Self {
        Self { directory: directory.to_owned(), file: file.to_owned() }
    }

    fn file(&self) -> CString {
        CString::new(self.file.as_os_str().as_bytes()).expect("no zero byte")
    }

    /// An entry of the directory that does not exist.
    fn new_entry(&self) -> CString {
        CString::new(self.directory.join("new").as_os_str().as_bytes()).expect("no zero byte")
    }

    fn directory(&self) -> CString {
        CString::new(self.directory.as_os_str().as_bytes()).expect("no zero byte")
    }

    fn open(&self) -> File {
        File::open(&self.file).expect("the file opens for reading")
    }
}

fn answer(result: impl Into<i64>) -> Answer {
    match result.into() {
        -1 => Err(Errno::last()),
        result => Ok(result),
    }
}

fn opened(path: &CString, flags: i32) -> Answer {
    // SAFETY: the path is a C string; the descriptor is closed once.
    unsafe {
        let descriptor = libc::open(path.as_ptr(), flags | libc::O_CLOEXEC, 0o600);
        let result = answer(descriptor).map(|_| 0);
        libc::close(descriptor);
        result
    }
}

fn attribute(place: &Place, name: &str) -> Answer {
    let name = CString::new(name).expect("no zero byte");
    // SAFETY: both are C strings, and nothing is written for a length of 0.
    answer(unsafe { libc::lgetxattr(place.file().as_ptr(), name.as_ptr(), null_mut(), 0) } as i64)
}

/// Issues an ioctl that returns one number.
fn ioctl(place: &Place, command: libc::Ioctl) -> Answer {
    let (file, mut number) = (place.open(), 0_u64);
    // SAFETY: the number has room for what the commands of this test write.
    answer(unsafe { libc::ioctl(file.as_raw_fd(), command, &raw mut number) })
}

fn lock(place: &Place, kind: libc::c_int) -> Answer {
    let file = place.open();
    let lock = libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the kernel reads one `struct flock` through the pointer.
    answer(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
}

fn mapped(place: &Place, flags: i32) -> Answer {
    let file = place.open();
    // SAFETY: a new mapping, which only this function reads, and which is taken away again.
    unsafe {
        let at = libc::mmap(null_mut(), 4096, libc::PROT_READ, flags, file.as_raw_fd(), 0);
        if at == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let byte = at.cast::<u8>().read_volatile();
        libc::munmap(at, 4096);
        Ok(i64::from(byte != 0))
    }
}

type Call = fn(&Place) -> Answer;

/// Operations that change something and fail with EROFS, and whether the kernel sends them to the daemon if the mount
/// is writable.
const CHANGES: [(&str, bool, Call); 17] = [
    ("open for writing", true, |place| opened(&place.file(), libc::O_WRONLY)),
    ("open for both", true, |place| opened(&place.file(), libc::O_RDWR)),
    ("open and cut", true, |place| opened(&place.file(), libc::O_WRONLY | libc::O_TRUNC)),
    ("create", true, |place| opened(&place.new_entry(), libc::O_CREAT | libc::O_RDWR)),
    ("O_TMPFILE", false, |place| opened(&place.directory(), libc::O_TMPFILE | libc::O_RDWR)),
    ("mkdir", true, |place| answer(unsafe { libc::mkdir(place.new_entry().as_ptr(), 0o700) })),
    ("mkfifo", true, |place| answer(unsafe { libc::mkfifo(place.new_entry().as_ptr(), 0o600) })),
    ("unlink", true, |place| answer(unsafe { libc::unlink(place.file().as_ptr()) })),
    ("symlink", true, |place| answer(unsafe { libc::symlink(c"x".as_ptr(), place.new_entry().as_ptr()) })),
    ("link", true, |place| answer(unsafe { libc::link(place.file().as_ptr(), place.new_entry().as_ptr()) })),
    ("rename", true, |place| answer(unsafe { libc::rename(place.file().as_ptr(), place.new_entry().as_ptr()) })),
    ("truncate", true, |place| answer(unsafe { libc::truncate(place.file().as_ptr(), 0) })),
    ("chmod", true, |place| answer(unsafe { libc::chmod(place.file().as_ptr(), 0o600) })),
    ("chown", true, |place| answer(unsafe { libc::chown(place.file().as_ptr(), 1, 1) })),
    ("utimensat", true, |place| answer(unsafe { libc::utimensat(libc::AT_FDCWD, place.file().as_ptr(), null(), 0) })),
    ("setxattr", true, |place| {
        answer(unsafe { libc::lsetxattr(place.file().as_ptr(), c"user.x".as_ptr(), null(), 0, 0) })
    }),
    ("removexattr", true, |place| answer(unsafe { libc::lremovexattr(place.file().as_ptr(), c"user.x".as_ptr()) })),
];

/// Operations that change nothing.
const QUERIES: [(&str, Call); 40] = [
    ("access to read", |place| answer(unsafe { libc::access(place.file().as_ptr(), libc::R_OK) })),
    ("access to write", |place| answer(unsafe { libc::access(place.file().as_ptr(), libc::W_OK) })),
    ("access to execute", |place| answer(unsafe { libc::access(place.file().as_ptr(), libc::X_OK) })),
    ("no such name", |place| opened(&place.new_entry(), libc::O_RDONLY)),
    ("a name that is too long", |place| {
        let name = place.directory.join("x".repeat(256));
        opened(&CString::new(name.as_os_str().as_bytes()).expect("no zero byte"), libc::O_RDONLY)
    }),
    ("a name below a file", |place| {
        let name = place.file.join("x");
        opened(&CString::new(name.as_os_str().as_bytes()).expect("no zero byte"), libc::O_RDONLY)
    }),
    ("the file as a directory", |place| opened(&place.file(), libc::O_RDONLY | libc::O_DIRECTORY)),
    ("the directory for writing", |place| opened(&place.directory(), libc::O_RDWR)),
    ("O_PATH", |place| opened(&place.file(), libc::O_PATH)),
    ("O_DIRECT", |place| opened(&place.file(), libc::O_RDONLY | libc::O_DIRECT)),
    ("O_NOATIME", |place| opened(&place.file(), libc::O_RDONLY | libc::O_NOATIME)),
    ("readlink", |place| answer(unsafe { libc::readlink(place.file().as_ptr(), [0; 8].as_mut_ptr(), 8) } as i64)),
    ("rmdir of the file", |place| match answer(unsafe { libc::rmdir(place.file().as_ptr()) }) {
        // The order of the two checks depends on the kernel.
        Err(Errno::EROFS | Errno::ENOTDIR) => Ok(0),
        other => other,
    }),
    ("getxattr user.x", |place| attribute(place, "user.x")),
    ("getxattr trusted.x", |place| attribute(place, "trusted.x")),
    ("getxattr security.capability", |place| attribute(place, "security.capability")),
    ("getxattr system.posix_acl_access", |place| attribute(place, "system.posix_acl_access")),
    ("getxattr system.nfs4_acl", |place| attribute(place, "system.nfs4_acl")),
    ("getxattr of no namespace", |place| attribute(place, "nothing.x")),
    ("listxattr", |place| answer(unsafe { libc::listxattr(place.file().as_ptr(), null_mut(), 0) } as i64)),
    ("llistxattr", |place| answer(unsafe { libc::llistxattr(place.file().as_ptr(), null_mut(), 0) } as i64)),
    ("llistxattr into a buffer", |place| {
        let mut list = [0; 64];
        answer(unsafe { libc::llistxattr(place.file().as_ptr(), list.as_mut_ptr(), list.len()) } as i64)
    }),
    ("flistxattr", |place| answer(unsafe { libc::flistxattr(place.open().as_raw_fd(), null_mut(), 0) } as i64)),
    ("listxattr of the directory", |place| {
        answer(unsafe { libc::llistxattr(place.directory().as_ptr(), null_mut(), 0) } as i64)
    }),
    ("TCGETS", |place| {
        let mut settings = [0_u8; 256];
        // SAFETY: `struct termios` is smaller.
        answer(unsafe { libc::ioctl(place.open().as_raw_fd(), libc::TCGETS, settings.as_mut_ptr()) })
    }),
    ("BLKGETSIZE64", |place| ioctl(place, 0x8008_1272)),
    ("BLKROGET", |place| ioctl(place, 0x125e)),
    ("FIGETBSZ", |place| ioctl(place, 2)),
    ("write", |place| answer(unsafe { libc::write(place.open().as_raw_fd(), c"x".as_ptr().cast(), 1) } as i64)),
    ("ftruncate", |place| answer(unsafe { libc::ftruncate(place.open().as_raw_fd(), 0) })),
    ("fallocate", |place| answer(unsafe { libc::fallocate(place.open().as_raw_fd(), 0, 0, 4096) })),
    ("copy_file_range", |place| {
        let (from, to) = (place.open(), place.open());
        let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
        answer(unsafe { libc::copy_file_range(from, null_mut(), to, null_mut(), 4096, 0) } as i64)
    }),
    ("flock", |place| answer(unsafe { libc::flock(place.open().as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) })),
    ("a lock for reading", |place| lock(place, libc::F_RDLCK)),
    ("a lock for writing", |place| lock(place, libc::F_WRLCK)),
    ("fsync", |place| answer(unsafe { libc::fsync(place.open().as_raw_fd()) })),
    ("fsync of the directory", |place| {
        let directory = File::open(&place.directory).expect("the directory opens");
        answer(unsafe { libc::fsync(directory.as_raw_fd()) })
    }),
    ("poll", |place| {
        let file = place.open();
        let mut asked = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN | libc::POLLOUT, revents: 0 };
        // SAFETY: one `struct pollfd` is read and written.
        answer(unsafe { libc::poll(&raw mut asked, 1, 1000) }).map(|_| i64::from(asked.revents))
    }),
    ("mmap, private", |place| mapped(place, libc::MAP_PRIVATE)),
    ("mmap, shared", |place| mapped(place, libc::MAP_SHARED)),
];

fn remount(directory: &Path, flags: MsFlags) {
    mount(None::<&str>, directory, None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>).expect("root may remount");
}

#[test]
fn every_operation_answers_as_on_a_read_only_ext4() {
    needs!(root, programs["mkfs.ext4"]);
    let image = Image::new(16 * MIB);
    run("mkfs.ext4", ["-q".as_ref(), image.path().as_os_str()]);
    let disk = Loop::new(image.path());
    let directory = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    run("mount", [disk.path(), directory.path()]);
    let model = Place::new(directory.path(), &directory.path().join("file"));
    fs::write(&model.file, vec![1; 64 << 10]).expect("room for it");
    let hardened = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    remount(directory.path(), hardened);

    let shown = Image::with_data(64 << 10, &[0..64 << 10]);
    let device = Loop::new(shown.path());
    let mount = Mount::new(device.path());
    let place = Place::new(mount.directory(), mount.file());
    let mut wrong = Vec::new();
    let changes = CHANGES.iter().map(|(name, _, operation)| (name, operation));
    for (name, operation) in changes.chain(QUERIES.iter().map(|(name, operation)| (name, operation))) {
        let (ours, theirs) = (operation(&place), operation(&model));
        if ours != theirs {
            wrong.push(format!("{name}: {ours:?} for {theirs:?}"));
        }
    }
    run("umount", [directory.path()]);

    // On a writable mount, the kernel sends these operations to the daemon.
    remount(mount.directory(), MsFlags::empty());
    for (name, _, operation) in CHANGES.iter().filter(|(_, asks_daemon, _)| *asks_daemon) {
        let ours = operation(&place);
        if ours != Err(Errno::EROFS) {
            wrong.push(format!("{name}, mounted for writing: {ours:?}"));
        }
    }
    remount(mount.directory(), MsFlags::MS_RDONLY);
    assert!(wrong.is_empty(), "{wrong:#?}");
    let log = mount.log();
    assert!(!log.contains("Not Implemented") && !log.contains("WARN"), "{log}");
}

/// The pages of a mapping are no older than the open. Mappings work with `direct_io` if the kernel supports both.
#[test]
fn mmap_shows_no_bytes_older_than_the_open() {
    needs!(root);
    let release = nix::sys::utsname::uname().expect("a kernel").release().to_owned();
    let mut numbers = release.to_str().expect("text").split('.').map_while(|part| part.parse::<u32>().ok());
    let has_both = (numbers.next(), numbers.next()) >= (Some(6), Some(6));
    for options in [&[][..], &["-o", "direct_io"]] {
        let image = Image::new(64 << 10);
        let device = Loop::new(image.path());
        let mount = Mount::with_options(device.path(), options);
        let place = Place::new(mount.directory(), mount.file());
        if options.is_empty() || has_both {
            assert_eq!(mapped(&place, libc::MAP_SHARED), Ok(0));
            // The pages of the mapping are still in the page cache, and the file is still open elsewhere.
            let _held = place.open();
            common::image::write(device.path(), 0..4096);
            assert_eq!(mapped(&place, libc::MAP_SHARED), Ok(1), "{options:?}");
        }
        assert_eq!(mapped(&place, libc::MAP_PRIVATE), Ok(1), "{options:?}");
    }
}

/// `df` reports the total size of the shown devices, counts each device once, and reports no free space. No device is
/// opened for it.
#[test]
fn df_counts_each_device_once_and_opens_none() {
    needs!(root);
    let df = |directory: &Path| {
        let words = ["--block-size=1", "--output=size,used,avail,itotal", directory.to_str().expect("text")];
        let printed = run("df", words);
        printed.lines().nth(1).expect("two lines").split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let image = Image::new(3 * MIB);
    let device = Loop::new(image.path());
    let expected = (3 * MIB).to_string();
    for spec in [image.path(), device.path()] {
        assert_eq!(df(Mount::new(spec).directory()), [&*expected, &expected, "0", "2"], "{spec:?}");
    }
    let other_image = Image::new(MIB);
    let other = Loop::new(other_image.path());
    let nodes = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    fs::create_dir(nodes.path().join("below")).expect("the directory is ours");
    for (device, name) in [(&device, "one"), (&device, "below/one-again"), (&other, "below/two")] {
        std::os::unix::fs::symlink(device.path(), nodes.path().join(name)).expect("the directory is ours");
    }
    let mount = Mount::new(nodes.path());
    let expected = (4 * MIB).to_string();
    assert_eq!(df(mount.directory()), [&*expected, &expected, "0", "5"]);
}

/// The daemon drops names that are removed or unused when the kernel drops the inodes. Inode numbers stay the same.
#[test]
fn names_are_dropped_with_the_inodes_of_the_kernel() {
    use std::os::unix::fs::MetadataExt as _;
    needs!(root);
    const NAMES: usize = 2000;
    let image = Image::new(MIB);
    let device = Loop::new(image.path());
    let nodes = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    let mount = Mount::new(nodes.path());
    let link = |n: usize| nodes.path().join(format!("name-{n}-{}", "x".repeat(200)));
    let shown = |n: usize| mount.directory().join(link(n).file_name().expect("a name"));
    let number = |n: usize| fs::metadata(shown(n)).expect("the name is shown").ino();
    for n in 0..NAMES {
        std::os::unix::fs::symlink(device.path(), link(n)).expect("the directory is ours");
    }
    let listed = fs::read_dir(mount.directory()).expect("readdir").count();
    let before = [number(0), number(1)];
    assert_eq!(listed, NAMES);
    assert_eq!(names(&mount), 2, "a listing is no lookup");
    (0..NAMES).for_each(|n| assert_ne!(number(n), 0));
    assert!(names(&mount) >= NAMES / 2);
    let held = File::open(shown(0)).expect("it opens");
    (1..NAMES).for_each(|n| fs::remove_file(link(n)).expect("the link is ours"));
    let few = wait_until(|| {
        fs::write("/proc/sys/vm/drop_caches", "2").expect("root may drop caches");
        names(&mount) <= 2
    });
    assert!(few, "{} names", names(&mount));
    assert_eq!(held.metadata().expect("it is open").ino(), before[0], "the inode of an open file stays");
    drop(held);
    std::os::unix::fs::symlink(device.path(), link(1)).expect("the directory is ours");
    assert_eq!([number(0), number(1)], before);
}

/// The number of names that the daemon keeps, from its log.
fn names(mount: &Mount) -> usize {
    let lines = || mount.log().lines().filter(|line| line.ends_with(" names")).map(str::to_owned).collect::<Vec<_>>();
    let before = lines().len();
    run("kill", ["-USR1", &mount.pid().to_string()]);
    assert!(wait_until(|| lines().len() > before));
    let last = lines().pop().expect("a line");
    last.rsplit(' ').nth(1).and_then(|word| word.parse().ok()).expect("a number")
}

/// bsdtar sizes its buffers by statfs(2), which it calls for each file.
#[test]
fn bsdtar_copies_many_devices() {
    needs!(root, programs["bsdtar"]);
    let image = Image::with_data(MIB, &[0..4096]);
    let device = Loop::new(image.path());
    let nodes = tempfile::Builder::new().prefix("blkholefs-").tempdir().expect("a temporary directory");
    for n in 0..50 {
        std::os::unix::fs::symlink(device.path(), nodes.path().join(n.to_string())).expect("the directory is ours");
    }
    let mount = Mount::new(nodes.path());
    let archive = nodes.path().join("archive");
    let words = ["-cf", archive.to_str().expect("text"), "-C", mount.directory().to_str().expect("text"), "."];
    let made = try_run("bsdtar", words, "");
    assert!(made.is_ok(), "{made:?}");
    assert!(fs::metadata(&archive).expect("it was made").len() < 2 * MIB);
}
