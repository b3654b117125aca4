//! Work in another mount namespace (`-N` of mount(8)): only the mount itself happens there, as mount(8) documents it.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns, unshare};

use crate::error::{Error, ErrorKind, Result};

/// The mount namespace that a mount belongs to.
#[derive(Clone, Debug)]
pub struct Namespace {
    /// `None` is the one that this process lives in.
    other: Option<Arc<File>>,
}

impl Namespace {
    /// The namespace behind `path`, such as `/proc/PID/ns/mnt`, or this process's own.
    ///
    /// # Errors
    /// When `path` cannot be opened.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let open = |path: &Path| {
            let file = File::open(path).map(Arc::new);
            file.map_err(|e| Error::usage("cannot enter this mount namespace").on(path).because(e))
        };
        Ok(Self { other: path.map(open).transpose()? })
    }

    /// Whether it is not the one that this process lives in.
    pub fn is_other(&self) -> bool {
        self.other.is_some()
    }

    /// Runs `work` in the namespace. Its paths must be absolute: the way there and back ends in the root directory.
    ///
    /// # Errors
    /// Those of `work`, or a usage error when the kernel does not let this process enter.
    pub fn within<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(other) = &self.other else { return work() };
        let cannot = |e: std::io::Error| Error::usage("cannot enter the mount namespace").because(e);
        let own = File::open("/proc/thread-self/ns/mnt").map_err(cannot)?;
        // The kernel lets no thread go that shares its root and working directory with others.
        unshare(CloneFlags::CLONE_FS).map_err(|e| cannot(e.into()))?;
        setns(other, CloneFlags::CLONE_NEWNS).map_err(|e| cannot(e.into()))?;
        let result = work();
        setns(&own, CloneFlags::CLONE_NEWNS)
            .map_err(|e| Error::new(ErrorKind::Internal, "cannot come back from the mount namespace").because(e))?;
        result
    }
}
