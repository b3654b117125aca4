//! A bound on the memory of the reads that wait for one device.
//!
//! A read needs its whole buffer before it begins, and a device that is suspended or slow keeps all that were begun. Each
//! device has a room of its own, so that reads of one that does not answer wait for each other, and for no other device.

use std::sync::{Condvar, Mutex, PoisonError};

/// Bytes of buffers that the reads of one device may hold together: sixteen of the largest requests, which keeps a disk or
/// a server busy.
const LIMIT: usize = 16 << 20;

/// The bytes that the reads of one device hold.
#[derive(Debug, Default)]
pub(super) struct Room {
    held: Mutex<usize>,
    freed: Condvar,
}

/// A read's part of what the reads of its device may hold, given back with this value.
#[derive(Debug)]
pub struct RoomPart<'a> {
    room: &'a Room,
    size: usize,
}

impl Room {
    /// Takes `size` bytes; waits until there are as many. More than there can be are all that there are.
    pub(super) fn take(&self, size: usize) -> RoomPart<'_> {
        let size = size.min(LIMIT);
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let held = self.freed.wait_while(held, |held| *held + size > LIMIT);
        *held.unwrap_or_else(PoisonError::into_inner) += size;
        RoomPart { room: self, size }
    }
}

impl Drop for RoomPart<'_> {
    fn drop(&mut self) {
        *self.room.held.lock().unwrap_or_else(PoisonError::into_inner) -= self.size;
        // Several small ones may fit where a large one was.
        self.room.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn reads_wait_for_each_other_and_go_on() {
        let room = Room::default();
        let (say, hear) = channel();
        thread::scope(|scope| {
            let all = room.take(usize::MAX);
            for _ in 0..4 {
                let say = say.clone();
                let room = &room;
                scope.spawn(move || {
                    let _part = room.take(LIMIT / 2);
                    say.send(*room.held.lock().unwrap()).unwrap();
                });
            }
            assert!(hear.try_recv().is_err(), "there is no room");
            drop(all);
            for _ in 0..4 {
                assert!(hear.recv().unwrap() <= LIMIT);
            }
        });
        assert_eq!(*room.held.lock().unwrap(), 0);
    }
}
