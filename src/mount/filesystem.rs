//! What is mounted: the file system of a SPEC, ready to serve, and what signals ask of it.

use std::sync::Arc;

use crate::error::Result;
use crate::fs::FileSystem;
use crate::fuse::BlkHoleFs;
use crate::mount::options::ParsedOptions;
use crate::mount::point::Shape;
use crate::mount::serve::Hooks;
use crate::spec::Spec;

/// A file system that is ready to be mounted.
pub struct Opened {
    /// What answers the kernel.
    pub filesystem: BlkHoleFs,
    /// What signals ask of it.
    pub hooks: Hooks,
}

/// Opens and probes `spec`. No thread is started: the daemon is forked after this.
///
/// # Errors
/// When `spec` cannot be shown, or is a directory and `shape` is not.
pub fn open(spec: &Spec, shape: Shape, options: &ParsedOptions) -> Result<Opened> {
    let mount = &options.mount;
    let mut fs = FileSystem::new(spec, &options.source, mount.ownership(), mount.map_cache)?;
    if shape == Shape::File {
        fs.show_as_file()?;
    }
    let fs = Arc::new(fs);
    let (dropper, counter) = (fs.clone(), fs.clone());
    let hooks = Hooks {
        drop_maps: Box::new(move || dropper.drop_maps()),
        log_counters: Box::new(move || counter.log_counters()),
    };
    Ok(Opened { filesystem: BlkHoleFs::new(fs, mount.direct_io), hooks })
}
