//! What a SPEC names: one device, one image, a directory of devices, or an offline pool.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::error;

use super::root::Root;
use super::{FileKind, Options, not_found};
use crate::error::{Error, Result};
use crate::source::Backing;
use crate::source::backing::Node;
use crate::source::nbd::{NbdExport, SideExport, Uri};
use crate::source::thin::ThinId;
use crate::source::thin::offline::{Found, OfflinePools, VolumeMedium};
use crate::sys::device::{self, DeviceId};
use crate::units::Bytes;

/// What is mounted.
pub enum Spec {
    /// One file.
    File {
        /// What it shows.
        place: Place,
        /// Its name.
        name: OsString,
        /// The length of an export when it was mounted: nothing else says it without a connection.
        export_len: Bytes,
    },
    /// A directory of devices.
    Directory(Root),
    /// The volumes of a pool that is not active, each named by its id.
    Pool(OfflinePools),
}

/// Where the bytes of a file are.
#[derive(Clone, Debug)]
pub enum Place {
    /// A device or image of the host.
    Path(PathBuf),
    /// The export of an NBD server.
    Export(Arc<NbdExport>),
    /// A volume of the offline pool.
    Volume(ThinId),
}

/// What a path inside the mount leads to.
pub enum Target {
    /// A directory.
    Directory(Node),
    /// The device or image at that place; its node, where it has one.
    File(Place, Option<Node>),
}

impl Target {
    /// The directory, node or image.
    pub fn node(&self) -> Option<&Node> {
        match self {
            Self::Directory(node) => Some(node),
            Self::File(_, node) => node.as_ref(),
        }
    }
}

impl Spec {
    /// Looks at what a SPEC names.
    ///
    /// # Errors
    /// When it is missing, cannot be opened for reading, or is nothing that can be shown.
    pub fn new(spec: &OsStr, options: &Options) -> Result<Self> {
        if let Some(text) = spec.to_str().filter(|text| Uri::looks_like(text)) {
            let uri = Uri::parse(text)?.absolute()?;
            let name = OsString::from(uri.file_name());
            let export = NbdExport::new(uri);
            // The connection is made again after the daemon was forked.
            let export_len = export.client()?.size();
            return Ok(Self::File { place: Place::Export(Arc::new(export)), name, export_len });
        }
        // Absolute from here on: the daemon leaves the directory that it was started in.
        let path =
            std::path::absolute(spec).map_err(|error| Error::failed("cannot resolve").on(spec).because(error))?;
        if let Some(metadata) = &options.thin_metadata {
            let pools = OfflinePools::new(metadata, &path);
            tell_damage(pools.open()?.volumes()?)?;
            return Ok(Self::Pool(pools));
        }
        let failed = |what: &str, error: io::Error| Error::failed(what).on(spec).because(error);
        let found = fs::metadata(&path).map_err(|error| failed("cannot open", error))?;
        let kind = found.file_type();
        if kind.is_dir() {
            fs::read_dir(&path).map_err(|error| failed("cannot read the directory", error))?;
            return Ok(Self::Directory(Root { path, file_system: DeviceId::from_dev(found.dev()) }));
        }
        if !kind.is_block_device() && !kind.is_file() {
            return Err(Error::failed("is neither a block device, nor a regular file, nor a directory").on(spec));
        }
        device::open(&path, false).map_err(|error| failed("cannot open", error))?;
        let name = path.file_name().map(ToOwned::to_owned);
        let name = name.ok_or_else(|| Error::failed("has no name").on(spec))?;
        Ok(Self::File { name, place: Place::Path(path), export_len: Bytes::ZERO })
    }

    /// The path of the one file, if there is only one.
    pub fn only_file(&self) -> Option<PathBuf> {
        match self {
            Self::File { name, .. } => Some(PathBuf::from(name)),
            Self::Directory(_) | Self::Pool(_) => None,
        }
    }

    /// Opens the one file.
    ///
    /// # Errors
    /// When there are several, or it cannot be opened.
    pub fn open_only(&self) -> Result<Backing> {
        match self {
            Self::File { place, .. } => self.open(place),
            Self::Directory(_) | Self::Pool(_) => Err(SideExport::unclear("has more than one file")),
        }
    }

    /// The path of an entry of a directory; `None` for a name that is not one.
    pub fn child(&self, directory: &Path, name: &OsStr) -> Option<PathBuf> {
        let one = Path::new(name);
        let plain = one.components().count() == 1 && one.file_name() == Some(name);
        plain.then(|| directory.join(name))
    }

    /// What a path inside the mount leads to now.
    ///
    /// # Errors
    /// ENOENT when nothing is there that is shown.
    pub fn target(&self, path: &Path) -> Result<Target> {
        match self {
            Self::File { place, name, .. } if path == Path::new(name) => place.clone().file(),
            Self::File { place, .. } if path.as_os_str().is_empty() => place.directory(),
            Self::File { .. } => Err(not_found()),
            Self::Directory(root) => match root.shown(path).ok_or_else(not_found)? {
                FileKind::File => Place::Path(root.path.join(path)).file(),
                FileKind::Directory => directory(&root.path.join(path)),
            },
            Self::Pool(pools) if path.as_os_str().is_empty() => parent(pools.metadata()),
            Self::Pool(pools) => {
                let id = path.to_str().and_then(|name| name.parse().ok()).and_then(ThinId::new);
                // Only the plain spelling is a name: 01 is not 1.
                let id = id.filter(|id| Path::new(&id.to_string()) == path).ok_or_else(not_found)?;
                pools.open()?.volume(id)?;
                Place::Volume(id).file()
            }
        }
    }

    /// The names in a directory, as they are now.
    ///
    /// # Errors
    /// As readdir(3).
    pub fn entries(&self, directory: &Path) -> Result<Vec<(OsString, FileKind)>> {
        let root = match self {
            Self::File { name, .. } => return Ok(vec![(name.clone(), FileKind::File)]),
            Self::Pool(pools) => {
                // One that is damaged too: a copy of the directory must fail, not be short of it.
                let found = pools.open()?.volumes()?.into_iter();
                return Ok(found.map(|found| (found.id.to_string().into(), FileKind::File)).collect());
            }
            Self::Directory(root) => root,
        };
        let mut entries = root.entries(directory)?;
        entries.sort();
        Ok(entries)
    }

    /// Opens a file.
    ///
    /// # Errors
    /// When it cannot be opened for reading.
    pub fn open(&self, place: &Place) -> Result<Backing> {
        match (self, place) {
            (_, Place::Path(path)) => Backing::open(path),
            (_, Place::Export(export)) => Ok(Backing::new(Path::new(&export.uri().to_string()), export.open()?)),
            (Self::Pool(pools), Place::Volume(id)) => {
                let name = pools.metadata().join(id.to_string());
                Ok(Backing::new(&name, VolumeMedium::new(pools.open()?.volume(*id)?)))
            }
            (_, Place::Volume(_)) => Err(not_found()),
        }
    }
}

impl Place {
    /// The directory around the one file of a mount.
    fn directory(&self) -> Result<Target> {
        match self {
            Self::Path(path) => parent(path),
            Self::Export(_) => directory(Path::new("/")),
            Self::Volume(_) => Err(not_found()),
        }
    }

    /// The file that is shown.
    fn file(self) -> Result<Target> {
        let node = match &self {
            Self::Path(path) => Some(node(path)?),
            Self::Export(_) | Self::Volume(_) => None,
        };
        Ok(Target::File(self, node))
    }
}

/// Says which volumes of a pool cannot be shown.
///
/// # Errors
/// When none of them can.
fn tell_damage(volumes: Vec<Found>) -> Result<()> {
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

/// What stat(2) says of a device, image or directory of the host. Only what does not exist is absent.
fn node(path: &Path) -> Result<Node> {
    Node::at(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => not_found(),
        _ => Error::failed("cannot stat").on(path).because(error),
    })
}

fn directory(path: &Path) -> Result<Target> {
    node(path).map(Target::Directory)
}

fn parent(path: &Path) -> Result<Target> {
    directory(path.parent().unwrap_or(Path::new("/")))
}
