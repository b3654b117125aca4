//! Shares reads of a live pool between threads: one thread reads at a time, and its read serves all threads that wait.
//!
//! Each read makes the pool commit, and a commit makes a concurrent read of the same pool invalid. So one read returns
//! the maps of all devices of a pool that are requested at the same time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sys::device::DeviceId;

/// The limit of devices that one read is for. The longer a read takes, the more likely the pool commits during it.
const MAX_SHARED: usize = 16;

/// The reads of all pools, by the pool's device.
pub struct SharedReadsByPool<W, M>(Mutex<HashMap<DeviceId, Arc<SharedReads<W, M>>>>);

impl<W, M> Default for SharedReadsByPool<W, M> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<W, M> SharedReadsByPool<W, M> {
    /// The reads of one pool.
    pub fn of(&self, pool: DeviceId) -> Arc<SharedReads<W, M>> {
        lock(&self.0).entry(pool).or_default().clone()
    }
}

/// The reads of one pool. `W` is a request, and `M` its result.
pub struct SharedReads<W, M> {
    /// Requests that no read has begun to serve.
    waiting: Mutex<Vec<Arc<PendingRead<W, M>>>>,
    /// Held by the thread that reads.
    reading: Mutex<()>,
}

struct PendingRead<W, M> {
    wanted: W,
    result: Mutex<Option<M>>,
}

impl<W, M> Default for SharedReads<W, M> {
    fn default() -> Self {
        Self { waiting: Mutex::default(), reading: Mutex::default() }
    }
}

impl<W: Copy, M> SharedReads<W, M> {
    /// The result for `wanted` of a read that begins after the call: of `read`, or of another thread's.
    ///
    /// `read` gets the caller's request first and then those of other threads. It returns the results in that order, or
    /// only the first of them. A thread whose request has no result then, and each one after an error, calls its own
    /// `read`.
    ///
    /// # Errors
    /// Those of `read`. `None` when `read` returned no result at all.
    pub fn take<E>(&self, wanted: W, read: impl FnOnce(&[W]) -> Result<Vec<M>, E>) -> Result<Option<M>, E> {
        let mine = Arc::new(PendingRead { wanted, result: Mutex::default() });
        lock(&self.waiting).push(mine.clone());
        let _one_at_a_time = lock(&self.reading);
        if let Some(result) = lock(&mine.result).take() {
            return Ok(Some(result));
        }
        // The request is no longer in the list if a read that was for it failed.
        let mut reads = vec![mine.clone()];
        let mut waiting = lock(&self.waiting);
        waiting.retain(|other| !Arc::ptr_eq(other, &mine));
        let others = waiting.len().min(MAX_SHARED - 1);
        reads.extend(waiting.drain(..others));
        drop(waiting);
        let wanted: Vec<W> = reads.iter().map(|read| read.wanted).collect();
        for (pending, result) in reads.iter().zip(read(&wanted)?) {
            *lock(&pending.result) = Some(result);
        }
        Ok(lock(&mine.result).take())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    fn until(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
    }

    type Received = Result<Option<u64>, ()>;

    /// Runs four threads that request 0 to 3. The read for 0 lasts until the others wait. `rest` returns how many
    /// results a later read, whose number it gets, returns. Returns the requests of each read, and what each thread
    /// received.
    fn four_threads(rest: impl Fn(usize) -> Result<usize, ()> + Sync) -> (Vec<Vec<u64>>, Vec<Received>) {
        let reads = SharedReads::<u64, u64>::default();
        let requests = Mutex::new(Vec::new());
        let take = |wanted: u64| {
            reads.take(wanted, |all| {
                let number = lock(&requests).len();
                lock(&requests).push(all.to_vec());
                let count = if number == 0 { all.len() } else { rest(number)? };
                if number == 0 {
                    until(|| lock(&reads.waiting).len() == 3);
                }
                Ok(all.iter().take(count).map(|wanted| wanted * 10).collect())
            })
        };
        let received = thread::scope(|scope| {
            let first = scope.spawn(|| take(0));
            until(|| lock(&requests).len() == 1);
            let others: Vec<_> = (1..4).map(|wanted| scope.spawn(move || take(wanted))).collect();
            [first].into_iter().chain(others).map(|thread| thread.join().unwrap()).collect()
        });
        (requests.into_inner().unwrap(), received)
    }

    #[test]
    fn waiting_threads_share_the_next_read() {
        let (mut requests, received) = four_threads(|_| Ok(3));
        assert_eq!(received, [0, 10, 20, 30].map(|received| Ok(Some(received))));
        requests[1].sort_unstable();
        assert_eq!(requests, [vec![0], vec![1, 2, 3]]);
    }

    #[test]
    fn a_thread_without_a_result_reads_itself() {
        let (requests, received) = four_threads(|number| if number == 1 { Err(()) } else { Ok(1) });
        assert_eq!(requests.len(), 4, "{requests:?}");
        let failed = usize::try_from(requests[1][0]).unwrap();
        for (wanted, received) in received.into_iter().enumerate() {
            assert_eq!(received, if wanted == failed { Err(()) } else { Ok(Some(wanted as u64 * 10)) });
        }
        let (_, received) = four_threads(|_| Ok(0));
        assert_eq!(received, [Ok(Some(0)), Ok(None), Ok(None), Ok(None)]);
    }
}
