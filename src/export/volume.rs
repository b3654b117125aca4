//! A volume of a pool that is not active, as an export: its bytes are read through its mapping tree.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Export, HostNode, MIN_ALIGN};
use crate::map::FillMap;
use crate::reason::DenseReason;
use crate::source::thin::offline::{OfflinePool, Volume};
use crate::source::{Context, Guard, Layer, LoadExtents, Stack, dense};
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// Why a volume can be shown no longer.
const CHANGED: &str = "the metadata changed while it was open";
/// Why a volume has no holes.
const UNPROVEN: &str = "that the metadata image stays as it is cannot be proven: its times are another machine's, or the \
                        clock was set";

/// A volume as a file.
pub struct VolumeExport {
    name: PathBuf,
    volume: Arc<Volume>,
}

impl VolumeExport {
    /// Shows a volume.
    pub fn new(volume: impl Into<Arc<Volume>>) -> Self {
        let volume = volume.into();
        let name = volume.pool().metadata_path().join(volume.id().to_string());
        Self { name, volume }
    }

    fn pool(&self) -> &Arc<OfflinePool> {
        self.volume.pool()
    }
}

impl Export for VolumeExport {
    fn name(&self) -> &Path {
        &self.name
    }

    fn size(&self) -> io::Result<Bytes> {
        Ok(self.volume.len())
    }

    fn align(&self) -> Bytes {
        MIN_ALIGN
    }

    fn read_at(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
        self.volume.fill(buffer.resize(size), offset)?;
        if !self.pool().looks_unchanged() {
            return Err(io::Error::other(CHANGED));
        }
        Ok(0..size)
    }

    fn resolve(&self, context: &Context) -> Stack {
        let (volume, pool) = (&self.volume, self.pool());
        Stack::build(context, |resolver| {
            let name = format!("volume {} of {}", volume.id(), pool.metadata_path().display());
            if !pool.is_unchanged() {
                let why = if pool.looks_unchanged() { UNPROVEN } else { CHANGED };
                return Arc::new(dense::layer(name, "thin", volume.len(), DenseReason::Unproven(why.into())));
            }
            resolver.guard(UnchangedMetadata(pool.clone()));
            let tree = OfflineTree(volume.clone());
            let map = resolver.stored(volume.len(), volume.block(), volume.mapped(), tree);
            let holes_from = "its mapping tree".to_owned();
            Arc::new(Layer { name, kind: "thin".to_owned(), holes_from, map, device: None, below: Vec::new() })
        })
    }

    fn host_node(&self) -> io::Result<HostNode> {
        let pool = self.pool();
        // The rights are those of the bytes. Devices have no times: anything may have happened while none was open.
        let (data, metadata) = (HostNode::of_open(pool.data_file())?, HostNode::of_open(pool.metadata_file())?);
        let is_image = |node: &HostNode| node.mode & libc::S_IFMT == libc::S_IFREG;
        let (mtime, ctime) = match is_image(&data) && is_image(&metadata) {
            true => (data.mtime.max(metadata.mtime), data.ctime.max(metadata.ctime)),
            false => (pool.opened(), pool.opened()),
        };
        Ok(HostNode { identity: None, mtime, ctime, ..data })
    }

    fn unit(&self) -> Option<Bytes> {
        Some(self.volume.block())
    }

    fn may_change(&self) -> bool {
        false
    }

    fn is_claimed(&self) -> bool {
        true
    }

    fn is_current(&self) -> bool {
        self.pool().is_unchanged()
    }
}

/// The metadata of a pool to which nobody may write while its volumes are open.
struct UnchangedMetadata(Arc<OfflinePool>);

impl Guard for UnchangedMetadata {
    fn unchanged(&self) -> bool {
        self.0.is_unchanged()
    }
}

/// The mapping tree of a volume.
struct OfflineTree(Arc<Volume>);

impl LoadExtents for OfflineTree {
    fn load(&self) -> Result<FillMap, DenseReason> {
        self.0.map().map_err(DenseReason::from)
    }
}
