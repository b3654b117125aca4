//! A qcow2 image of a device, made as it is read.

use std::ffi::OsStr;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::{info, warn};

use super::named;
use super::older::OpenedOlder;
use crate::error::{Error, Result, shown};
use crate::export::read_queue::ReadQueue;
use crate::export::{Export, FileIdentity, HostNode, MIN_ALIGN};
use crate::map::{ExtentKind, HoleMap, Uniform, view};
use crate::qcow2::{Backing, BackingFormat, Builder, ClusterSize, Content, Layout, Part};
use crate::reason::DenseReason;
use crate::source::changes::Changes;
use crate::source::dense::Dense;
use crate::source::{Context, Layer, Stack};
use crate::spec::ViewOptions;
use crate::sys::buffer::AlignedBuffer;
use crate::units::Bytes;

/// How often the extents are read again because the device changed while they were read. After that all of it is data.
const MAX_TRIES: usize = 3;

/// The memory for extents that are asked live while a layout is made of them.
const EXTENTS: Bytes = Bytes::new(1 << 20);

/// Why an image has no holes.
const NO_HOLES: &str = "an image holds what is data, and nothing else";

/// Why an image is degraded.
const DEGRADED: &str = "the device was suspended or changed too fast when the image was opened";

/// What the log and `info` say of a device that can be written.
const CAN_CHANGE: &str = "the device can change: make an image of a snapshot for a consistent one";

/// The layout of an image, and what it was made from.
pub struct ImageLayout {
    /// Where each byte of the image comes from.
    pub layout: Layout,
    /// The stack of the device when its extents were read, if its guards notice each change of them.
    guarded: Option<Guarded>,
    /// Whether all of the device is data in it, because its extents could not be read.
    is_degraded: bool,
}

/// What notices that a new layout would be another one.
enum Guarded {
    Device(Stack),
    Changes(Changes, OpenedOlder),
}

/// An image of a device.
pub(super) struct ImageExport {
    name: PathBuf,
    base: Arc<dyn Export>,
    image: ImageLayout,
    identity: FileIdentity,
}

impl ImageExport {
    /// An image that has all data of `base`, as it is now.
    ///
    /// # Errors
    /// When the device is gone, or it is too large for an image.
    pub(super) fn compact(
        base: Arc<dyn Export>,
        options: &ViewOptions,
        identity: FileIdentity,
        context: &Context,
    ) -> Result<Self> {
        let image = ImageLayout::compact(&*base, options, context)?;
        let name = named(&*base, ".qcow2");
        log_open(&name, &*base, &image.layout);
        Ok(Self { name, base, image, identity })
    }

    /// An image of `changes`, which were found in `base` since the snapshot `older`.
    ///
    /// # Errors
    /// When the device is too large for an image.
    pub(super) fn of_changes(
        base: Arc<dyn Export>,
        changes: Changes,
        options: &ViewOptions,
        older: OpenedOlder,
        identity: FileIdentity,
    ) -> Result<Self> {
        let name = named(&*base, &format!(".since-{}.qcow2", shown(Path::new(&older.source.name()))));
        let image = ImageLayout::of_changes(&*base, changes, options, older)?;
        log_open(&name, &*base, &image.layout);
        Ok(Self { name, base, image, identity })
    }

    /// An image in which all of the device is data. It is not shorter than any other image of the device.
    ///
    /// # Errors
    /// When the device is gone, or it is too large for an image.
    pub(super) fn dense(base: Arc<dyn Export>, options: &ViewOptions, identity: FileIdentity) -> Result<Self> {
        let len = base.len()?;
        let layout = build(&*base, options, None, &all_data(len))?;
        Ok(Self {
            name: named(&*base, ".qcow2"),
            base,
            image: ImageLayout { layout, guarded: None, is_degraded: false },
            identity,
        })
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.image.layout
    }

    pub(super) fn device(&self) -> &dyn Export {
        &*self.base
    }

    /// Fills `part` with the bytes of the device from `offset` on.
    fn read_device(&self, part: &mut [u8], offset: Bytes) -> io::Result<()> {
        let mut own = AlignedBuffer::new();
        let range = self.base.read_at(&mut own, offset, part.len())?;
        let bytes = &own.bytes()[range];
        if bytes.len() < part.len() {
            return Err(shorter());
        }
        part.copy_from_slice(&bytes[..part.len()]);
        Ok(())
    }
}

impl ImageLayout {
    /// The layout of an image of `base` as it is now.
    ///
    /// # Errors
    /// When the device is gone, or it is too large for an image.
    pub fn compact(base: &dyn Export, options: &ViewOptions, context: &Context) -> Result<Self> {
        for _ in 0..MAX_TRIES {
            let asked_once = context.static_devices.is_none().then(|| context.for_one_question(EXTENTS));
            let stack = base.stack(asked_once.as_ref().unwrap_or(context));
            if !stack.write_back() {
                continue;
            }
            let loaded = stack.load();
            let len = loaded.map().len();
            let layout = build(base, options, None, loaded.map())?;
            if stack.unchanged() && base.len()? == len {
                let is_guarded = stack.is_guarded() && !loaded.is_temporary;
                let guarded = is_guarded.then(|| Guarded::Device(stack.without_extents()));
                return Ok(Self { layout, guarded, is_degraded: false });
            }
        }
        warn!("{}: it is suspended or changes too fast: all of it is data in the image", shown(base.name()));
        let len = base.len()?;
        Ok(Self { layout: build(base, options, None, &all_data(len))?, guarded: None, is_degraded: true })
    }

    /// The layout of an image of what changed in `base` since the snapshot `older`.
    ///
    /// # Errors
    /// When the device is too large for an image.
    pub fn of_changes(base: &dyn Export, changes: Changes, options: &ViewOptions, older: OpenedOlder) -> Result<Self> {
        let layout = build(base, options, Some(backing(options, &older.source.name())), &changes.map)?;
        Ok(Self { layout, guarded: Some(Guarded::Changes(changes, older)), is_degraded: false })
    }

    /// Whether a layout that is made now would be the same.
    fn is_current(&self) -> bool {
        match &self.guarded {
            Some(Guarded::Device(stack)) => stack.write_back() && stack.unchanged(),
            Some(Guarded::Changes(changes, older)) => older.is_at_its_path() && changes.is_current(),
            None => false,
        }
    }
}

fn build(base: &dyn Export, options: &ViewOptions, backing: Option<Backing>, map: &dyn HoleMap) -> Result<Layout> {
    let (len, align) = (map.len(), base.align());
    let failed = |what: &str| Error::failed(what).on(base.name());
    let unit = base.unit().unwrap_or(MIN_ALIGN);
    let cluster = options.cluster_size.or_else(|| ClusterSize::for_block(unit, len));
    let cluster = cluster.ok_or_else(|| failed("is too large for a qcow2 image"))?;
    // Clusters are whole units, so no hole of the map has to be rounded inwards.
    let is_whole = cluster.bytes().align_down(align) == cluster.bytes();
    let of_blocks = map.fill_map().filter(|blocks| backing.is_none() && is_whole && blocks.len() == len);
    let layout = of_blocks.and_then(|blocks| Layout::of_blocks(blocks, cluster)).unwrap_or_else(|| {
        let mut builder = Builder::new(len, cluster, backing);
        for (start, extent) in view::runs(map, align, Bytes::ZERO..len) {
            builder.push(start..extent.end, extent.kind);
        }
        builder.finish()
    });
    layout.map_err(|error| failed("cannot be shown as a qcow2 image").because(error))
}

/// The map of a device of which nothing is known.
fn all_data(len: Bytes) -> Uniform {
    Uniform { len, kind: ExtentKind::Data }
}

/// The backing file of an image of changes: the one that the user names, or a copy of the snapshot `older` beside the image.
fn backing(options: &ViewOptions, older: &OsStr) -> Backing {
    match &options.backing {
        Some(name) => {
            let name = name.as_encoded_bytes().to_vec();
            let format = if name.ends_with(b".qcow2") { BackingFormat::Qcow2 } else { BackingFormat::Raw };
            Backing { name, format }
        }
        None => {
            let name = older.as_encoded_bytes();
            // QEMU takes what is before a colon for a protocol (`path_has_protocol` of `util/path.c` and `block.c`).
            let folder: &[u8] = if name.contains(&b':') { b"./" } else { b"" };
            // A device is raw whatever its name is. QEMU must not read a header that a guest has written into it.
            Backing { name: [folder, name].concat(), format: BackingFormat::Raw }
        }
    }
}

fn log_open(name: &Path, base: &dyn Export, layout: &Layout) {
    info!("{}: an image of {} bytes{}", shown(name), layout.len(), warning(base));
}

/// What is added to a description of an image of that device.
fn warning(base: &dyn Export) -> String {
    if base.may_change() { format!("; {CAN_CHANGE}") } else { String::new() }
}

fn shorter() -> io::Error {
    io::Error::other("the device has become shorter since the image was opened")
}

impl Export for ImageExport {
    fn name(&self) -> &Path {
        &self.name
    }

    fn size(&self) -> io::Result<Bytes> {
        Ok(self.image.layout.len())
    }

    fn align(&self) -> Bytes {
        MIN_ALIGN
    }

    fn read_at(&self, buffer: &mut AlignedBuffer, offset: Bytes, size: usize) -> io::Result<Range<usize>> {
        let layout = &self.image.layout;
        let end = offset.saturating_add(Bytes::new(size as u64)).min(layout.len());
        let mut parts = layout.parts(offset..end).peekable();
        // Mostly it is one range of the device, and no byte needs to be copied.
        if let Some(Part { range, content: Content::Device(at) }) = parts.peek()
            && range.end == end
        {
            let range = self.base.read_at(buffer, *at, size)?;
            return if range.len() < size { Err(shorter()) } else { Ok(range) };
        }
        let bytes = buffer.resize(size);
        for part in parts {
            let inside = part.range.start.index_from(offset)..part.range.end.index_from(offset);
            match part.content {
                Content::Metadata => layout.fill_metadata(part.range.start, &mut bytes[inside]),
                Content::Zeros => bytes[inside].fill(0),
                Content::Device(device) => self.read_device(&mut bytes[inside], device)?,
            }
        }
        Ok(0..end.index_from(offset))
    }

    fn read_queue(&self) -> Option<&dyn ReadQueue> {
        self.base.read_queue().map(|_| self as &dyn ReadQueue)
    }

    fn resolve(&self, context: &Context) -> Stack {
        let layout = &self.image.layout;
        let (name, len) = (shown(&self.name).to_string(), layout.len());
        let (clusters, size) = (layout.data_clusters(), layout.cluster_size().bytes());
        let kind = format!("qcow2 image with {clusters} data clusters of {size} bytes");
        let holes_from = format!("none: {NO_HOLES}{}", warning(&*self.base));
        let map: Arc<dyn HoleMap> = match self.image.is_degraded {
            true => Arc::new(Dense::new(len, DenseReason::State(DEGRADED.into()))),
            false => Arc::new(Uniform { len, kind: ExtentKind::Data }),
        };
        let layer = Layer { name, kind, holes_from, map, device: None, below: Vec::new() };
        Stack::build(context, |_| Arc::new(layer))
    }

    fn host_node(&self) -> io::Result<HostNode> {
        Ok(HostNode { identity: Some(self.identity), ..self.base.host_node()? })
    }

    fn identity(&self) -> Option<FileIdentity> {
        Some(self.identity)
    }

    fn base(&self) -> Option<&Arc<dyn Export>> {
        Some(&self.base)
    }

    fn is_current(&self) -> bool {
        super::is_at_its_path(&*self.base) && self.image.is_current()
    }
}
