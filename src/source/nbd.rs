//! NBD: exports of a server, through a client of this program.
//!
//! The kernel's client, `/dev/nbdN`, has no structured replies and so no block status, which reports holes. The client
//! here has. It reads an export, or it queries the block status of the export that the kernel's client is connected to.
//!
//! A [`Uri`] names an export. A [`Client`] reads it and queries its block status (`base:allocation`); a hole is an
//! extent with the ZERO bit. An [`ExportWriter`] writes to it. The server is not trusted: it can make an export dense or unreadable, and nothing else.
//! The protocol is that of `doc/proto.md` of the NBD project.

mod begun;
mod bitmap;
mod client;
mod connect;
mod connection;
mod export;
pub mod frame;
mod kernel_connection;
mod pool;
pub mod proto;
pub mod reply;
mod side_export;
mod status;
mod stream;
mod tls;
mod unflushed;
pub mod uri;
mod writer;

use std::io;
use std::sync::Arc;

pub use begun::BegunRead;
pub use bitmap::{BitmapExport, BitmapStatus};
pub use client::Client;
pub use export::NbdExport;
pub use pool::Timeouts;
pub use side_export::SideExport;
pub use status::FlushBeforeStatus;
pub use uri::Uri;
pub use writer::ExportWriter;

use self::kernel_connection::KernelConnectionGuard;
use self::status::ExportStatus;
use crate::map::HoleMap;
use crate::reason::DenseReason;
use crate::source::live::{LiveMap, WriteEvidence};
use crate::source::{BlockDevice, Context, Layer, Resolver, dense};
use crate::sys::device::DeviceId;

/// The kind of the layer of an export.
const KIND: &str = "NBD export";

/// The layer of an export that is read through the same client.
pub fn layer(client: Arc<Client>, context: &Context) -> Layer {
    // No flush is needed: a client of an export that can be written has only one connection.
    layer_of(ExportStatus { client, flush: FlushBeforeStatus::No, evidence: WriteEvidence::none() }, context)
}

/// The holes of an export, which is asked at each question. No query is sent yet.
pub fn map(client: Arc<Client>, flush: FlushBeforeStatus) -> impl HoleMap + 'static {
    LiveMap::new(ExportStatus { client, flush, evidence: WriteEvidence::none() }, None)
}

fn layer_of(status: ExportStatus, context: &Context) -> Layer {
    Layer {
        name: status.client.uri().to_string(),
        kind: KIND.to_owned(),
        holes_from: status.client.holes_from(),
        map: Arc::new(LiveMap::new(status, context.static_devices.as_ref())),
        device: None,
        below: Vec::new(),
    }
}

/// The major number of the kernel's NBD driver (`NBD_MAJOR` of `include/uapi/linux/major.h`).
pub(super) const MAJOR: u32 = 43;

/// Whether a device is one of the kernel's NBD driver.
///
/// # Errors
/// None: the number decides.
pub fn is_device(id: DeviceId) -> io::Result<bool> {
    Ok(id.major == MAJOR)
}

/// What the kernel's NBD device is called in a layer.
const DEVICE_KIND: &str = "nbd";

/// The layer of a device of the kernel's NBD client. It is read through the kernel; its holes are those of the export
/// that the user named. The layer is dense, with the reason, where the device may be connected to another export, or
/// where a write over one connection may be invisible on another.
pub fn device_layer(device: &BlockDevice, resolver: &mut Resolver<'_>) -> Layer {
    match export_layer(device, resolver) {
        Ok(below) => Layer {
            name: device.name(),
            kind: DEVICE_KIND.to_owned(),
            holes_from: "its export, over a connection of its own".to_owned(),
            map: below.map.clone(),
            device: None,
            below: vec![below],
        },
        Err(reason) => dense::layer(device.name(), DEVICE_KIND, device.len, reason),
    }
}

/// The layer of the export of a device of the kernel, or why its holes cannot be used for the device.
fn export_layer(device: &BlockDevice, resolver: &mut Resolver<'_>) -> Result<Arc<Layer>, DenseReason> {
    let Some(side) = &resolver.context.nbd else {
        let why = "the kernel does not query its server for holes: name the export with -o nbd=URI";
        return Err(DenseReason::Unproven(why.into()));
    };
    let Some((export, connection)) = side.of(device.id) else {
        return Err(DenseReason::Unproven("it is not the NBD device of the export in option 'nbd'".into()));
    };
    let connection = connection.map_err(Clone::clone)?.clone();
    // No guard for a lost connection: it stays lost, so the stack would never be unchanged, and be resolved again and
    // again.
    if let Some(reason) = connection.lost() {
        return Err(DenseReason::Unproven(reason.to_owned().into()));
    }
    resolver.guard(KernelConnectionGuard(connection));
    let client = export.client().map_err(|error| DenseReason::Unproven(error.to_string().into()))?;
    let size = client.size();
    if size != device.len {
        let why = format!("the export has {size} bytes and the device {}: they are not the same", device.len);
        return Err(DenseReason::Unproven(why.into()));
    }
    if !client.is_visible_elsewhere() {
        let why = "the server does not promise that writes over one connection are visible on another (CAN_MULTI_CONN, with \
                   FLUSH or read-only)";
        return Err(DenseReason::Unproven(why.into()));
    }
    let evidence = match &resolver.context.static_devices {
        Some(_) => WriteEvidence::complete(device),
        None => WriteEvidence::none(),
    };
    let status = ExportStatus { client, flush: FlushBeforeStatus::Yes, evidence };
    Ok(Arc::new(layer_of(status, resolver.context)))
}
