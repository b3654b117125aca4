//! The NBD client: against nbdkit and qemu-nbd, with and without TLS, while servers come and go, and against a server that
//! breaks every rule.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of them of one")]

#[path = "../common/mod.rs"]
mod common;

mod fake;
mod hostile;
mod maps;
mod mounted;
mod outage;
mod reads;
mod slow;
mod states;

mod tls;

use std::sync::Arc;
use std::time::Duration;

use blkholefs::testing::map::view;
use blkholefs::testing::map::{ExtentKind, HoleMap};
use blkholefs::testing::source::nbd::{self, Client, Timeouts, Uri};
use blkholefs::testing::units::Bytes;

/// A client that gives up soon.
fn client(uri: &str, patience: Timeouts) -> Arc<Client> {
    let uri = Uri::parse(uri).expect("tests use good URIs");
    Arc::new(Client::open_with_timeouts(&uri, patience).unwrap_or_else(|error| panic!("{error}")))
}

/// A client that waits as long as users' clients do.
fn patient(uri: &str) -> Arc<Client> {
    client(uri, Timeouts::default())
}

/// The same wait for everything.
fn patience(wait: Duration) -> Timeouts {
    Timeouts { connect: wait, request: wait, outage: wait }
}

/// The end and kind of each run, merged, not rounded, up to 32 TiB: a wrong size must not keep a test busy.
fn runs(map: &dyn HoleMap) -> Vec<(u64, ExtentKind)> {
    let all = view::runs(map, Bytes::new(1), Bytes::ZERO..map.len().min(Bytes::new(32 << 40)));
    all.map(|(_, run)| (run.end.get(), run.kind)).collect()
}

/// The runs of a client's export.
fn runs_of(client: &Arc<Client>) -> Vec<(u64, ExtentKind)> {
    runs(&*nbd::layer(Arc::clone(client)).map)
}

/// Reads a whole range; the error is the errno.
fn read(client: &Client, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
    // Not zeros: what the client does not fill must not look like a hole.
    let mut bytes = vec![0xee; len];
    match client.read_at(&mut bytes, Bytes::new(offset)) {
        Ok(count) => {
            bytes.truncate(count);
            Ok(bytes)
        }
        Err(error) => Err(error.raw_os_error().expect("read errors are errnos")),
    }
}
