//! A bound on the memory of the reads that are under way on one device.
//!
//! A read takes its whole buffer before it begins, and keeps it while the device is suspended or slow. Each device has a
//! bound of its own, so that reads of a device that does not answer delay no read of another device.

use std::sync::{Condvar, Mutex, PoisonError};

/// Bytes of buffers that the reads of one device may hold together: sixteen of the largest requests, which keeps a disk or
/// a server busy.
const LIMIT: usize = 16 << 20;

/// The memory that the reads of one device have taken.
#[derive(Debug, Default)]
pub(super) struct ReadMemory {
    taken: Mutex<usize>,
    freed: Condvar,
}

/// The memory that one read has taken. Dropping it gives the memory back.
#[derive(Debug)]
pub struct ReadPermit<'a> {
    memory: &'a ReadMemory,
    size: usize,
}

impl ReadMemory {
    /// Takes `size` bytes, or the whole limit if that is less; waits until they are free.
    pub(super) fn take(&self, size: usize) -> ReadPermit<'_> {
        let size = size.min(LIMIT);
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = self.freed.wait_while(taken, |taken| *taken + size > LIMIT);
        *taken.unwrap_or_else(PoisonError::into_inner) += size;
        ReadPermit { memory: self, size }
    }
}

impl Drop for ReadPermit<'_> {
    fn drop(&mut self) {
        *self.memory.taken.lock().unwrap_or_else(PoisonError::into_inner) -= self.size;
        // Several small reads may fit where a large one was.
        self.memory.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn reads_beyond_the_limit_wait_until_memory_is_given_back() {
        let memory = ReadMemory::default();
        let (sender, receiver) = channel();
        thread::scope(|scope| {
            let all = memory.take(usize::MAX);
            for _ in 0..4 {
                let sender = sender.clone();
                let memory = &memory;
                scope.spawn(move || {
                    let _part = memory.take(LIMIT / 2);
                    sender.send(*memory.taken.lock().unwrap()).unwrap();
                });
            }
            assert!(receiver.try_recv().is_err(), "the limit is reached");
            drop(all);
            for _ in 0..4 {
                assert!(receiver.recv().unwrap() <= LIMIT);
            }
        });
        assert_eq!(*memory.taken.lock().unwrap(), 0);
    }
}
