//! Reads of which many are in progress at the same time without a thread for each: the native asynchronous I/O of Linux
//! (io_submit(2)). With `O_DIRECT`, block devices and most file systems begin such a read and return at once.
//!
//! No thread waits for completions. A thread that needs a read which is not complete receives the completions of all
//! reads until its own is among them.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::buffer::AlignedBuffer;
use crate::units::Bytes;

/// The number of completions that one system call receives at most.
const EVENTS: usize = 32;

/// `struct io_event` of `include/uapi/linux/aio_abi.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    /// The `aio_data` of the request.
    data: u64,
    obj: u64,
    /// The number of bytes, or a negative errno.
    res: i64,
    res2: i64,
}

/// `IOCB_CMD_PREAD` of `include/uapi/linux/aio_abi.h`.
const COMMAND_READ: u16 = 0;

/// Asynchronous reads, up to a number that are in progress at the same time.
#[derive(Debug)]
pub struct AioQueue {
    /// The kernel's `aio_context_t`.
    context: libc::c_ulong,
    state: Mutex<State>,
    /// Notified when completions were received.
    received: Condvar,
}

#[derive(Debug, Default)]
struct State {
    slots: Vec<Slot>,
    /// The indices of the slots that are [`Slot::Free`].
    free: Vec<usize>,
    /// Some thread receives completions.
    has_receiver: bool,
}

/// The place of one read.
#[derive(Debug)]
enum Slot {
    Free,
    /// The kernel writes into the buffer.
    Reading {
        buffer: AlignedBuffer,
        abandoned: bool,
    },
    /// The buffer and the number of bytes in it, or a negative errno.
    Done {
        buffer: AlignedBuffer,
        result: i64,
    },
}

/// A read that was begun. Dropping it gives its bytes up; its buffer is freed when the kernel has completed it.
#[derive(Debug)]
pub struct AioRead {
    queue: Arc<AioQueue>,
    /// The index of its slot; `None` after it was waited for.
    slot: Option<usize>,
}

impl AioQueue {
    /// A queue of at most `depth` reads.
    ///
    /// # Errors
    /// As io_setup(2): `EAGAIN` when the system has too many (`/proc/sys/fs/aio-max-nr`), `ENOSYS` on a kernel without.
    pub fn new(depth: u16) -> io::Result<Arc<Self>> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one `aio_context_t`, which is an unsigned long, through the pointer.
        let code = unsafe { libc::syscall(libc::SYS_io_setup, libc::c_long::from(depth), &raw mut context) };
        if code != 0 {
            return Err(io::Error::last_os_error());
        }
        let slots: Vec<Slot> = (0..depth).map(|_| Slot::Free).collect();
        let free = (0..slots.len()).rev().collect();
        let state = Mutex::new(State { slots, free, has_receiver: false });
        Ok(Arc::new(Self { context, state, received: Condvar::new() }))
    }

    /// Begins reads of `file`, each at its offset and as long as its buffer. The results are in the same order; after the
    /// first one that cannot be begun there are no more.
    pub fn begin(self: &Arc<Self>, file: &File, reads: Vec<(Bytes, AlignedBuffer)>) -> Vec<AioRead> {
        let mut state = self.lock();
        self.receive_complete(&mut state);
        let mut blocks: Vec<libc::iocb> = Vec::with_capacity(reads.len());
        let mut taken = Vec::with_capacity(reads.len());
        for (offset, mut buffer) in reads {
            let Ok(offset) = i64::try_from(offset.get()) else { break };
            let Some(index) = state.free.pop() else { break };
            // SAFETY: a `struct iocb` has only integers, for which zero is a valid value.
            let mut block: libc::iocb = unsafe { std::mem::zeroed() };
            block.aio_data = index as u64;
            block.aio_lio_opcode = COMMAND_READ;
            block.aio_fildes = file.as_raw_fd().unsigned_abs();
            block.aio_buf = buffer.bytes_mut().as_mut_ptr().expose_provenance() as u64;
            block.aio_nbytes = buffer.bytes().len() as u64;
            block.aio_offset = offset;
            blocks.push(block);
            taken.push(index);
            state.slots[index] = Slot::Reading { buffer, abandoned: false };
        }
        let begun = self.submit(&mut blocks);
        for index in taken.split_off(begun) {
            state.release(index);
        }
        taken.into_iter().map(|index| AioRead { queue: self.clone(), slot: Some(index) }).collect()
    }

    /// Submits requests, and returns how many of them the kernel took.
    fn submit(&self, blocks: &mut [libc::iocb]) -> usize {
        let mut pointers: Vec<*mut libc::iocb> = blocks.iter_mut().map(ptr::from_mut).collect();
        let mut begun = 0;
        while begun < pointers.len() {
            let rest = &mut pointers[begun..];
            // SAFETY: the pointers are to valid requests, which the kernel copies during the call. Each request names a
            // descriptor that is open, of which the kernel takes a reference, and memory of its slot's buffer, which is
            // neither moved nor freed until the completion was received, or the context was destroyed.
            let count = unsafe {
                libc::syscall(libc::SYS_io_submit, self.context, rest.len() as libc::c_long, rest.as_mut_ptr())
            };
            match usize::try_from(count) {
                Ok(count) if count > 0 => begun += count,
                _ => break,
            }
        }
        begun
    }

    /// Receives the completions that there are, after a wait for at least `least` of them.
    fn receive(&self, events: &mut [IoEvent; EVENTS], least: libc::c_long) -> io::Result<usize> {
        let most = EVENTS as libc::c_long;
        let no_timeout: *const libc::timespec = ptr::null();
        // SAFETY: the kernel writes at most `most` events through the pointer, and a null timeout means none.
        let count = unsafe {
            libc::syscall(libc::SYS_io_getevents, self.context, least, most, events.as_mut_ptr(), no_timeout)
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Receives the completions that there are, without a wait, so that the buffers of abandoned reads are freed.
    fn receive_complete(&self, state: &mut State) {
        let mut events = [IoEvent::default(); EVENTS];
        while !state.has_receiver {
            let Ok(count) = self.receive(&mut events, 0) else { return };
            events[..count].iter().for_each(|event| state.complete(*event));
            if count < EVENTS {
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn release(&mut self, index: usize) {
        self.slots[index] = Slot::Free;
        self.free.push(index);
    }

    /// Notes that a read is complete.
    fn complete(&mut self, event: IoEvent) {
        let Some(index) = usize::try_from(event.data).ok().filter(|&index| index < self.slots.len()) else { return };
        match std::mem::replace(&mut self.slots[index], Slot::Free) {
            Slot::Reading { buffer, abandoned: false } => self.slots[index] = Slot::Done { buffer, result: event.res },
            Slot::Reading { abandoned: true, .. } => self.free.push(index),
            other => self.slots[index] = other,
        }
    }

    /// The result of a read that is complete. Its slot is free then.
    fn take(&mut self, index: usize) -> Option<(AlignedBuffer, i64)> {
        if !matches!(self.slots[index], Slot::Done { .. }) {
            return None;
        }
        self.free.push(index);
        match std::mem::replace(&mut self.slots[index], Slot::Free) {
            Slot::Done { buffer, result } => Some((buffer, result)),
            Slot::Free | Slot::Reading { .. } => None,
        }
    }

    /// Frees a slot now if its read is complete, and otherwise when it is.
    fn abandon(&mut self, index: usize) {
        match &mut self.slots[index] {
            Slot::Reading { abandoned, .. } => *abandoned = true,
            Slot::Done { .. } => self.release(index),
            Slot::Free => {}
        }
    }
}

impl AioRead {
    /// Waits until the read is complete, and returns its buffer, which has the length of what was read: shorter than asked
    /// for only at the end of the file.
    ///
    /// # Errors
    /// As pread(2).
    pub fn wait(mut self) -> io::Result<AlignedBuffer> {
        let Some(index) = self.slot.take() else { return Err(io::ErrorKind::InvalidInput.into()) };
        let queue = self.queue.clone();
        let mut state = queue.lock();
        let mut events = [IoEvent::default(); EVENTS];
        loop {
            if let Some((mut buffer, result)) = state.take(index) {
                return match usize::try_from(result) {
                    Ok(len) => {
                        buffer.truncate(len);
                        Ok(buffer)
                    }
                    Err(_) => Err(io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO))),
                };
            }
            if state.has_receiver {
                state = queue.received.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.has_receiver = true;
            drop(state);
            let received = queue.receive(&mut events, 1);
            state = queue.lock();
            state.has_receiver = false;
            queue.received.notify_all();
            match received {
                Ok(count) => events[..count].iter().for_each(|event| state.complete(*event)),
                Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
                Err(error) => {
                    state.abandon(index);
                    return Err(error);
                }
            }
        }
    }
}

impl Drop for AioRead {
    fn drop(&mut self) {
        if let Some(index) = self.slot.take() {
            let mut state = self.queue.lock();
            state.abandon(index);
            self.queue.receive_complete(&mut state);
        }
    }
}

impl Drop for AioQueue {
    fn drop(&mut self) {
        // SAFETY: the context was made by io_setup(2) and is used no more. The call waits until all of its reads are
        // complete (`io_destroy` of `fs/aio.c`), so that the kernel writes into no buffer that is freed after it.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::sys::buffer::BufferPool;

    fn file(len: u64) -> File {
        let path = std::env::temp_dir().join(format!("blkholefs-aio-{}-{len}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        let bytes: Vec<u8> = (0..len).map(|at| u8::try_from(at / 4096 % 251).unwrap()).collect();
        file.write_all_at(&bytes, 0).unwrap();
        file
    }

    #[test]
    fn each_read_gets_the_bytes_of_its_offset_in_any_order_of_waiting() {
        let file = file(1 << 20);
        let queue = AioQueue::new(16).unwrap();
        let pool = BufferPool::new(1 << 20);
        let read = |at: u64| (Bytes::new(at * 4096), pool.take(4096).unwrap());
        let mut reads = queue.begin(&file, (0..16).map(read).collect());
        assert_eq!(reads.len(), 16);
        assert!(queue.begin(&file, vec![read(0)]).is_empty(), "the queue is full");
        let odd: Vec<_> = (0..8).map(|at| reads.remove(at)).collect();
        drop(odd);
        for (at, read) in reads.into_iter().enumerate().rev() {
            let buffer = read.wait().unwrap();
            let wanted = u8::try_from(2 * at + 1).unwrap();
            assert_eq!((buffer.bytes().len(), buffer.bytes()[0]), (4096, wanted));
        }
        // The places of the reads that were given up are free again once their completions were received.
        let mut last = queue.begin(&file, (0..8).map(read).collect());
        assert_eq!(last.pop().unwrap().wait().unwrap().bytes()[0], 7);
    }

    #[test]
    fn a_read_at_the_end_is_short_and_one_of_a_closed_kind_fails() {
        let file = file(10_000);
        let queue = AioQueue::new(4).unwrap();
        let pool = BufferPool::new(1 << 20);
        let mut reads =
            queue.begin(&file, vec![(Bytes::new(8192), pool.take(4096).unwrap()), (Bytes::MAX, pool.take(1).unwrap())]);
        assert_eq!(reads.len(), 1, "an offset that is no offset is not begun");
        assert_eq!(reads.pop().unwrap().wait().unwrap().bytes().len(), 10_000 - 8192);
        let directory = File::open("/").unwrap();
        let read = queue.begin(&directory, vec![(Bytes::ZERO, pool.take(4096).unwrap())]);
        assert!(read.into_iter().all(|read| read.wait().is_err()));
    }

    #[test]
    fn several_threads_wait_for_reads_of_one_queue() {
        let file = file(1 << 20);
        let queue = AioQueue::new(64).unwrap();
        let pool = BufferPool::new(1 << 20);
        let reads = queue.begin(&file, (0..64).map(|at| (Bytes::new(at * 4096), pool.take(4096).unwrap())).collect());
        std::thread::scope(|scope| {
            for (at, read) in reads.into_iter().enumerate() {
                scope.spawn(move || assert_eq!(usize::from(read.wait().unwrap().bytes()[0]), at));
            }
        });
    }
}
