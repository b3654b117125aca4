//! Another mount namespace for the mount (`-N` of mount(8)). As mount(8) documents, only the mount is made there; the SPEC
//! is opened in the own namespace.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns, unshare};

use crate::error::{Error, ErrorKind, Result};

/// The mount namespace that a mount belongs to.
#[derive(Clone, Debug)]
pub struct Namespace {
    /// `None` is the namespace of this process.
    other: Option<Arc<File>>,
}

impl Namespace {
    /// The namespace of the file `path`, such as `/proc/PID/ns/mnt`; without a path, that of this process.
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

    /// Whether it is another namespace than that of this process.
    pub fn is_other(&self) -> bool {
        self.other.is_some()
    }

    /// Runs `work` in the namespace. Its paths must be absolute, because setns(2) changes to the root directory.
    ///
    /// # Errors
    /// Those of `work`, or a usage error when the kernel does not let this process enter.
    pub fn within<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(other) = &self.other else { return work() };
        let cannot = |e: std::io::Error| Error::usage("cannot enter the mount namespace").because(e);
        let own = File::open("/proc/thread-self/ns/mnt").map_err(cannot)?;
        // setns(2) refuses a thread that shares its root and working directory with other threads.
        unshare(CloneFlags::CLONE_FS).map_err(|e| cannot(e.into()))?;
        setns(other, CloneFlags::CLONE_NEWNS).map_err(|e| cannot(e.into()))?;
        let result = work();
        setns(&own, CloneFlags::CLONE_NEWNS)
            .map_err(|e| Error::new(ErrorKind::Internal, "cannot return from the mount namespace").because(e))?;
        result
    }
}
