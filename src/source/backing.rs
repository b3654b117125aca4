//! What an exported file is made of: where its bytes are read, and how its stack is resolved.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result};
use crate::source::device::BlockDevice;
use crate::source::file::Reads;
use crate::source::{Context, Stack};
use crate::sys::acl::has_acl;
use crate::sys::block::Readable;
use crate::sys::buffer::AlignedBuffer;
use crate::sys::device::DeviceId;
use crate::sys::{block, device, file};
use crate::units::Bytes;

/// Holes never start or end inside a unit of this size: QEMU aborts on extents that its O_DIRECT cannot address.
pub const MIN_ALIGN: Bytes = Bytes::new(4096);

/// Files shorter than this have no holes. `st_blocks` is not 0, since tar takes that for "nothing to read", and cp looks for
/// holes where it is below the size: one of 512 bytes cannot say both.
const SHORTEST_WITH_HOLES: Bytes = Bytes::new(1024);

/// What can be exported as a file.
pub trait Medium: Send + Sync {
    /// The length now.
    ///
    /// # Errors
    /// When it is gone.
    fn size(&self) -> io::Result<Bytes>;

    /// The unit that holes are rounded to, inwards: a multiple of [`MIN_ALIGN`].
    fn align(&self) -> Bytes;

    /// Reads `size` bytes at `offset`, which are not past the end, through `buffer`; answers where in it they are.
    ///
    /// # Errors
    /// As pread(2).
    fn read(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>>;

    /// The stack below, down to the sources of holes.
    fn resolve(&self, context: &Context) -> Stack;

    /// Owner, permissions and times.
    ///
    /// # Errors
    /// When it is gone.
    fn node(&self) -> io::Result<Node>;

    /// The block device, if it is one.
    fn device(&self) -> Option<&BlockDevice> {
        None
    }

    /// The regular file that this is, byte for byte and whatever happens to it.
    fn regular_file(&self) -> Option<&File> {
        None
    }

    /// Which device or file it is, where more than one can be at its place.
    fn identity(&self) -> Option<Identity> {
        None
    }

    /// Whether what is open is still what an open would find.
    fn is_current(&self) -> bool {
        true
    }
}

/// Which device or file it is, whatever names lead to it. A number is not given to another one while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// A block device. Its node is not asked: it may be made again for the same device.
    Device(DeviceId),
    /// A file or directory.
    Inode {
        /// The file system.
        device: DeviceId,
        /// The file in it.
        number: u64,
    },
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        match metadata.file_type().is_block_device() {
            true => Self::Device(DeviceId::from_dev(metadata.rdev())),
            false => Self::Inode { device: DeviceId::from_dev(metadata.dev()), number: metadata.ino() },
        }
    }
}

/// Whose a file is, and when it changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Which device, file or directory; `None` for what is only ever one.
    pub identity: Option<Identity>,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    /// Of its contents.
    pub mtime: SystemTime,
    /// Of anything.
    pub ctime: SystemTime,
}

impl Node {
    /// What stat(2) says of a file, directory or device node.
    ///
    /// # Errors
    /// As stat(2).
    pub fn at(path: &Path) -> io::Result<Self> {
        path.metadata().map(|metadata| Self::of(&metadata, has_acl(path)))
    }

    /// The same of an open one.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn of_open(file: &File) -> io::Result<Self> {
        file.metadata().map(|metadata| Self::of(&metadata, has_acl(&device::own_path(file))))
    }

    fn of(metadata: &Metadata, has_acl: bool) -> Self {
        // With a list, only the owner's bits still mean what they say: the others may be denied to some.
        let granted = if has_acl { !0o077 } else { !0 };
        Self {
            identity: Some(Identity::of(metadata)),
            uid: metadata.uid(),
            gid: metadata.gid(),
            mode: metadata.mode() & granted,
            mtime: time(metadata.mtime(), metadata.mtime_nsec()),
            ctime: time(metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// A time of stat(2); one before 1970 is taken for 1970.
fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let nanoseconds = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0));
    u64::try_from(seconds)
        .map_or(SystemTime::UNIX_EPOCH, |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) + nanoseconds)
}

/// An open device, image or export.
pub struct Backing {
    name: PathBuf,
    medium: Box<dyn Medium>,
}

impl Backing {
    /// Opens the block device or regular file at `path`, for reading.
    ///
    /// # Errors
    /// When it cannot be opened, or is neither.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |what: &str, error: io::Error| Error::failed(what).on(path).because(error);
        let file = device::open(path, false).map_err(|error| failed("cannot open", error))?;
        let metadata = file.metadata().map_err(|error| failed("cannot stat", error))?;
        if metadata.is_file() {
            let identity = Some(Identity::of(&metadata));
            // Only where reads go to the server, too, are its holes theirs.
            let direct = if file::reads_from_server(&file) { device::reopen_direct(&file).map(Some) } else { Ok(None) };
            let direct = direct.or_else(|error| if is_refusal(&error) { Ok(None) } else { Err(error) });
            let direct = direct.map_err(|error| failed("cannot open with O_DIRECT", error))?;
            return Ok(Self::new(path, Image { file, direct, path: path.to_owned(), identity }));
        }
        if !metadata.file_type().is_block_device() {
            return Err(Error::failed("is neither a block device nor a regular file").on(path));
        }
        let device = BlockDevice::from_file(file, path)?;
        let block = block::logical_block(&device.file).map_err(|error| failed("cannot read the block size", error))?;
        // Every block device takes O_DIRECT. A failure has another cause, such as a limit, and must not lead to reads through
        // the page cache.
        let direct = device::reopen_direct(&device.file).map_err(|error| failed("cannot open with O_DIRECT", error))?;
        Ok(Self::new(path, Device { device, direct, align: block.max(MIN_ALIGN) }))
    }

    /// Takes what can be exported; `name` is what messages call it.
    pub fn new(name: &Path, medium: impl Medium + 'static) -> Self {
        Self { name: name.to_owned(), medium: Box::new(medium) }
    }

    /// What messages call it: the path that it was opened by.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// The block device, if it is one.
    pub fn device(&self) -> Option<&BlockDevice> {
        self.medium.device()
    }

    /// The regular file that this is, byte for byte and whatever happens to it; `None` for anything else.
    pub fn regular_file(&self) -> Option<&File> {
        self.medium.regular_file()
    }

    /// The unit that holes are rounded to, inwards.
    pub fn align(&self) -> Bytes {
        self.medium.align()
    }

    /// The length now.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn len(&self) -> Result<Bytes> {
        self.medium.size().map_err(|error| Error::failed("cannot read the size").on(&self.name).because(error))
    }

    /// Owner, permissions and times.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn node(&self) -> Result<Node> {
        self.medium.node().map_err(|error| Error::failed("cannot stat").on(&self.name).because(error))
    }

    /// Which device or file it is.
    pub fn identity(&self) -> Option<Identity> {
        self.medium.identity()
    }

    /// Whether what is open is still what an open would find, if that is still the same device or file.
    pub fn is_current(&self) -> bool {
        self.medium.is_current()
    }

    /// The stack below, down to the sources of holes.
    pub fn resolve(&self, context: &Context) -> Stack {
        let stack = self.medium.resolve(context);
        if stack.map().len() >= SHORTEST_WITH_HOLES {
            return stack;
        }
        stack.shown_as_data("a file of less than 1024 bytes is shown without holes")
    }

    /// Reads up to `size` bytes at `offset` through `buffer`; shorter only at the end of the device.
    ///
    /// # Errors
    /// When a byte cannot be read, or the device gives less than it has: what is missing is never made up. A FUSE client
    /// sees ENODEV where the device is gone, and EIO for every other cause, whatever the kernel, a file system or a server
    /// calls it.
    pub fn read<'a>(&self, buffer: &'a mut AlignedBuffer, offset: Bytes, size: usize) -> Result<&'a [u8]> {
        match self.read_range(buffer, offset, size) {
            Ok(range) => Ok(&buffer.bytes()[range]),
            Err(error) => Err(error.with_errno(if self.is_gone() { libc::ENODEV } else { libc::EIO })),
        }
    }

    /// Answers where in `buffer` the bytes are.
    fn read_range(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> Result<Range<usize>> {
        let len = self.len()?;
        let left = usize::try_from(len.saturating_sub(offset).get()).unwrap_or(usize::MAX);
        let wanted = size.min(left);
        let failed = |error: io::Error| Error::failed(format!("cannot read at {offset}")).on(&self.name).because(error);
        let range = self.medium.read(buffer, offset, wanted).map_err(failed)?;
        let end = offset.saturating_add(Bytes::new(range.len() as u64));
        // The device may have become shorter meanwhile; then the end has moved, and that is no error.
        if range.len() < wanted && end < self.len()? {
            return Err(failed(io::Error::from_raw_os_error(libc::EIO)));
        }
        Ok(range)
    }

    fn is_gone(&self) -> bool {
        self.medium.size().is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV))
    }
}

/// Whether an open failed because the file system has no direct reads (`do_dentry_open` of `fs/open.c`; FUSE servers answer
/// EOPNOTSUPP, too).
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

/// A regular file, shown as it is.
struct Image {
    file: File,
    /// For reads, where they must pass the page cache by.
    direct: Option<File>,
    path: PathBuf,
    identity: Option<Identity>,
}

impl Medium for Image {
    fn size(&self) -> io::Result<Bytes> {
        self.file.metadata().map(|metadata| Bytes::new(metadata.len()))
    }

    fn align(&self) -> Bytes {
        MIN_ALIGN
    }

    fn read(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
        match &self.direct {
            Some(direct) => file::read_direct(direct, buffer, offset, size, MIN_ALIGN),
            None => file::read_buffered(&self.file, buffer, offset, size),
        }
    }

    fn resolve(&self, context: &Context) -> Stack {
        let reads = if self.direct.is_some() { Reads::Direct } else { Reads::Cached };
        Stack::of_file(&self.file, &self.path, self.size().unwrap_or(Bytes::ZERO), reads, context)
    }

    fn node(&self) -> io::Result<Node> {
        Node::of_open(&self.file)
    }

    fn regular_file(&self) -> Option<&File> {
        // The kernel would read it through its page cache.
        self.direct.is_none().then_some(&self.file)
    }

    fn identity(&self) -> Option<Identity> {
        self.identity
    }
}

/// A block device.
struct Device {
    device: BlockDevice,
    /// For reads: past the device's page cache, which may be older than a table that was loaded since.
    direct: File,
    align: Bytes,
}

impl Medium for Device {
    /// A device that is gone has no length left (`blk_mark_disk_dead` of `block/genhd.c`): a file that is empty at once
    /// would be copied as a short one.
    fn size(&self) -> io::Result<Bytes> {
        match block::len(&self.device.file)? {
            Bytes::ZERO if self.device.len > Bytes::ZERO => Err(io::Error::from_raw_os_error(libc::ENODEV)),
            len => Ok(len),
        }
    }

    fn align(&self) -> Bytes {
        self.align
    }

    fn read(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
        let device = Readable { direct: &self.direct, cached: &self.device.file, len: self.size()?, align: self.align };
        block::read(device, buffer, offset, size)
    }

    fn resolve(&self, context: &Context) -> Stack {
        // The length may have changed since the open.
        let len = self.size().unwrap_or(self.device.len);
        Stack::of_device(&BlockDevice { len, ..self.device.clone() }, context)
    }

    fn node(&self) -> io::Result<Node> {
        Node::of_open(&self.device.file)
    }

    fn device(&self) -> Option<&BlockDevice> {
        Some(&self.device)
    }

    fn identity(&self) -> Option<Identity> {
        Some(Identity::Device(self.device.id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::dense;

    /// A medium that can be read nowhere.
    struct Broken {
        size: std::result::Result<Bytes, i32>,
        read: i32,
    }

    impl Medium for Broken {
        fn size(&self) -> io::Result<Bytes> {
            self.size.map_err(io::Error::from_raw_os_error)
        }

        fn align(&self) -> Bytes {
            MIN_ALIGN
        }

        fn read(&self, _buffer: &mut AlignedBuffer, _offset: Bytes, _size: usize) -> io::Result<Range<usize>> {
            Err(io::Error::from_raw_os_error(self.read))
        }

        fn resolve(&self, context: &Context) -> Stack {
            Stack::build(context, |_| std::sync::Arc::new(dense::layer("broken", "test", MIN_ALIGN, "broken")))
        }

        fn node(&self) -> io::Result<Node> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    #[test]
    fn a_read_error_is_eio_whatever_its_cause_is_called() {
        let read = |size, read| {
            let backing = Backing::new(Path::new("/dev/broken"), Broken { size, read });
            backing.read(&mut AlignedBuffer::new(), Bytes::ZERO, 512).expect_err("it is broken")
        };
        for cause in
            [libc::ENODATA, libc::EREMOTEIO, libc::ETIMEDOUT, libc::EINVAL, libc::EMFILE, libc::EILSEQ, libc::EIO]
        {
            let error = read(Ok(MIN_ALIGN), cause);
            assert_eq!(error.errno(), libc::EIO, "{error}");
            let cause = crate::error::plain(&io::Error::from_raw_os_error(cause));
            assert_eq!(error.to_string(), format!("/dev/broken: cannot read at 0: {cause}"));
        }
        for (size, seen) in [(libc::ENODEV, libc::ENODEV), (libc::ESTALE, libc::EIO), (libc::ENXIO, libc::EIO)] {
            assert_eq!(read(Err(size), libc::EIO).errno(), seen);
        }
    }
}
