//! Volumes of a pool that is not active. Their bytes are read through the mapping trees, without device-mapper.
//!
//! The mapping decides which bytes a volume has, so the metadata must not change while a volume is open. A metadata
//! device is opened exclusively, which the kernel refuses while a pool is active on it. A metadata image has a
//! [`Stamp`], which shows whether it was written. If the stamp proves nothing (the times of the file system are set by
//! another machine, or the clock was set), all of the volume is data.

use std::collections::HashMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use super::changes::{Compared, DeviceChanges};
use super::error::ThinError;
use super::lookup::NodeCache;
use super::metadata::Metadata;
use super::reader::MetadataReader;
use super::walk::Tree;
use super::{MetaBlock, TIME_BITS, ThinId};
use crate::error::{Error, Result};
use crate::map::FillMap;
use crate::source::changes::Changes;
use crate::sys::buffer::AlignedBuffer;
use crate::sys::stamp::{Stamp, increasing_now};
use crate::sys::{block, device, file};
use crate::units::Bytes;

/// The number of nodes of 4 KiB in the cache for look-ups: all internal nodes of a volume of tens of millions of
/// mappings.
const NODES: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
/// The least alignment of direct reads.
const DIRECT_ALIGN: Bytes = Bytes::new(4096);
/// The number of threads that read a mapping tree.
const THREADS: usize = 2;

/// The metadata and the data of a pool that is not active.
pub struct OfflinePool {
    metadata: Metadata,
    metadata_path: PathBuf,
    metadata_file: File,
    /// The stamp of a metadata image before any of it was read. `None` for a device.
    stamp: Option<Stamp>,
    data: Data,
    opened: SystemTime,
    /// The undamaged volumes that were looked up so far. The metadata does not change while the pool is open.
    found: Mutex<HashMap<ThinId, FoundVolume>>,
}

/// What the trees state about a volume.
#[derive(Clone, Copy)]
struct FoundVolume {
    tree: Tree,
    len: Bytes,
    mapped: u64,
}

/// The data of a pool.
struct Data {
    file: File,
    /// For reads of a device: its descriptor with O_DIRECT, and the alignment of reads. An active pool writes past the
    /// page cache of the device, and that cache is kept as long as the device is open anywhere.
    direct: Option<(File, Bytes)>,
}

impl Data {
    fn open(path: &Path) -> io::Result<Self> {
        let file = device::open(path, false)?;
        let direct = match file.metadata()?.file_type().is_block_device() {
            true => Some((device::reopen_direct(&file)?, block::logical_block(&file)?.max(DIRECT_ALIGN))),
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

/// The paths of an offline pool. The pool is opened when it is needed, and then shared as long as one user has it open.
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

/// One entry of the list of a pool's volumes.
pub struct Found {
    /// The number of the volume in the pool.
    pub id: ThinId,
    /// The volume, or why it cannot be opened.
    pub volume: Result<Volume>,
}

impl OfflinePool {
    /// Opens a pool by its metadata and data, each a device or an image.
    ///
    /// # Errors
    /// When one of them cannot be opened, or the metadata is in use by an active pool or is not thin metadata.
    pub fn open(metadata_path: &Path, data_path: &Path) -> Result<Self> {
        let failed = |path: &Path, error: io::Error| Error::failed("cannot open").on(path).because(error);
        let metadata_file = open_unused(metadata_path).map_err(|error| {
            let busy = error.raw_os_error() == Some(libc::EBUSY);
            let error = failed(metadata_path, error);
            if busy { error.hint("its pool is active: mount its volumes instead") } else { error }
        })?;
        let opened = |error| failed(metadata_path, error);
        let is_image = metadata_file.metadata().map_err(opened)?.is_file();
        let stamp = if is_image { Some(Stamp::settled(&metadata_file).map_err(opened)?) } else { None };
        // The file that was found to be unused is opened again, and not its path, which may lead to another file by
        // now.
        let reader = MetadataReader::reopen(&metadata_file).map_err(opened)?;
        let metadata = Metadata::open(reader, MetaBlock::SUPERBLOCK)
            .map_err(|error| Error::failed("cannot read thin metadata").on(metadata_path).because(error))?;
        let data = Data::open(data_path).map_err(|error| failed(data_path, error))?;
        let opened = increasing_now();
        let (metadata_path, found) = (metadata_path.to_owned(), Mutex::default());
        Ok(Self { metadata, metadata_path, metadata_file, stamp, data, opened, found })
    }

    /// The path of the metadata.
    pub fn metadata_path(&self) -> &Path {
        &self.metadata_path
    }

    /// The open metadata.
    pub fn metadata_file(&self) -> &File {
        &self.metadata_file
    }

    /// The open data.
    pub fn data_file(&self) -> &File {
        &self.data.file
    }

    /// When the pool was opened.
    pub fn opened(&self) -> SystemTime {
        self.opened
    }

    /// The ids of the volumes of the pool in ascending order, the damaged ones included.
    ///
    /// # Errors
    /// When one of the trees that list the volumes is damaged.
    pub fn ids(&self) -> Result<Vec<ThinId>> {
        let ids = self.metadata.devices();
        ids.map_err(|error| Error::failed("cannot list the volumes").on(&self.metadata_path).because(error))
    }

    /// The volumes of the pool, in the order of their ids.
    ///
    /// # Errors
    /// As [`OfflinePool::ids`]. The damage of one volume is in its [`Found`].
    pub fn volumes(self: &Arc<Self>) -> Result<Vec<Found>> {
        Ok(self.ids()?.into_iter().map(|id| Found { id, volume: self.volume(id) }).collect())
    }

    /// One volume. The metadata does not have its length, so it ends with its last mapped block.
    ///
    /// # Errors
    /// ENOENT when the pool has no such volume, EIO when its metadata is damaged.
    pub fn volume(self: &Arc<Self>, id: ThinId) -> Result<Volume> {
        let lock = || self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let found = lock().get(&id).copied();
        let nodes = NodeCache::new(NODES);
        let found = match found {
            Some(found) => found,
            None => {
                let found = self.find(id, &nodes)?;
                lock().insert(id, found);
                found
            }
        };
        let block = self.metadata.superblock().data_block_size.bytes();
        Ok(Volume { pool: self.clone(), id, found, nodes, block })
    }

    /// Finds a volume in the trees.
    fn find(&self, id: ThinId, nodes: &NodeCache) -> Result<FoundVolume> {
        let failed =
            |cause: io::Error| Error::failed(format!("cannot read volume {id}")).on(&self.metadata_path).because(cause);
        let damaged = |what: &str| failed(io::Error::other(what));
        let (tree, details) = match (self.metadata.mapping_tree(id), self.metadata.details(id)) {
            (Ok(tree), Ok(details)) => (tree, details),
            (Err(ThinError::Unknown(_)), Err(ThinError::Unknown(_))) => {
                return Err(failed(io::Error::from_raw_os_error(libc::ENOENT)));
            }
            // A volume that is in only one of the two trees is damaged, and not absent.
            (Err(ThinError::Unknown(_)), _) => return Err(damaged("it has no mapping tree")),
            (_, Err(ThinError::Unknown(_))) => return Err(damaged("it has no details")),
            (Err(error), _) | (_, Err(error)) => return Err(failed(error.into())),
        };
        let last = tree.leaf(u64::MAX - 1, self.metadata.reader(), nodes).map_err(|error| failed(error.into()))?;
        let node = last.node();
        let blocks = node.len().checked_sub(1).and_then(|index| node.key(index)).map_or(0, |key| key.saturating_add(1));
        let block = self.metadata.superblock().data_block_size.bytes();
        let len = blocks.checked_mul(block.get()).filter(|len| i64::try_from(*len).is_ok());
        let len = Bytes::new(len.ok_or_else(|| damaged("it is longer than a file can be"))?);
        Ok(FoundVolume { tree, len, mapped: details.mapped_blocks })
    }

    /// What changed from one volume to another one. Each ends with its last mapped block, and blocks that are not mapped
    /// read as zeros, as in [`OfflinePool::volume`].
    ///
    /// # Errors
    /// When it is one volume twice, the pool has no such volume, its metadata is damaged, or it is not proven that the
    /// metadata was not written since it was opened.
    pub fn changes(self: &Arc<Self>, older: ThinId, newer: ThinId) -> Result<Changes> {
        let failed = |what: String| Error::failed(what).on(&self.metadata_path);
        if older == newer {
            return Err(Error::usage(format!("cannot compare volume {newer} with itself")).on(&self.metadata_path));
        }
        let compared = |id| Ok(Compared { id, len: self.volume(id)?.len() });
        let (older, newer) = (compared(older)?, compared(newer)?);
        let changes = DeviceChanges::read(&self.metadata, older, newer, false);
        // A wrong image may look damaged, so that this is checked first.
        if !self.is_unchanged() {
            return Err(failed("it is not proven that the metadata was not written since it was opened".to_owned()));
        }
        let what = || failed(format!("cannot compare volumes {} and {}", older.id, newer.id));
        let changes = changes.map_err(|error| what().because(error))?;
        let pool = self.clone();
        Ok(Changes::new(changes.identity(None), changes.map, move || pool.is_unchanged()))
    }

    /// Whether it is proven that the metadata has not changed since it was opened. This is always so for a device: it
    /// is open exclusively, so that no pool can become active on it.
    pub fn is_unchanged(&self) -> bool {
        self.stamp.is_none_or(|stamp| stamp.proves_unchanged(&self.metadata_file))
    }

    /// Whether the metadata shows no sign of a change. This is less than a proof.
    pub fn looks_unchanged(&self) -> bool {
        self.stamp.is_none_or(|stamp| stamp.looks_unchanged(&self.metadata_file))
    }
}

/// Opens a file, or a device that is not in use.
///
/// # Errors
/// As open(2): EBUSY when the device is mounted or part of an active stack.
fn open_unused(path: &Path) -> io::Result<File> {
    let file = device::open(path, false)?;
    if !file.metadata()?.file_type().is_block_device() {
        return Ok(file);
    }
    // O_EXCL without O_CREAT opens a block device exclusively.
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_EXCL;
    OpenOptions::new().read(true).custom_flags(flags).open(device::own_path(&file))
}

/// A volume of an offline pool.
pub struct Volume {
    pool: Arc<OfflinePool>,
    id: ThinId,
    found: FoundVolume,
    nodes: NodeCache,
    block: Bytes,
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "volume {}", self.id)
    }
}

impl Volume {
    /// Its length.
    pub fn len(&self) -> Bytes {
        self.found.len
    }

    /// Whether it has no mapped block.
    pub fn is_empty(&self) -> bool {
        self.len() == Bytes::ZERO
    }

    /// Its number in the pool.
    pub fn id(&self) -> ThinId {
        self.id
    }

    /// Its pool.
    pub fn pool(&self) -> &Arc<OfflinePool> {
        &self.pool
    }

    /// The size of its data blocks.
    pub fn block(&self) -> Bytes {
        self.block
    }

    /// The size of its mapped blocks, as its details state it.
    pub fn mapped(&self) -> Option<Bytes> {
        self.found.mapped.checked_mul(self.block.get()).map(Bytes::new)
    }

    /// Reads its complete mapping tree.
    ///
    /// # Errors
    /// When the metadata is damaged or cannot be read.
    pub fn map(&self) -> std::result::Result<FillMap, ThinError> {
        self.pool.metadata.map(self.id, self.len(), THREADS)
    }

    /// The data block of the volume's block `block`; `None` when it is not mapped.
    fn data_block(&self, block: u64) -> io::Result<Option<u64>> {
        let reader = self.pool.metadata.reader();
        let leaf = self.found.tree.leaf(block, reader, &self.nodes)?;
        let node = leaf.node();
        let index = node.lower_bound(block);
        let value = node.number(index).filter(|_| node.key(index) == Some(block));
        Ok(value.map(|value| value >> TIME_BITS))
    }

    /// Reads into `place` from `offset`, with as few reads of the data device as its blocks allow.
    ///
    /// # Errors
    /// When the mapping tree is damaged, or the data cannot be read.
    pub fn fill(&self, place: &mut [u8], offset: Bytes) -> io::Result<()> {
        let block = self.block.get();
        let (mut at, mut done) = (offset.get(), 0);
        while done < place.len() {
            let first = self.data_block(at / block)?;
            let within = at % block;
            let left = (place.len() - done) as u64;
            let mut run = (block - within).min(left);
            // Blocks that are adjacent both in the volume and on the data device are one read.
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
        // A mapping past the end of the data device is an error, and must not be read as zeros.
        match self.pool.data.read(part, position)? {
            count if count == part.len() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
