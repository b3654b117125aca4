//! Replies to read requests.

use std::sync::Arc;

use fuser::ReplyData;

use super::buffers::Buffers;
use super::errno;
use crate::handle::{Handle, Reader};
use crate::units::Bytes;

/// Replies to a read request, with bytes that were fetched ahead if there are any and the client may get them.
pub(super) fn read(
    reader: &Arc<Reader>,
    buffers: &Buffers,
    offset: Bytes,
    size: usize,
    may_be_fetched: bool,
    reply: ReplyData,
) {
    if !may_be_fetched {
        return read_now(reader.handle(), buffers, offset, size, reply);
    }
    let reply = buffers.with_buffer(|buffer| match reader.fetched(buffer, offset, size) {
        Some(bytes) => {
            reply.data(bytes.as_ref());
            None
        }
        None => Some(reply),
    });
    if let Some(reply) = reply {
        read_now(reader.handle(), buffers, offset, size, reply);
    }
    reader.fetch_more();
}

/// Replies to a read request with bytes that are read from the device now.
fn read_now(handle: &Handle, buffers: &Buffers, offset: Bytes, size: usize, reply: ReplyData) {
    // The memory of the device's concurrent reads is limited. A read that waits for its share holds no buffer yet.
    let _permit = handle.wait_for_read_memory(size);
    buffers.with_buffer(|buffer| match handle.read(buffer, offset, size) {
        Ok(bytes) => reply.data(bytes),
        Err(error) => reply.error(errno("read", &error)),
    });
}
