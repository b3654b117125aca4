//! The NBD client: with nbdkit and qemu-nbd, with and without TLS, during server restarts, and with a fake
//! server that violates the protocol.

#![allow(clippy::single_range_in_vec_init, reason = "some lists of ranges have one element")]

#[path = "../common/mod.rs"]
mod common;

mod asked_once;
mod bitmaps;
mod fake;
mod hostile;
mod maps;
mod mounted;
mod outage;
mod reads;
mod slow;
mod states;

mod tls;
mod write_outage;
mod write_random;
mod writes;

use std::sync::Arc;
use std::time::Duration;

use blkholefs::testing::map::view;
use blkholefs::testing::map::{ExtentKind, HoleMap};
use blkholefs::testing::source::Context;
use blkholefs::testing::source::nbd::{self, Client, Timeouts, Uri};
use blkholefs::testing::units::Bytes;

/// Connects with the given timeouts.
fn client(uri: &str, timeouts: Timeouts) -> Arc<Client> {
    let uri = Uri::parse(uri).expect("the URI of a test is valid");
    Arc::new(Client::open_with_timeouts(&uri, timeouts).unwrap_or_else(|error| panic!("{error}")))
}

/// Connects with the default timeouts.
fn default_client(uri: &str) -> Arc<Client> {
    client(uri, Timeouts::default())
}

/// Timeouts that are all equal to `wait`.
fn equal_timeouts(wait: Duration) -> Timeouts {
    Timeouts { connect: wait, request: wait, outage: wait, change: wait, flush: wait }
}

/// Returns the end in bytes and the kind of each merged run, without rounding. Stops at 32 TiB, so that a wrong size
/// does not make a test run for a long time.
fn runs(map: &dyn HoleMap) -> Vec<(u64, ExtentKind)> {
    let all = view::runs(map, Bytes::new(1), Bytes::ZERO..map.len().min(Bytes::new(32 << 40)));
    all.map(|(_, run)| (run.end.get(), run.kind)).collect()
}

/// Returns the runs of a client's export, as [`runs`] does.
fn runs_of(client: &Arc<Client>) -> Vec<(u64, ExtentKind)> {
    runs(&*nbd::layer(Arc::clone(client), &Context::default()).map)
}

/// Reads `len` bytes, or fewer at the end of the export. An error is the errno.
fn read(client: &Client, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
    // The buffer is not zeroed, so that bytes that the client does not fill differ from those of a hole.
    let mut bytes = vec![0xee; len];
    match client.read_at(&mut bytes, Bytes::new(offset)) {
        Ok(count) => {
            bytes.truncate(count);
            Ok(bytes)
        }
        Err(error) => Err(error.raw_os_error().expect("read errors are errnos")),
    }
}
