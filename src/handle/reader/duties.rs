//! What a thread must do for the others in any case, also when it panics: they wait for its pieces.

use std::io;

use super::Reader;
use crate::export::PendingRead;
use crate::sys::buffer::AlignedBuffer;

/// The right of a thread to plan and begin reads. It ends in any case, also by a panic: other threads wait for the pieces.
pub(super) struct Filling<'a> {
    pub(super) reader: &'a Reader,
    /// The pieces that were planned.
    pub(super) ids: Vec<u64>,
    /// The reads of the first ones of them. The others were not begun.
    pub(super) begun: Vec<PendingRead>,
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        let mut begun = std::mem::take(&mut self.begun).into_iter();
        let mut state = self.reader.lock();
        for id in std::mem::take(&mut self.ids) {
            state.window.begun(id, begun.next());
        }
        (state.is_filling, state.is_beginning) = (false, false);
        self.reader.changed.notify_all();
    }
}

/// The duty of a thread to complete a piece whose read it waits for, also by a panic.
pub(super) struct Waiting<'a> {
    pub(super) reader: &'a Reader,
    pub(super) id: u64,
    /// The bytes, or why there are none.
    pub(super) read: Option<io::Result<AlignedBuffer>>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let read = self.read.take().unwrap_or_else(|| Err(io::ErrorKind::Other.into()));
        self.reader.lock().window.complete(self.id, read);
        self.reader.changed.notify_all();
    }
}
