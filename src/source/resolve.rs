//! Goes down a stack of block devices, from one device to the sources of its extents.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::sync::{Arc, Weak};

use crate::map::{Clip, HoleMap, Written, WrittenRanges};
use crate::reason::DenseReason;
use crate::source::device::{BlockDevice, MediumGuard, SizeGuard};
use crate::source::live::StaticDevices;
use crate::source::stack::{Dirty, Stack};
use crate::source::stored::{LoadExtents, StoredExtents};
use crate::source::table::{Medium, SOURCES, Source};
use crate::source::{Guard, Layer, below, dense, dm, nbd, thin};
use crate::sys::device::DeviceId;
use crate::sys::sysfs::{self, SuspendFile};
use crate::units::{Bytes, Sectors};

/// A stack deeper than this is taken for a mistake.
const MAX_DEPTH: usize = 32;

/// What all stacks share: the control device, the readers of thin pools, and the options of the user.
#[derive(Default)]
pub struct Context {
    /// What device-mapper sources share.
    pub dm: Arc<dm::SharedControl>,
    /// What readers of live thin pools share.
    pub thin: Arc<thin::shared_reads::SharedReadsByPool>,
    /// Whether no metadata snapshot of a thin pool may be taken: for a command that must change nothing on the system.
    pub no_metadata_snapshots: bool,
    /// The export that the kernel's NBD device is connected to.
    pub nbd: Option<Arc<nbd::SideExport>>,
    /// The devices that nobody writes to, with `-o static`.
    pub static_devices: Option<StaticDevices>,
}

impl Context {
    /// The same for one question about all of a device. The devices that must be asked live are asked for each range once, as all
    /// answers come after the question: not again for each extent. `limit` is the memory that the extents may take.
    pub fn for_one_question(&self, limit: Bytes) -> Self {
        let static_devices = Some(StaticDevices::for_one_question(limit));
        Self {
            dm: self.dm.clone(),
            thin: self.thin.clone(),
            no_metadata_snapshots: self.no_metadata_snapshots,
            nbd: self.nbd.clone(),
            static_devices,
        }
    }
}

/// The layers of several legs, and the window on each.
pub type Windows = (Vec<Arc<Layer>>, Vec<Arc<dyn HoleMap>>);

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
    /// Weak: extents that no layer uses in the end, since a layer above them is dense, are not to be loaded.
    stored: Vec<Weak<StoredExtents>>,
    written: Vec<Arc<WrittenRanges>>,
}

impl<'a> Resolver<'a> {
    pub(super) fn new(context: &'a Context) -> Self {
        Self {
            context,
            guards: Vec::new(),
            dirty: Vec::new(),
            waits_on: HashMap::new(),
            above: Vec::new(),
            known: HashMap::new(),
            stored: Vec::new(),
            written: Vec::new(),
        }
    }

    /// The stack with that top layer. Stored extents that none of its layers uses are left out, because their `Weak` pointers
    /// no longer lead to anything.
    pub(super) fn finish(self, top: Arc<Layer>) -> Stack {
        drop(self.known);
        let stored = self.stored.iter().filter_map(Weak::upgrade).collect();
        let suspendable = self.waits_on.into_values().flatten().collect();
        Stack { top, guards: self.guards, dirty: self.dirty, suspendable, stored, written: self.written }
    }

    /// Names extents that loading the stack is to read: as [`StoredExtents::new`].
    pub fn stored(
        &mut self,
        len: Bytes,
        block: Bytes,
        allocated: Option<Bytes>,
        source: impl LoadExtents + 'static,
    ) -> Arc<StoredExtents> {
        let stored = StoredExtents::new(len, block, allocated, source);
        self.stored.push(Arc::downgrade(&stored));
        stored
    }

    /// The extents of a device, of which the ranges that this process writes are data from then on.
    pub fn followed(&mut self, base: Arc<dyn HoleMap>, ranges: Arc<WrittenRanges>) -> Arc<dyn HoleMap> {
        self.written.push(ranges.clone());
        Arc::new(Written { base, ranges })
    }

    /// Whether the stack has extents that are stored in metadata so far. Loading reads them before any other source is
    /// queried, whatever the order of the layers.
    pub fn has_stored(&self) -> bool {
        self.stored.iter().any(|stored| stored.strong_count() > 0)
    }

    /// Adds a guard: the extents of the stack are valid only as long as it is unchanged.
    pub fn guard(&mut self, guard: impl Guard + 'static) {
        self.guards.push(Box::new(guard));
    }

    /// Whether the device that is being resolved is one of LVM, or below one: only LVM writes to what is below those.
    pub(super) fn is_below_lvm(&self) -> bool {
        self.above.iter().any(|id| below::is_of_lvm(*id))
    }

    /// Names a device for which reads and writes of the stack wait while it, or a device below it, is suspended.
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

    /// Names a device that is read through its page cache, and has no layer. Returns whether its dirty pages will be written back.
    pub(super) fn read_cached(&mut self, id: DeviceId) -> bool {
        let device = self.waits_on(id).and_then(|()| BlockDevice::open_id(id));
        device.map(|device| self.dirty.push(Dirty::Device(device.file))).is_ok()
    }

    /// The layer of the block device with that number. `len` is the length that the layer above needs. It is used for a
    /// device that cannot be opened.
    pub fn device(&mut self, id: DeviceId, len: Bytes) -> Arc<Layer> {
        if let Some(layer) = self.known.get(&id) {
            return layer.clone();
        }
        match BlockDevice::open_id(id) {
            Ok(device) => self.opened(&device),
            Err(error) => {
                let reason = DenseReason::cannot("open it", &error);
                Arc::new(Layer { device: Some(id), ..dense::layer(id.to_string(), "block device", len, reason) })
            }
        }
    }

    /// The layer of the block device with that number, and the window of `len` bytes at `start` on it. `None` if the end of
    /// the window is beyond 64 bits.
    pub fn window(&mut self, id: DeviceId, start: Sectors, len: Bytes) -> Option<(Arc<Layer>, Clip)> {
        let start = start.bytes()?;
        let below = self.device(id, start.checked_add(len)?);
        let clip = Clip { inner: below.map.clone(), start, len };
        Some((below, clip))
    }

    /// As [`Resolver::window`], for the windows of several legs: all layers, and all windows, in the order of `legs`.
    pub fn windows(&mut self, legs: impl IntoIterator<Item = (DeviceId, Sectors, Bytes)>) -> Option<Windows> {
        let (mut layers, mut maps): Windows = (Vec::new(), Vec::new());
        for (id, start, len) in legs {
            let (layer, clip) = self.window(id, start, len)?;
            layers.push(layer);
            maps.push(Arc::new(clip));
        }
        Some((layers, maps))
    }

    /// The layer of an open block device.
    pub fn opened(&mut self, device: &BlockDevice) -> Arc<Layer> {
        let refused = if self.above.contains(&device.id) {
            Some("it is below itself in its stack")
        } else if self.above.len() >= MAX_DEPTH {
            Some("its stack is too deep")
        } else {
            None
        };
        if let Some(reason) = refused {
            return Arc::new(dense_device(device, reason));
        }
        // Devices below a dense layer too: writing back its dirty pages waits for all of them. If it is not known whether
        // that would wait, the dirty pages are not written back, and the layer is dense.
        if let Err(error) = self.waits_on(device.id) {
            return Arc::new(dense_device(device, DenseReason::cannot("find out whether it is suspended", &error)));
        }
        self.above.push(device.id);
        // The guards before anything is read: a change from here on is seen.
        let size = SizeGuard::new(device);
        let whole = size.whole();
        self.guard(size);
        let medium = MediumGuard::new(device);
        let layer = match whole {
            Some(whole) => without_tail(self.layer_of(device, medium), whole),
            None => dense_device(device, "its logical block size is not known"),
        };
        let layer = Arc::new(Layer { device: Some(device.id), ..layer });
        self.above.pop();
        // After all layers below it: writing back the pages of this device makes pages of those dirty.
        self.dirty.push(Dirty::Device(device.file.clone()));
        self.known.insert(device.id, layer.clone());
        layer
    }

    fn layer_of(&mut self, device: &BlockDevice, medium: MediumGuard) -> Layer {
        let source = source_of(device.id);
        if !matches!(source, Ok(Some(Source { medium: Medium::Source, .. }))) {
            self.guard(medium);
        }
        match source {
            Ok(Some(source)) => (source.layer)(device, self),
            Ok(None) => dense_device(device, "this kind of device does not report its holes"),
            Err(error) => dense_device(device, DenseReason::cannot("find out from sysfs what it is", &error)),
        }
    }
}

/// The layer of a device that has no source, or none that can be used.
fn dense_device(device: &BlockDevice, reason: impl Into<DenseReason>) -> Layer {
    Layer { device: Some(device.id), ..dense::layer(device.name(), "block device", device.len, reason) }
}

/// The source for a device; `None` for a device of another kind.
fn source_of(id: DeviceId) -> io::Result<Option<&'static Source>> {
    for source in &SOURCES {
        if (source.recognizes)(id)? {
            return Ok(Some(source));
        }
    }
    Ok(None)
}

/// The layer with data from `whole` on: a last sector that is not whole cannot be read on some kernels, and is no hole.
fn without_tail(layer: Layer, whole: Bytes) -> Layer {
    let len = layer.len();
    if whole >= len {
        return layer;
    }
    // A window is data beyond the end of the map that it is a window of.
    let below = Arc::new(Clip { inner: layer.map.clone(), start: Bytes::ZERO, len: whole });
    Layer { map: Arc::new(Clip { inner: below, start: Bytes::ZERO, len }), ..layer }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::FillMap;

    struct Unreadable;

    impl LoadExtents for Unreadable {
        fn load(&self) -> Result<FillMap, DenseReason> {
            Err("not read".into())
        }
    }

    #[test]
    fn stored_extents_count_as_long_as_a_layer_uses_them() {
        let context = Context::default();
        let mut resolver = Resolver::new(&context);
        assert!(!resolver.has_stored());
        let stored = resolver.stored(Bytes::ZERO, Bytes::new(512), None, Unreadable);
        assert!(resolver.has_stored());
        drop(stored);
        assert!(!resolver.has_stored());
    }
}
