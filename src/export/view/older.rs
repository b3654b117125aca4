//! The older snapshot of a view of changes.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::export::{Export, FileIdentity, FileSource, HostNode};
use crate::map::HoleMap;
use crate::source::Context;
use crate::source::changes::{self, Changes};
use crate::source::thin::offline::Volume;

/// Where an older snapshot is found.
#[derive(Clone, Debug)]
pub enum OlderSource {
    /// A device.
    Path(PathBuf),
    /// A volume of an offline pool.
    Volume(Arc<Volume>),
    /// The state of an NBD export at the time from which this dirty bitmap records writes.
    Bitmap(String),
}

impl OlderSource {
    /// The name that stands in the name of the view, and that is the default for the name of the backing file.
    pub(super) fn name(&self) -> OsString {
        match self {
            Self::Path(path) => path.file_name().unwrap_or(path.as_os_str()).to_owned(),
            Self::Volume(volume) => volume.id().to_string().into(),
            Self::Bitmap(name) => name.into(),
        }
    }

    /// The device that its path leads to. `None` for what has no path of its own.
    fn identity(&self) -> Option<FileIdentity> {
        match self {
            Self::Path(path) => HostNode::at(path).ok()?.identity,
            Self::Volume(_) | Self::Bitmap(_) => None,
        }
    }

    /// Opens `newer`, and finds out what changed in it since this snapshot.
    ///
    /// # Errors
    /// When it cannot be opened, or the two cannot be compared, with the reason.
    pub(super) fn compared_with(&self, newer: &FileSource, context: &Context) -> Result<(Arc<dyn Export>, Changes)> {
        let (base, changes) = match (self, newer) {
            (Self::Path(older), FileSource::Path(path)) => {
                let base = newer.open()?;
                let changes = match base.device() {
                    // Not opened by its path again, which may lead to another device by now.
                    Some(newer) => changes::between(&changes::open(older)?, newer, context)?,
                    None => changes::between(&changes::open(older)?, &changes::open(path)?, context)?,
                };
                (base, changes)
            }
            (Self::Volume(older), FileSource::Volume(volume)) => {
                (newer.open()?, volume.pool().changes(older.id(), volume.id())?)
            }
            (Self::Bitmap(bitmap), FileSource::Export(export)) => {
                // A server may have one client at a time: this connection ends before the export is opened.
                let changes = changes::nbd::since_bitmap(export.uri(), bitmap)?;
                (newer.open()?, changes)
            }
            _ => return Err(Error::usage("the two devices are not of one kind")),
        };
        if base.len()? != changes.map.len() {
            return Err(Error::failed("has another length than when it was compared").on(base.name()));
        }
        Ok((base, changes))
    }

    /// Whether `newer` is another volume of the same pool. Nothing is read of the metadata.
    pub fn can_be_older_than(&self, newer: &FileSource) -> bool {
        match (self, newer) {
            (Self::Path(older), FileSource::Path(newer)) => changes::look_comparable(older, newer, &Context::default()),
            (Self::Volume(older), FileSource::Volume(newer)) => older.id() != newer.id(),
            _ => false,
        }
    }
}

/// An older snapshot that was compared.
pub(super) struct OpenedOlder {
    pub(super) source: OlderSource,
    /// The device that its path led to before it was opened.
    identity: Option<FileIdentity>,
}

impl OpenedOlder {
    /// Called before the comparison: a path that leads elsewhere from then on is noticed.
    pub(super) fn new(source: OlderSource) -> Self {
        Self { identity: source.identity(), source }
    }

    /// Whether the path still leads to the same device.
    pub(super) fn is_at_its_path(&self) -> bool {
        self.source.identity() == self.identity
    }
}
