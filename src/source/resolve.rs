//! The one factory: a device to its stack of layers.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::map::{Clip, HoleMap};
use crate::source::device::{BlockDevice, MediumGuard, SizeGuard};
use crate::source::file::Reads;
use crate::source::{Guard, Layer, dense, dm, file, loop_device, md, nbd, nvme, partition, scsi, thin};
use crate::sys::device::DeviceId;
use crate::sys::file::write_through;
use crate::sys::sysfs::SuspendFile;
use crate::sys::{block, sysfs};
use crate::units::{Bytes, Sectors};

/// A stack deeper than this is a mistake; no kernel allows as much (`DM_MAX_...` and the loop driver stop far earlier).
const MAX_DEPTH: usize = 32;

/// The loop driver's major number (`Documentation/admin-guide/devices.txt`).
const LOOP_MAJOR: u32 = 7;

/// What outlives a single resolve: the control device, and what the user chose.
#[derive(Default)]
pub struct Context {
    /// What device-mapper sources share.
    pub dm: dm::Shared,
    /// What readers of live thin pools share.
    pub thin: thin::pool::Readers,
    /// The export that the kernel's NBD device is connected to.
    pub nbd: Option<nbd::SideExport>,
}

/// A device, all the way down.
pub struct Stack {
    /// The device itself; the layers below it hang on it.
    pub top: Arc<Layer>,
    guards: Vec<Box<dyn Guard>>,
    /// From the bottom up.
    dirty: Vec<Dirty>,
    waits_on: Vec<SuspendFile>,
}

/// What has a page cache that may hold writes of which the layers below do not know.
enum Dirty {
    Device(Arc<File>),
    File(File),
}

impl Dirty {
    fn write_back(&self) -> io::Result<()> {
        match self {
            Self::Device(device) => block::write_back(device),
            Self::File(file) => write_through(file),
        }
    }
}

impl Stack {
    /// Resolves an open block device.
    pub fn of_device(device: &BlockDevice, context: &Context) -> Self {
        Self::build(context, |resolver| resolver.opened(device))
    }

    /// Resolves an open regular file that is read so.
    pub fn of_file(file: &File, path: &Path, len: Bytes, reads: Reads, context: &Context) -> Self {
        Self::build(context, |resolver| Arc::new(file::layer(file, path, len, reads, resolver)))
    }

    /// Resolves anything: `top` asks the resolver for what it stands on, and adds a guard for its own length if that
    /// can change.
    pub fn build(context: &Context, top: impl FnOnce(&mut Resolver<'_>) -> Arc<Layer>) -> Self {
        let mut resolver = Resolver {
            context,
            guards: Vec::new(),
            dirty: Vec::new(),
            waits_on: HashMap::new(),
            above: Vec::new(),
            known: HashMap::new(),
        };
        let top = top(&mut resolver);
        let waits_on = resolver.waits_on.into_values().flatten().collect();
        Self { top, guards: resolver.guards, dirty: resolver.dirty, waits_on }
    }

    /// The same stack, all data for that reason.
    #[must_use]
    pub fn shown_as_data(self, reason: &str) -> Self {
        let below = self.top;
        let top = dense::layer(below.name.clone(), below.kind.clone(), below.len(), reason);
        Self { top: Arc::new(Layer { device: below.device, below: vec![below], ..top }), ..self }
    }

    /// The holes of the whole device.
    pub fn map(&self) -> &dyn HoleMap {
        &*self.top.map
    }

    /// Whether the map may still be believed: nothing happened to any layer since it was made.
    pub fn unchanged(&self) -> bool {
        self.guards.iter().all(|guard| guard.unchanged())
    }

    /// Whether every layer is still built as it was; what is stored may have changed.
    pub fn same_shape(&self) -> bool {
        self.guards.iter().all(|guard| guard.is_of_content() || guard.unchanged())
    }

    /// A number that changes when a layer is built otherwise, or a file at the bottom was written.
    pub fn trace(&self) -> u64 {
        let mut trace = DefaultHasher::new();
        self.guards.iter().for_each(|guard| guard.trace(&mut trace));
        trace.finish()
    }

    /// Writes back the dirty pages of every layer, from the top down: only then do the layers below know of a write.
    ///
    /// Returns whether all of it was written. A suspended device is not waited for, and answers `false`.
    pub fn write_back(&self) -> bool {
        // A device that is suspended between this look and the write still blocks until its resume; LVM keeps that to
        // milliseconds, and a read would wait for it all the same.
        !self.suspended() && self.dirty.iter().rev().all(|dirty| dirty.write_back().is_ok())
    }

    /// Whether a device-mapper device of the stack is suspended, so that reads and writes wait for its resume.
    pub fn suspended(&self) -> bool {
        self.waits_on.iter().any(SuspendFile::is_suspended)
    }
}

/// Resolves one stack; collects its guards on the way.
pub struct Resolver<'a> {
    /// What outlives this resolve.
    pub context: &'a Context,
    guards: Vec<Box<dyn Guard>>,
    dirty: Vec<Dirty>,
    /// Every device that was named, with the attribute of those that can be suspended.
    waits_on: HashMap<DeviceId, Option<SuspendFile>>,
    above: Vec<DeviceId>,
    known: HashMap<DeviceId, Arc<Layer>>,
}

impl Resolver<'_> {
    /// Adds what must stay unchanged for the map to be believed.
    pub fn guard(&mut self, guard: impl Guard + 'static) {
        self.guards.push(Box::new(guard));
    }

    /// Names a device that reads and writes of the stack wait for, while it or a device that it stands on is suspended.
    ///
    /// # Errors
    /// When it cannot be known whether one of them is suspended.
    pub fn waits_on(&mut self, id: DeviceId) -> io::Result<()> {
        let mut next = vec![id];
        while let Some(id) = next.pop() {
            if let Entry::Vacant(entry) = self.waits_on.entry(id) {
                // Both before the entry: what failed is tried again.
                let (attribute, slaves) = (SuspendFile::open(id)?, sysfs::slaves(id)?);
                entry.insert(attribute);
                next.extend(slaves);
            }
        }
        Ok(())
    }

    /// Names a file whose file system may not know of the writes that its page cache holds.
    pub fn written_through(&mut self, file: File) {
        self.dirty.push(Dirty::File(file));
    }

    /// The layer of the block device with that number. `len` is its length as the asking layer needs it, for a device
    /// that cannot even be opened.
    pub fn device(&mut self, id: DeviceId, len: Bytes) -> Arc<Layer> {
        if let Some(layer) = self.known.get(&id) {
            return layer.clone();
        }
        match BlockDevice::open_id(id) {
            Ok(device) => self.opened(&device),
            Err(error) => {
                let reason = format!("cannot open: {}", crate::error::plain(&error));
                Arc::new(Layer { device: Some(id), ..dense::layer(id.to_string(), "block device", len, reason) })
            }
        }
    }

    /// The layer of an open block device.
    pub fn opened(&mut self, device: &BlockDevice) -> Arc<Layer> {
        let refused = if self.above.contains(&device.id) {
            Some("the stack stands on itself")
        } else if self.above.len() >= MAX_DEPTH {
            Some("the stack is too deep")
        } else {
            None
        };
        if let Some(reason) = refused {
            let layer = dense::layer(device.name(), "block device", device.len, reason);
            return Arc::new(Layer { device: Some(device.id), ..layer });
        }
        // Also what stands below a layer that is dense: writing back its dirty pages waits for all of it. Where it is not
        // known whether that would wait, they are not written back, and the layer is dense.
        if let Err(error) = self.waits_on(device.id) {
            let reason = format!("cannot tell whether it is suspended: {}", crate::error::plain(&error));
            let layer = dense::layer(device.name(), "block device", device.len, reason);
            return Arc::new(Layer { device: Some(device.id), ..layer });
        }
        self.above.push(device.id);
        // The guards before anything is read: a change from here on is seen.
        let size = SizeGuard::new(device);
        let whole = size.whole();
        self.guard(size);
        let medium = MediumGuard::new(device);
        let layer = match whole {
            Some(whole) => without_tail(self.dispatch(device, medium), whole),
            None => dense::layer(device.name(), "block device", device.len, "its logical block size is not known"),
        };
        let layer = Arc::new(Layer { device: Some(device.id), ..layer });
        self.above.pop();
        // After everything that it stands on: what is written back from here makes that dirty, by whatever way.
        self.dirty.push(Dirty::Device(device.file.clone()));
        self.known.insert(device.id, layer.clone());
        layer
    }

    fn dispatch(&mut self, device: &BlockDevice, medium: MediumGuard) -> Layer {
        let kind = match Kind::of(device.id) {
            Ok(Kind::Loop) => return loop_device::layer(device, medium, self),
            kind => kind,
        };
        self.guard(medium);
        self.layer_of(kind, device).unwrap_or_else(|error| {
            let reason = format!("cannot tell from sysfs what it is: {}", crate::error::plain(&error));
            dense::layer(device.name(), "block device", device.len, reason)
        })
    }

    fn layer_of(&mut self, kind: io::Result<Kind>, device: &BlockDevice) -> io::Result<Layer> {
        Ok(match kind? {
            Kind::Partition { disk, start } => partition::layer(device, disk, start, self),
            Kind::Nbd => nbd::device_layer(device, self),
            Kind::DeviceMapper => dm::layer(device, self),
            Kind::Md => md::layer(device, self),
            Kind::Scsi => scsi::disk_layer(device),
            Kind::Nvme => nvme::layer(device),
            Kind::Loop | Kind::Other => {
                dense::layer(device.name(), "block device", device.len, "this kind of device does not tell its holes")
            }
        })
    }
}

/// The layer with data from `whole` on: a last sector that is not whole cannot be read on some kernels, and is no hole.
fn without_tail(layer: Layer, whole: Bytes) -> Layer {
    let len = layer.len();
    if whole >= len {
        return layer;
    }
    // Beyond the end of what it shows, a window is data.
    let below = Arc::new(Clip { inner: layer.map.clone(), start: Bytes::ZERO, len: whole });
    Layer { map: Arc::new(Clip { inner: below, start: Bytes::ZERO, len }), ..layer }
}

/// What a device is.
enum Kind {
    Partition { disk: DeviceId, start: Sectors },
    Loop,
    Nbd,
    DeviceMapper,
    Md,
    Scsi,
    Nvme,
    Other,
}

impl Kind {
    /// Looks into sysfs. An attribute that cannot be read is an error: a device that is taken for one of another kind has
    /// the holes of other bytes.
    fn of(id: DeviceId) -> io::Result<Self> {
        if let Some((disk, start)) = sysfs::partition(id)? {
            return Ok(Self::Partition { disk, start });
        }
        Ok(match id.major {
            LOOP_MAJOR => Self::Loop,
            nbd::MAJOR => Self::Nbd,
            _ if sysfs::bytes(id, "dm/name")?.is_some() => Self::DeviceMapper,
            _ if md::is_array(id)? => Self::Md,
            _ if scsi::is_disk(id) => Self::Scsi,
            _ if nvme::is_nvme(id) => Self::Nvme,
            _ => Self::Other,
        })
    }
}
