//! Where the stacks of open devices are dropped, which closes what they hold open and may take long.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use super::*;
use crate::export::{Export, HostNode, MIN_ALIGN};
use crate::fs::Ownership;
use crate::fs::share::OpenDevice;
use crate::handle::Handle;
use crate::map::view::Whence;
use crate::map::{Extent, ExtentKind, HoleMap};
use crate::reason::Degraded;
use crate::source::{Context, Layer, Stack};
use crate::spec::Spec;
use crate::sys::buffer::AlignedBuffer;

const LEN: Bytes = Bytes::new(1 << 20);

/// What the maps of a device do.
#[derive(Default)]
struct Observer {
    fs: OnceLock<Weak<FileSystem>>,
    /// A device whose stack is replaced while it is looked at.
    handle: OnceLock<Weak<Handle>>,
    /// For each map that was dropped, whether the open devices were locked.
    dropped: Mutex<Vec<bool>>,
}

/// A map that notes where it is dropped.
struct Observed(Arc<Observer>);

impl HoleMap for Observed {
    fn len(&self) -> Bytes {
        LEN
    }

    fn extent_at(&self, _offset: Bytes) -> Extent {
        Extent { end: LEN, kind: ExtentKind::Hole }
    }

    fn degraded(&self) -> Option<Degraded> {
        // As a guard that finds a change, while the state of the device is looked at.
        drop(self.0.handle.get()?.upgrade()?.drop_map());
        None
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        let Some(fs) = self.0.fs.get().and_then(Weak::upgrade) else { return };
        let is_locked = fs.devices.try_lock().is_err();
        self.0.dropped.lock().unwrap().push(is_locked);
    }
}

struct Device(Arc<Observer>);

impl Export for Device {
    fn name(&self) -> &Path {
        Path::new("device")
    }

    fn size(&self) -> io::Result<Bytes> {
        Ok(LEN)
    }

    fn align(&self) -> Bytes {
        MIN_ALIGN
    }

    fn read_at(&self, _buffer: &mut AlignedBuffer, _offset: Bytes, _size: usize) -> io::Result<Range<usize>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn resolve(&self, context: &Context) -> Stack {
        let (name, kind, map) = ("device".to_owned(), "test".to_owned(), Arc::new(Observed(self.0.clone())));
        let layer = Layer { name, kind, holes_from: "a test".to_owned(), map, device: None, below: Vec::new() };
        Stack::build(context, |_| Arc::new(layer))
    }

    fn host_node(&self) -> io::Result<HostNode> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A file system with one open device, whose map is loaded.
fn opened() -> (Arc<FileSystem>, Arc<Handle>, Arc<Observer>) {
    let image = tempfile::NamedTempFile::new().unwrap();
    let spec = Spec::parse(image.path().as_os_str()).unwrap();
    let ownership = Ownership { uid: None, gid: None, mode: 0o777, is_writable: false };
    let fs = Arc::new(FileSystem::new(&spec, &Default::default(), ownership, Default::default()).unwrap());
    let observer = Arc::<Observer>::default();
    let handle = Arc::new(Handle::new(Arc::new(Device(observer.clone())), Arc::default(), Arc::default()));
    assert_eq!(handle.seek(Bytes::ZERO, Whence::Hole).unwrap(), Some(Bytes::ZERO));
    fs.lock_devices().by_ino.insert(crate::fs::ROOT, OpenDevice::new(handle.clone()));
    observer.fs.set(Arc::downgrade(&fs)).unwrap();
    (fs, handle, observer)
}

#[test]
fn a_stack_that_is_replaced_during_the_status_is_closed_after_the_lock() {
    let (fs, handle, observer) = opened();
    assert!(observer.handle.set(Arc::downgrade(&handle)).is_ok());
    assert_eq!(fs.status().files.len(), 1);
    assert_eq!(*observer.dropped.lock().unwrap(), [false]);
}

#[test]
fn stacks_that_a_signal_drops_are_closed_after_the_lock() {
    let (fs, _handle, observer) = opened();
    fs.drop_maps();
    assert_eq!(*observer.dropped.lock().unwrap(), [false]);
}
