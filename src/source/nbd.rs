//! NBD: exports of a server, as a client of our own.
//!
//! The kernel's `/dev/nbdN` does not speak structured replies, so it cannot tell holes. This client does: it reads an
//! export itself, or, beside the kernel's connection, asks the same export only for its map.
//!
//! [`Uri`] says which export; [`Client`] reads it and asks its block status (`base:allocation`); a hole is an extent
//! with the ZERO bit. The server is not trusted: it can make an export dense or unreadable, and nothing else. The
//! protocol is that of `doc/proto.md` of the NBD project.

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
mod uri;

use std::io;
use std::sync::Arc;

pub use client::Client;
pub use export::NbdExport;
pub use pool::Timeouts;
pub use side_export::SideExport;
pub use status::FlushBeforeStatus;
pub use uri::{Tls, Transport, Uri};

use self::kernel_connection::KernelConnectionGuard;
use self::status::ExportStatus;
use crate::map::HoleMap;
use crate::source::live::LiveMap;
use crate::source::{BlockDevice, Layer, Resolver, dense};
use crate::sys::device::DeviceId;

/// What an export is called in a layer.
const KIND: &str = "NBD export";

/// The layer of an export that is read through the same client.
pub fn layer(client: Arc<Client>) -> Layer {
    // Where there are several connections the export is read-only; one connection sees its own state.
    layer_with(client, FlushBeforeStatus::No)
}

/// The holes of an export. No query is sent yet.
pub fn map(client: Arc<Client>, flush: FlushBeforeStatus) -> impl HoleMap + 'static {
    LiveMap::new(ExportStatus { client, flush })
}

fn layer_with(client: Arc<Client>, flush: FlushBeforeStatus) -> Layer {
    Layer {
        name: client.uri().to_string(),
        kind: KIND.to_owned(),
        holes_from: client.holes_from(),
        map: Arc::new(map(client, flush)),
        device: None,
        below: Vec::new(),
    }
}

/// The major number of the kernel's NBD driver (`NBD_MAJOR` of `include/uapi/linux/major.h`).
const MAJOR: u32 = 43;

/// Whether a device is one of the kernel's NBD driver.
///
/// # Errors
/// None: the number decides.
pub fn is_device(id: DeviceId) -> io::Result<bool> {
    Ok(id.major == MAJOR)
}

/// What the kernel's NBD device is called in a layer.
const DEVICE_KIND: &str = "nbd";

/// The layer of the kernel's NBD device: its bytes are the kernel's, its holes those of the export that the user says it is
/// connected to. Dense, with the reason, where it may be connected to another one, or where one connection need not see
/// what another one has written.
pub fn device_layer(device: &BlockDevice, resolver: &mut Resolver<'_>) -> Layer {
    match export_layer(device, resolver) {
        Ok(below) => Layer {
            name: device.name(),
            kind: DEVICE_KIND.to_owned(),
            holes_from: "its export, asked on a side connection".to_owned(),
            map: below.map.clone(),
            device: None,
            below: vec![below],
        },
        Err(reason) => dense::layer(device.name(), DEVICE_KIND, device.len, reason),
    }
}

/// The export of a device of the kernel, or why its holes are not the device's.
fn export_layer(device: &BlockDevice, resolver: &mut Resolver<'_>) -> Result<Arc<Layer>, String> {
    let Some(beside) = &resolver.context.nbd else {
        return Err("the kernel does not ask its server for holes: name the export with -o nbd=URI".to_owned());
    };
    let Some((export, link)) = beside.of(device.id) else {
        return Err("it is not the NBD device whose export was named".to_owned());
    };
    let link = link.map_err(ToOwned::to_owned)?.clone();
    // Once lost it stays lost: a guard of that would only keep the map from being used.
    if let Some(why) = link.lost() {
        return Err(why.to_owned());
    }
    resolver.guard(KernelConnectionGuard(link));
    let client = export.client().map_err(|error| error.to_string())?;
    let size = client.size();
    if size != device.len {
        return Err(format!("the export has {size} bytes and the device {}: not the same", device.len));
    }
    if !client.is_visible_elsewhere() {
        return Err("the server does not promise that one connection sees what another one wrote \
                    (CAN_MULTI_CONN, with FLUSH or read-only)"
            .to_owned());
    }
    Ok(Arc::new(layer_with(client, FlushBeforeStatus::Yes)))
}
