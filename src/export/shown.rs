//! What a mount shows: one file, a directory of devices, or the volumes of an offline pool.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use log::error;

use super::view::{ViewSource, has_known_file_system};
use super::{DeviceDirectory, Export, FileKind, HostNode, NbdExportFile, VolumeExport, cannot_open, nbd};
use crate::error::{Error, Result};
use crate::source::nbd::{NbdExport, SideExport, Uri};
use crate::source::thin::ThinId;
use crate::source::thin::offline::{Found, OfflinePool, OfflinePools, Volume};
use crate::spec::{SourceOptions, Spec, SpecKind};
use crate::sys::device::{self, DeviceId};
use crate::units::Bytes;

/// The exact files of a mount, and its directories.
pub enum Shown {
    /// One file.
    File {
        /// Where its bytes are.
        source: FileSource,
        /// Its name.
        name: OsString,
        /// The length of an NBD export at the mount, for statfs(2): asking the server again takes a connection. Zero for
        /// other files.
        export_len: Bytes,
    },
    /// The block devices of a directory of the host.
    Directory(DeviceDirectory),
    /// The volumes of a pool that is not active. The name of each file is the id of its volume.
    Pool(OfflinePools),
}

/// What stays open for as long as a directory of a mount is open: the offline pool.
pub type KeptOpen = Option<Arc<OfflinePool>>;

/// Where the bytes of a file are.
#[derive(Clone, Debug)]
pub enum FileSource {
    /// A device or image of the host.
    Path(PathBuf),
    /// The export of an NBD server.
    Export(Arc<NbdExport>),
    /// A volume of the offline pool, which is open.
    Volume(Arc<Volume>),
}

/// What a path inside the mount leads to.
pub enum CatalogEntry {
    /// A directory.
    Directory(HostNode),
    /// A file. Only a device or image of the host has a node.
    File(FileSource, Option<HostNode>),
    /// A view of a file.
    View(ViewSource, HostNode),
}

impl CatalogEntry {
    /// The node of the host's directory, device or image.
    pub fn node(&self) -> Option<&HostNode> {
        match self {
            Self::Directory(node) | Self::View(_, node) => Some(node),
            Self::File(_, node) => node.as_ref(),
        }
    }
}

impl Shown {
    /// Looks up what a SPEC names, and opens it once to find out whether it can be read.
    ///
    /// # Errors
    /// When it does not exist, cannot be opened for reading, or is none of the things that can be shown. A usage error where the
    /// option `name` is not possible.
    pub fn new(spec: &Spec, options: &SourceOptions) -> Result<Self> {
        let shown = match (spec.kind(), &options.thin_metadata) {
            (SpecKind::Nbd(uri), _) => Self::of_export(uri),
            (SpecKind::Path(data), Some(metadata)) => Self::of_pool(metadata, data),
            (SpecKind::Path(path), None) => Self::of_path(path),
        }?;
        match &options.name {
            Some(name) => shown.named(name),
            None => Ok(shown),
        }
    }

    /// The same, with a name for the only file.
    ///
    /// # Errors
    /// A usage error where there is more than one file.
    fn named(self, name: &OsStr) -> Result<Self> {
        match self {
            Self::File { source, export_len, .. } => Ok(Self::File { source, name: name.to_owned(), export_len }),
            Self::Directory(_) | Self::Pool(_) => {
                Err(Error::usage("option 'name' is for one file, and this SPEC has one for each device"))
            }
        }
    }

    fn of_export(uri: &Uri) -> Result<Self> {
        let name = OsString::from(uri.file_name());
        let export = NbdExport::new(uri.clone());
        // This connection is closed again: the daemon that is forked later makes its own.
        let export_len = export.client()?.size();
        Ok(Self::File { source: FileSource::Export(Arc::new(export)), name, export_len })
    }

    fn of_pool(metadata: &Path, data: &Path) -> Result<Self> {
        let pools = OfflinePools::new(metadata, data);
        check_volumes(pools.open()?.volumes()?)?;
        Ok(Self::Pool(pools))
    }

    fn of_path(path: &Path) -> Result<Self> {
        let failed = |what: &str, error: io::Error| Error::failed(what).on(path).because(error);
        let found = fs::metadata(path).map_err(|error| cannot_open(path, error))?;
        let kind = found.file_type();
        if kind.is_dir() {
            fs::read_dir(path).map_err(|error| failed("cannot read the directory", error))?;
            let file_system = DeviceId::from_dev(found.dev());
            return Ok(Self::Directory(DeviceDirectory { path: path.to_owned(), file_system }));
        }
        if !kind.is_block_device() && !kind.is_file() {
            return Err(Error::failed("is neither a block device, nor a regular file, nor a directory").on(path));
        }
        device::open(path, false).map_err(|error| cannot_open(path, error))?;
        let name = path.file_name().map(ToOwned::to_owned);
        let name = name.ok_or_else(|| Error::failed("has no file name").on(path))?;
        Ok(Self::File { name, source: FileSource::Path(path.to_owned()), export_len: Bytes::ZERO })
    }

    /// The path of the only file inside the mount; `None` for a directory and for a pool.
    pub(super) fn only_file(&self) -> Option<PathBuf> {
        match self {
            Self::File { name, .. } => Some(PathBuf::from(name)),
            Self::Directory(_) | Self::Pool(_) => None,
        }
    }

    /// Opens the only file.
    ///
    /// # Errors
    /// A usage error for a directory and for a pool. When it cannot be opened.
    fn open_only(&self) -> Result<Arc<dyn Export>> {
        match self {
            Self::File { source, .. } => source.open(),
            Self::Directory(_) | Self::Pool(_) => Err(SideExport::unclear("has more than one file")),
        }
    }

    /// The export `uri`, with the NBD device of the kernel that is connected to it: the device that the only file
    /// shows, or one below it in its stack.
    ///
    /// # Errors
    /// As [`Shown::open_only`] and [`SideExport::new`].
    pub fn side_export(&self, uri: Uri) -> Result<SideExport> {
        self.open_only()?.side_export(uri)
    }

    /// The path of the entry `name` of a directory. `None` for a name that no entry can have, such as `..`.
    pub fn child(&self, directory: &Path, name: &OsStr) -> Option<PathBuf> {
        let one = Path::new(name);
        let plain = one.components().count() == 1 && one.file_name() == Some(name);
        plain.then(|| directory.join(name))
    }

    /// Looks up a path inside the mount.
    ///
    /// # Errors
    /// ENOENT when nothing is shown there.
    pub fn find(&self, path: &Path) -> Result<CatalogEntry> {
        match self {
            Self::File { source, name, .. } if path == Path::new(name) => source.clone().into_entry(),
            Self::File { source, .. } if path.as_os_str().is_empty() => source.directory(),
            Self::File { .. } => Err(Error::from_errno(libc::ENOENT)),
            Self::Directory(root) => match root.shown(path).ok_or_else(|| Error::from_errno(libc::ENOENT))? {
                FileKind::File => FileSource::Path(root.path.join(path)).into_entry(),
                FileKind::Directory => directory(&root.path.join(path)),
            },
            Self::Pool(pools) if path.as_os_str().is_empty() => parent(pools.metadata()),
            Self::Pool(pools) => {
                // There is one name for each volume: 01 is not a name of volume 1.
                let id = path.to_str().and_then(ThinId::parse).ok_or_else(|| Error::from_errno(libc::ENOENT))?;
                FileSource::Volume(Arc::new(pools.open()?.volume(id)?)).into_entry()
            }
        }
    }

    /// Opens what stays open for as long as a directory is open, so that a listing with the attributes of all volumes reads
    /// each part of the metadata at most once.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn keep_open(&self) -> Result<KeptOpen> {
        match self {
            Self::File { .. } | Self::Directory(_) => Ok(None),
            Self::Pool(pools) => pools.open().map(Some),
        }
    }

    /// The entries of a directory of the mount as they are now, sorted by name or by volume id.
    ///
    /// # Errors
    /// As readdir(3).
    pub fn entries(&self, directory: &Path) -> Result<Vec<(OsString, FileKind)>> {
        let root = match self {
            Self::File { name, .. } => return Ok(vec![(name.clone(), FileKind::File)]),
            Self::Pool(pools) => {
                // Damaged volumes are listed too: a copy of the directory must fail, and not lack them.
                let ids = pools.open()?.ids()?.into_iter();
                return Ok(ids.map(|id| (id.to_string().into(), FileKind::File)).collect());
            }
            Self::Directory(root) => root,
        };
        let mut entries = root.entries(directory)?;
        entries.sort();
        Ok(entries)
    }
}

impl FileSource {
    /// Opens the file.
    ///
    /// # Errors
    /// When it cannot be opened for reading.
    pub fn open(&self) -> Result<Arc<dyn Export>> {
        match self {
            Self::Path(path) => super::open(path),
            Self::Export(export) => Ok(Arc::new(NbdExportFile::open(export)?)),
            Self::Volume(volume) => Ok(Arc::new(VolumeExport::new(volume.clone()))),
        }
    }

    /// The owner, permissions and times of the file.
    ///
    /// # Errors
    /// When it is gone.
    pub(super) fn node(&self) -> Result<HostNode> {
        match self {
            Self::Path(path) => node(path),
            Self::Export(_) => Ok(nbd::host_node(SystemTime::now())),
            Self::Volume(volume) => VolumeExport::new(volume.clone())
                .host_node()
                .map_err(|error| Error::failed("cannot stat").on(volume.pool().metadata_path()).because(error)),
        }
    }

    /// Whether there is a file system on it whose free space can be found, by its magic numbers.
    pub(super) fn has_known_file_system(&self) -> bool {
        self.open().is_ok_and(|export| has_known_file_system(&*export))
    }

    /// The directory of the host that the root of a mount with one file has its owner, permissions and times from.
    fn directory(&self) -> Result<CatalogEntry> {
        match self {
            Self::Path(path) => parent(path),
            Self::Export(_) => directory(Path::new("/")),
            Self::Volume(_) => Err(Error::from_errno(libc::ENOENT)),
        }
    }

    /// The entry of this file. It has the attributes of a device or image of the host, and none for an NBD export or a
    /// volume.
    ///
    /// # Errors
    /// ENOENT when the device or image does not exist.
    fn into_entry(self) -> Result<CatalogEntry> {
        let node = match &self {
            Self::Path(path) => Some(node(path)?),
            Self::Export(_) | Self::Volume(_) => None,
        };
        Ok(CatalogEntry::File(self, node))
    }
}

/// Logs which volumes of a pool cannot be read.
///
/// # Errors
/// When none of them can be read.
fn check_volumes(volumes: Vec<Found>) -> Result<()> {
    let count = volumes.len();
    let damaged: Vec<Error> = volumes.into_iter().filter_map(|found| found.volume.err()).collect();
    for error in &damaged {
        error!("{error}");
    }
    match count {
        1.. if damaged.len() == count => Err(Error::failed("no volume of the pool can be read")),
        _ => Ok(()),
    }
}

/// The node of a device, image or directory of the host.
///
/// # Errors
/// ENOENT only when it does not exist.
fn node(path: &Path) -> Result<HostNode> {
    HostNode::at(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::from_errno(libc::ENOENT),
        _ => Error::failed("cannot stat").on(path).because(error),
    })
}

fn directory(path: &Path) -> Result<CatalogEntry> {
    node(path).map(CatalogEntry::Directory)
}

fn parent(path: &Path) -> Result<CatalogEntry> {
    directory(path.parent().unwrap_or(Path::new("/")))
}
