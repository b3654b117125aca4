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
pub mod frame;
mod map;
mod pool;
pub mod proto;
pub mod reply;
mod stream;
mod tls;
mod uri;

use std::sync::Arc;

pub use client::Client;
pub use map::NbdMap;
pub use pool::Patience;
pub use uri::{Tls, Transport, Uri};

use crate::source::{Layer, dense};
use crate::units::Bytes;

/// What an export is called in a layer.
const KIND: &str = "NBD export";

/// The layer of an export that is read through the same client.
pub fn layer(client: Arc<Client>) -> Layer {
    Layer {
        name: client.uri().to_string(),
        kind: KIND.to_owned(),
        holes_from: client.holes_from(),
        map: Arc::new(NbdMap::new(client)),
        below: Vec::new(),
    }
}

/// The layer of the export that a kernel device of `device_len` bytes is connected to: it tells the holes of what is read
/// and written through the device.
///
/// Connects to the server, which takes up to ten seconds; [`side_layer_of`] takes a client that is kept.
pub fn side_layer(device_len: Bytes, uri: &Uri) -> Layer {
    match Client::open(uri) {
        Ok(client) => side_layer_of(device_len, Arc::new(client)),
        Err(error) => dense::layer(uri.to_string(), KIND, device_len, error.to_string()),
    }
}

/// [`side_layer`], of a client that is connected already. Dense, with the reason, where the export may be another one, or
/// where one connection need not see what another has written.
pub fn side_layer_of(device_len: Bytes, client: Arc<Client>) -> Layer {
    let size = client.size();
    let reason = if size != device_len {
        format!("the export has {size} bytes and the device {device_len}: not the same")
    } else if !client.is_multi_conn() {
        "the server does not promise that one connection sees what another one wrote (CAN_MULTI_CONN)".to_owned()
    } else {
        return layer(client);
    };
    dense::layer(client.uri().to_string(), KIND, device_len, reason)
}
