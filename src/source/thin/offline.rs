//! Volumes of a pool that is not active: read through its mapping trees, without device-mapper.
//!
//! Here the mapping is the device, so the metadata must not change while it is used. A metadata device is held
//! exclusively, which the kernel refuses while a pool is active on it; an image is watched by its [`Stamp`]. Where that
//! proves nothing (a file system with another machine's clock, a clock that was set) the volume is all data.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::SystemTime;

use super::error::ThinError;
use super::lookup::NodeCache;
use super::metadata::Metadata;
use super::reader::MetadataReader;
use super::walk::Tree;
use super::{MetaBlock, ThinId};
use crate::error::{Error, Result};
use crate::map::{Extent, FillMap, HoleMap, Kind};
use crate::source::backing::{MIN_ALIGN, Medium, Node};
use crate::source::dense::Dense;
use crate::source::{Context, Guard, Layer, Stack};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::stamp::{Stamp, later_than_before};
use crate::sys::{block, device, file};
use crate::units::Bytes;

/// Nodes kept for look-ups, of 4 KiB each: all internal nodes of a volume of tens of millions of mappings.
const NODES: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
/// Threads that read a mapping tree.
const WALKERS: usize = 2;
/// A mapping's value: the data block, above 24 bits of time (`unpack_block_time` of `drivers/md/dm-thin-metadata.c`).
const TIME_BITS: u32 = 24;

/// Why a volume can be shown no longer.
const CHANGED: &str = "the metadata changed while it was open";
/// Why a volume has no holes.
const UNPROVEN: &str = "that the metadata image stays as it is cannot be proven: its times are another machine's, or the \
                        clock was set";

/// The metadata and the data of a pool that is not active.
pub struct OfflinePool {
    metadata: Metadata,
    metadata_path: PathBuf,
    watched: File,
    /// Of an image, before anything of it was read; nothing for a device.
    stamp: Option<Stamp>,
    data: Data,
    opened: SystemTime,
}

/// The data of a pool.
struct Data {
    file: File,
    /// For the reads of a device: an active pool writes past its page cache, which lives as long as anybody has it open.
    direct: Option<(File, Bytes)>,
}

impl Data {
    fn open(path: &Path) -> io::Result<Self> {
        let file = device::open(path, false)?;
        let direct = match file.metadata()?.file_type().is_block_device() {
            true => Some((device::reopen_direct(&file)?, block::logical_block(&file)?.max(MIN_ALIGN))),
            false => None,
        };
        Ok(Self { file, direct })
    }

    fn read(&self, part: &mut [u8], position: Bytes) -> io::Result<usize> {
        let Some((direct, align)) = &self.direct else { return file::read_full(&self.file, part, position) };
        let is_whole = |number: u64| Bytes::new(number).align_down(*align).get() == number;
        if is_whole(position.get()) && is_whole(part.len() as u64) && is_whole(part.as_ptr().addr() as u64) {
            return file::read_full(direct, part, position);
        }
        let mut whole = AlignedBuffer::new();
        let range = file::read_direct(direct, &mut whole, position, part.len(), *align)?;
        let bytes = &whole.bytes()[range];
        part[..bytes.len()].copy_from_slice(bytes);
        Ok(bytes.len())
    }
}

/// An offline pool by its paths: opened when it is looked at, shared by all that have it open.
pub struct OfflinePools {
    metadata: PathBuf,
    data: PathBuf,
    open: Mutex<Weak<OfflinePool>>,
}

impl OfflinePools {
    /// The pool with that metadata and data.
    pub fn new(metadata: &Path, data: &Path) -> Self {
        Self { metadata: metadata.to_owned(), data: data.to_owned(), open: Mutex::default() }
    }

    /// The path of the metadata.
    pub fn metadata(&self) -> &Path {
        &self.metadata
    }

    /// The pool as it is now.
    ///
    /// # Errors
    /// As [`OfflinePool::open`].
    pub fn open(&self) -> Result<Arc<OfflinePool>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = open.upgrade().filter(|pool| pool.is_unchanged()) {
            return Ok(pool);
        }
        let pool = Arc::new(OfflinePool::open(&self.metadata, &self.data)?);
        *open = Arc::downgrade(&pool);
        Ok(pool)
    }
}

/// What the pool knows of one of its volumes.
pub struct Found {
    /// The volume.
    pub id: ThinId,
    /// It, or why it cannot be shown.
    pub volume: Result<Volume>,
}

impl OfflinePool {
    /// Opens a pool by its metadata and data, each a device or an image.
    ///
    /// # Errors
    /// When one cannot be opened, the metadata is in use (its pool is active), or is no pool's.
    pub fn open(metadata_path: &Path, data_path: &Path) -> Result<Self> {
        let failed = |path: &Path, error: io::Error| Error::failed("cannot open").on(path).because(error);
        let watched = open_unused(metadata_path).map_err(|error| {
            let busy = error.raw_os_error() == Some(libc::EBUSY);
            let error = failed(metadata_path, error);
            if busy { error.hint("its pool is active: mount its volumes instead") } else { error }
        })?;
        let opened = |error| failed(metadata_path, error);
        let is_image = watched.metadata().map_err(opened)?.is_file();
        let stamp = if is_image { Some(Stamp::settled(&watched).map_err(opened)?) } else { None };
        // What was proven to be unused is what is read, whatever its path leads to by now.
        let reader = MetadataReader::reopen(&watched).map_err(opened)?;
        let metadata = Metadata::open(reader, MetaBlock::SUPERBLOCK)
            .map_err(|error| Error::failed(format!("cannot read thin metadata: {error}")).on(metadata_path))?;
        let data = Data::open(data_path).map_err(|error| failed(data_path, error))?;
        let opened = later_than_before();
        Ok(Self { metadata, metadata_path: metadata_path.to_owned(), watched, stamp, data, opened })
    }

    /// The volumes of the pool, in the order of their ids.
    ///
    /// # Errors
    /// When the tree of volumes is damaged. A volume's own damage is its own.
    pub fn volumes(self: &Arc<Self>) -> Result<Vec<Found>> {
        let devices = self.metadata.devices();
        let devices = devices
            .map_err(|error| Error::failed(format!("cannot list the volumes: {error}")).on(&self.metadata_path))?;
        Ok(devices.into_iter().map(|id| Found { id, volume: self.volume(id) }).collect())
    }

    /// One volume. Its length is stored nowhere: it ends with its last mapped block.
    ///
    /// # Errors
    /// ENOENT when the pool has no such volume, EIO when what the pool knows of it is damaged.
    pub fn volume(self: &Arc<Self>, id: ThinId) -> Result<Volume> {
        let wrong = |what: &dyn std::fmt::Display| {
            Error::failed(format!("cannot read volume {id}: {what}")).on(&self.metadata_path)
        };
        let (tree, details) = match (self.metadata.mapping_tree(id), self.metadata.details(id)) {
            (Ok(tree), Ok(details)) => (tree, details),
            (Err(ThinError::Unknown(_)), Err(ThinError::Unknown(_))) => {
                let missing = io::Error::from_raw_os_error(libc::ENOENT);
                return Err(Error::failed(format!("cannot read volume {id}")).on(&self.metadata_path).because(missing));
            }
            // A volume is in both trees: one that is in one of them only is damaged, not absent.
            (Err(ThinError::Unknown(_)), _) => return Err(wrong(&"it has no mapping tree")),
            (_, Err(ThinError::Unknown(_))) => return Err(wrong(&"it has no details")),
            (Err(error), _) | (_, Err(error)) => return Err(wrong(&error)),
        };
        let nodes = NodeCache::new(NODES);
        let last = tree.leaf(u64::MAX - 1, self.metadata.reader(), &nodes).map_err(|error| wrong(&error))?;
        let node = last.node();
        let blocks = node.len().checked_sub(1).and_then(|index| node.key(index)).map_or(0, |key| key.saturating_add(1));
        let block = self.metadata.superblock().data_block_size.bytes();
        let len = blocks.checked_mul(block.get()).filter(|len| i64::try_from(*len).is_ok());
        let len = Bytes::new(len.ok_or_else(|| wrong(&"it is longer than a file can be"))?);
        Ok(Volume { pool: self.clone(), id, tree, nodes, len, block, mapped: details.mapped_blocks })
    }

    /// Whether it is proven that the metadata is still what was opened. A device is held exclusively, so that no pool can
    /// start on it.
    fn is_unchanged(&self) -> bool {
        self.stamp.is_none_or(|stamp| stamp.proves_unchanged(&self.watched))
    }

    /// Whether nothing is seen of a change.
    fn looks_unchanged(&self) -> bool {
        self.stamp.is_none_or(|stamp| stamp.looks_unchanged(&self.watched))
    }
}

/// Opens a file, or a device that nobody uses.
fn open_unused(path: &Path) -> io::Result<File> {
    let file = device::open(path, false)?;
    if !file.metadata()?.file_type().is_block_device() {
        return Ok(file);
    }
    // Without O_CREAT, O_EXCL on a block device fails while it is mounted or part of an active stack.
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_EXCL;
    OpenOptions::new().read(true).custom_flags(flags).open(device::own_path(&file))
}

/// A volume of an offline pool.
pub struct Volume {
    pool: Arc<OfflinePool>,
    id: ThinId,
    tree: Tree,
    nodes: NodeCache,
    len: Bytes,
    block: Bytes,
    mapped: u64,
}

impl Volume {
    /// Its length.
    pub fn len(&self) -> Bytes {
        self.len
    }

    /// Whether nothing was ever written to it.
    pub fn is_empty(&self) -> bool {
        self.len == Bytes::ZERO
    }

    /// Reads its whole mapping tree.
    ///
    /// # Errors
    /// What is damaged.
    pub fn check(&self) -> std::result::Result<FillMap, String> {
        self.pool.metadata.map(self.id, self.len, WALKERS).map_err(|error| error.to_string())
    }

    /// Where the data of virtual block `block` is; `None` when it is not mapped.
    fn data_block(&self, block: u64) -> io::Result<Option<u64>> {
        let reader = self.pool.metadata.reader();
        let leaf = self.tree.leaf(block, reader, &self.nodes).map_err(io::Error::other)?;
        let node = leaf.node();
        let index = node.lower_bound(block);
        let value = node.number(index).filter(|_| node.key(index) == Some(block));
        Ok(value.map(|value| value >> TIME_BITS))
    }

    /// Reads into `place` from `offset`: as few reads of the data device as its blocks allow.
    fn fill(&self, place: &mut [u8], offset: Bytes) -> io::Result<()> {
        let block = self.block.get();
        let (mut at, mut done) = (offset.get(), 0);
        while done < place.len() {
            let first = self.data_block(at / block)?;
            let within = at % block;
            let left = (place.len() - done) as u64;
            let mut run = (block - within).min(left);
            // Blocks that follow each other here and there are one read.
            while run < left {
                let next = self.data_block((at + run) / block)?;
                let follows = match first {
                    Some(first) => next == first.checked_add((within + run) / block),
                    None => next.is_none(),
                };
                if !follows {
                    break;
                }
                run = (run + block).min(left);
            }
            let end = done + usize::try_from(run).map_err(io::Error::other)?;
            let part = &mut place[done..end];
            match first {
                None => part.fill(0),
                Some(first) => self.read_data(part, first, within)?,
            }
            (at, done) = (at + run, end);
        }
        Ok(())
    }

    fn read_data(&self, part: &mut [u8], block: u64, within: u64) -> io::Result<()> {
        let position = block.checked_mul(self.block.get()).and_then(|start| start.checked_add(within));
        let position = Bytes::new(position.ok_or(io::ErrorKind::InvalidData)?);
        // A mapping past the end of the data device is an error, never zeros.
        match self.pool.data.read(part, position)? {
            count if count == part.len() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// A volume as a file.
pub struct VolumeMedium(Arc<Volume>);

impl VolumeMedium {
    /// Shows a volume.
    pub fn new(volume: Volume) -> Self {
        Self(Arc::new(volume))
    }
}

impl Medium for VolumeMedium {
    fn size(&self) -> io::Result<Bytes> {
        Ok(self.0.len)
    }

    fn align(&self) -> Bytes {
        MIN_ALIGN
    }

    fn read(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
        self.0.fill(buffer.resize(size), offset)?;
        if !self.0.pool.looks_unchanged() {
            return Err(io::Error::other(CHANGED));
        }
        Ok(0..size)
    }

    fn resolve(&self, context: &Context) -> Stack {
        let volume = self.0.clone();
        Stack::build(context, |resolver| {
            let name = format!("volume {} of {}", volume.id, volume.pool.metadata_path.display());
            let map: Arc<dyn HoleMap> = if volume.pool.is_unchanged() {
                resolver.guard(PoolGuard(volume.pool.clone()));
                Arc::new(VolumeMap { volume, read: OnceLock::new() })
            } else {
                let why = if volume.pool.looks_unchanged() { UNPROVEN } else { CHANGED };
                Arc::new(Dense::new(volume.len, why))
            };
            let holes_from = "its mapping tree".to_owned();
            Arc::new(Layer { name, kind: "thin".to_owned(), holes_from, map, device: None, below: Vec::new() })
        })
    }

    fn node(&self) -> io::Result<Node> {
        let pool = &self.0.pool;
        // The rights are those of the bytes. Devices have no times: anything may have happened while none was open.
        let (data, metadata) = (Node::of_open(&pool.data.file)?, Node::of_open(&pool.watched)?);
        let is_image = |node: &Node| node.mode & libc::S_IFMT == libc::S_IFREG;
        let (mtime, ctime) = match is_image(&data) && is_image(&metadata) {
            true => (data.mtime.max(metadata.mtime), data.ctime.max(metadata.ctime)),
            false => (pool.opened, pool.opened),
        };
        Ok(Node { identity: None, mtime, ctime, ..data })
    }

    fn is_current(&self) -> bool {
        self.0.pool.is_unchanged()
    }
}

/// The metadata of a pool that nobody is to write to while its volumes are open.
struct PoolGuard(Arc<OfflinePool>);

impl Guard for PoolGuard {
    fn unchanged(&self) -> bool {
        self.0.is_unchanged()
    }
}

/// The holes of a volume; its tree is read at the first question.
struct VolumeMap {
    volume: Arc<Volume>,
    read: OnceLock<std::result::Result<FillMap, String>>,
}

impl VolumeMap {
    fn map(&self) -> std::result::Result<&FillMap, &String> {
        self.read.get_or_init(|| self.volume.check()).as_ref()
    }
}

impl HoleMap for VolumeMap {
    fn len(&self) -> Bytes {
        self.volume.len
    }

    fn extent_at(&self, offset: Bytes) -> Extent {
        let data = || Extent { end: self.len().max(Extent::outside(offset).end), kind: Kind::Data };
        self.map().map_or_else(|_| data(), |map| map.extent_at(offset))
    }

    fn next_data(&self, offset: Bytes) -> Bytes {
        self.map().map_or(offset, |map| map.next_data(offset))
    }

    fn next_hole(&self, offset: Bytes) -> Option<Range<Bytes>> {
        self.map().ok()?.next_hole(offset)
    }

    fn count_data(&self, range: &Range<Bytes>, unit: Bytes) -> Option<Bytes> {
        self.map().ok()?.count_data(range, unit)
    }

    fn allocated(&self) -> Option<Bytes> {
        self.volume.mapped.checked_mul(self.volume.block.get()).map(Bytes::new)
    }

    fn is_sparse(&self) -> Option<bool> {
        // The volume ends with its last mapped block, so no mapping lies past the end.
        Some(self.volume.mapped < self.volume.len.get() / self.volume.block.get())
    }

    fn dense_because(&self) -> Option<String> {
        self.read.get().and_then(|read| read.as_ref().err().cloned())
    }

    fn memory(&self) -> Bytes {
        self.read.get().and_then(|read| read.as_ref().ok()).map_or(Bytes::ZERO, HoleMap::memory)
    }
}
