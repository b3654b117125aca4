//! Several read requests for metadata blocks, many of them in progress at the same time where that saves time.
//!
//! The first requests are made one after another, and it is measured how long they take. A queue of asynchronous reads is
//! made only when a device makes them wait. It is not free: the kernel waits for two grace periods of RCU when it
//! destroys a queue (`kill_ioctx` and `free_ioctx_users` of `fs/aio.c`), 30 ms and more. A thread does that beside the
//! work that follows, but a process that ends waits for it (`exit_aio`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::debug;

use super::super::error::ThinResult;
use super::super::{METADATA_BLOCK, MetaBlock, RawBlock};
use super::MetadataReader;
use crate::sys::aio::{AioQueue, AioRead};
use crate::sys::buffer::{AlignedBuffer, BufferPool};
use crate::units::Bytes;

/// The maximum number of requests that are in progress at the same time.
const DEPTH: u16 = 16;
/// The maximum number of bytes of the buffers of these requests.
const BUFFERS: usize = 4 << 20;

/// A queue pays off only if the requests have waited for so long.
const LEAST_WAIT: Duration = Duration::from_millis(8);
/// A request that takes no longer than this for itself, and [`FAST_BLOCK`] for each block, is answered from memory.
const FAST_REQUEST: Duration = Duration::from_micros(40);
const FAST_BLOCK: Duration = Duration::from_micros(1);

/// Adjacent blocks.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The first block.
    pub first: MetaBlock,
    /// The number of blocks.
    pub count: usize,
}

impl Request {
    /// Its offset in bytes; `None` if that is past every device.
    fn offset(self) -> Option<Bytes> {
        self.first.get().checked_mul(METADATA_BLOCK as u64).map(Bytes::new)
    }
}

/// The buffers and the queue for many requests to one reader.
#[derive(Debug)]
pub struct Requests {
    queue: Queue,
    pool: Arc<BufferPool>,
    /// For requests that are made one after another.
    buffer: AlignedBuffer,
}

#[derive(Debug)]
enum Queue {
    /// Not made yet.
    Measuring(Waits),
    Made(Arc<AioQueue>),
    /// The kernel has none to give.
    Missing,
}

/// How long requests took that were made one after another.
#[derive(Debug, Default)]
struct Waits {
    total: Duration,
    /// How long they would have taken if answered from memory.
    fast: Duration,
}

impl Waits {
    fn add(&mut self, blocks: usize, wait: Duration) {
        self.total += wait;
        self.fast += FAST_REQUEST + FAST_BLOCK * u32::try_from(blocks).unwrap_or(u32::MAX);
    }

    fn are_long(&self) -> bool {
        self.total >= LEAST_WAIT && self.total > self.fast
    }
}

/// Requests in progress, in their order, and the index of the first one that is not begun.
struct InProgress<'a> {
    reads: VecDeque<AioRead>,
    next: usize,
    requests: &'a [Request],
}

impl Default for Requests {
    /// Nothing is allocated yet.
    fn default() -> Self {
        Self { queue: Queue::Measuring(Waits::default()), pool: BufferPool::new(BUFFERS), buffer: AlignedBuffer::new() }
    }
}

impl Requests {
    /// Makes `requests` to `reader`, and calls `take` with the index and the blocks of each, in their order. No request
    /// is in progress any more when it returns.
    ///
    /// # Errors
    /// The first error of [`MetadataReader::read`] or of `take`.
    pub fn read(
        &mut self,
        reader: &MetadataReader,
        requests: &[Request],
        mut take: impl FnMut(usize, &[RawBlock]) -> ThinResult<()>,
    ) -> ThinResult<()> {
        let mut progress = InProgress { reads: VecDeque::new(), next: 0, requests };
        let result = (0..requests.len()).try_for_each(|index| {
            self.begin(reader, &mut progress);
            match progress.reads.pop_front() {
                Some(read) => {
                    // What failed, or is too short, is read once more, for the error.
                    let whole = |buffer: &AlignedBuffer| buffer.bytes().len() == requests[index].count * METADATA_BLOCK;
                    match read.wait().ok().filter(whole) {
                        Some(buffer) => take(index, buffer.bytes().as_chunks().0),
                        None => take(index, self.read_one(reader, requests[index])?),
                    }
                }
                None => {
                    progress.next = index + 1;
                    take(index, self.read_one(reader, requests[index])?)
                }
            }
        });
        for read in progress.reads {
            let _ = read.wait();
        }
        result
    }

    /// Makes one request and waits for it.
    fn read_one(&mut self, reader: &MetadataReader, request: Request) -> ThinResult<&[RawBlock]> {
        let start = Instant::now();
        let blocks = reader.read(request.first, request.count, &mut self.buffer)?;
        if let Queue::Measuring(waits) = &mut self.queue {
            waits.add(request.count, start.elapsed());
        }
        Ok(blocks)
    }

    /// Begins the next requests if at most half of a queue is in progress, so that one system call is for several.
    fn begin(&mut self, reader: &MetadataReader, progress: &mut InProgress<'_>) {
        let in_progress = progress.reads.len();
        let rest = &progress.requests[progress.next..];
        // Nothing is gained for a single request.
        if in_progress > usize::from(DEPTH / 2) || in_progress + rest.len() < 2 {
            return;
        }
        let Some(queue) = self.queue() else { return };
        let most = usize::from(DEPTH) - in_progress;
        let read = |request: &Request| Some((request.offset()?, self.pool.take(request.count * METADATA_BLOCK)?));
        let reads: Vec<_> = rest.iter().take(most).map_while(read).collect();
        let wanted = reads.len();
        let begun = queue.begin(&reader.file, reads);
        if begun.is_empty() && wanted > 0 && in_progress == 0 {
            debug!("no asynchronous reads of metadata begin");
            self.queue = Queue::Missing;
        }
        reader.count(begun.len());
        progress.next += begun.len();
        progress.reads.extend(begun);
    }

    /// The queue, which is made when the requests so far have waited for long.
    fn queue(&mut self) -> Option<Arc<AioQueue>> {
        if matches!(&self.queue, Queue::Measuring(waits) if waits.are_long()) {
            let made = AioQueue::new(DEPTH).inspect_err(|error| debug!("no asynchronous reads of metadata: {error}"));
            self.queue = made.map_or(Queue::Missing, Queue::Made);
        }
        match &self.queue {
            Queue::Made(queue) => Some(queue.clone()),
            Queue::Measuring(_) | Queue::Missing => None,
        }
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        if let Queue::Made(queue) = std::mem::replace(&mut self.queue, Queue::Missing) {
            // Without a thread the queue is destroyed here: the closure is dropped.
            let _ = thread::Builder::new().name("aio-destroy".into()).spawn(move || drop(queue));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::thin::error::{Damage, ThinError};
    use std::io::Write;

    /// An image of 256 blocks, each full of its number.
    fn reader() -> MetadataReader {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        for value in 0..=255 {
            image.write_all(&[value; METADATA_BLOCK]).unwrap();
        }
        image.flush().unwrap();
        MetadataReader::open(image.path()).unwrap()
    }

    fn requests(list: impl IntoIterator<Item = (u64, usize)>) -> Vec<Request> {
        list.into_iter().map(|(first, count)| Request { first: MetaBlock::new(first), count }).collect()
    }

    fn with(queue: Queue) -> Requests {
        let mut requests = Requests::default();
        requests.queue = queue;
        requests
    }

    fn long() -> Waits {
        Waits { total: Duration::from_secs(1), fast: Duration::ZERO }
    }

    #[test]
    fn all_ways_give_the_same_blocks_in_order_and_count_each_request() {
        let small = AioQueue::new(3).unwrap();
        let ways = [Queue::Measuring(Waits::default()), Queue::Measuring(long()), Queue::Made(small), Queue::Missing];
        // More requests than the queue holds, and more bytes than the buffers may have.
        let lists = [
            requests((0..100).map(|at| (2 * at, 1 + at as usize % 3))),
            requests((0..20).map(|at| (at, 200))),
            requests([(7, 1)]),
            requests([]),
        ];
        for mut ways in ways.map(with) {
            for list in &lists {
                let reader = reader();
                let mut expected = 0;
                let read = ways.read(&reader, list, |index, blocks| {
                    assert_eq!((index, blocks.len()), (expected, list[index].count));
                    let first = list[index].first.get();
                    assert!(
                        (first..).zip(blocks).all(|(at, block)| u64::from(block[0]) == at && block[4095] == block[0])
                    );
                    expected += 1;
                    Ok(())
                });
                read.unwrap();
                assert_eq!((expected, reader.reads()), (list.len(), list.len() as u64));
            }
        }
    }

    #[test]
    fn the_first_error_in_order_is_returned() {
        let list = requests((0..40).map(|at| if at < 20 { (at, 1) } else { (240 + at, 1) }));
        let past = requests([(1, 1), (u64::MAX, 1), (2, 1)]);
        for waits in [Waits::default, long] {
            let mut taken = 0;
            let mut ways = with(Queue::Measuring(waits()));
            let mut count = |_: usize, _: &[RawBlock]| {
                taken += 1;
                Ok(())
            };
            let past_end = ways.read(&reader(), &list, &mut count);
            assert!(matches!(past_end, Err(ThinError::Io(block, _)) if block.get() == 260), "{past_end:?}");
            let past_all = ways.read(&reader(), &past, &mut count);
            assert!(matches!(past_all, Err(ThinError::Io(block, _)) if block.get() == u64::MAX), "{past_all:?}");
            assert_eq!(taken, 20 + 1);
            let refused = |_: usize, _: &[RawBlock]| Err(ThinError::Damaged(MetaBlock::new(1), Damage::Kind));
            assert!(matches!(ways.read(&reader(), &list, refused), Err(ThinError::Damaged(..))));
        }
    }

    #[test]
    fn requests_that_are_answered_from_memory_make_no_queue() {
        let mut fast = Waits::default();
        (0..10_000).for_each(|_| fast.add(9, Duration::from_micros(10)));
        (0..1000).for_each(|_| fast.add(254, Duration::from_micros(150)));
        assert!(!fast.are_long());
        let mut slow = Waits::default();
        (0..60).for_each(|_| slow.add(1, Duration::from_micros(150)));
        assert!(slow.are_long());
        let mut few = Waits::default();
        (0..10).for_each(|_| few.add(1, Duration::from_micros(150)));
        assert!(!few.are_long());
    }
}
