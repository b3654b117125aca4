//! NBD.
mod client;
mod connect;
mod connection;
mod pool;
pub mod proto;
pub mod reply;
mod stream;
mod tls;
mod uri;
pub use client::Client;
pub use pool::Patience;
pub use uri::{Tls, Transport, Uri};
